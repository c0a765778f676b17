"""ZeRO's bytes: what a DeepSpeed file makes of the compressed model's memory. Needs neither torch nor deepspeed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pcscale.common.files import read_json
from pcscale.common.ledger import ENGINE, GRADIENTS, WEIGHTS
from pcscale.config.files import resolve_deepspeed
from pcscale.memory.deployment import FLOAT_BYTES, GATHERED, Part, Parts

FILES_TO_CHOOSE = ("zero1", "zero2", "zero3", "zero3_offload_cpu")
"""The files of deepspeed_configs/ that `pcscale plan` chooses from, cheapest in traffic first."""
_DEFAULT_BUCKET_VALUES = 500_000_000
_DEFAULT_LIVE_VALUES = 1_000_000_000
_PLACEMENTS = {"device": "device", "cpu": "pinned", "nvme": "disk"}


@dataclass(frozen=True)
class ZeroForm:
    """The compressed model's placements (`device`, `cpu`, `nvme`), from a DeepSpeed file's `zero_optimization`."""

    stage: int = 0
    weights_on: str = "device"  # another at stage 3 alone
    master_on: str = "device"  # float32 copies and gradients
    bucket_values: int = _DEFAULT_BUCKET_VALUES  # reduced at a time, with a second bucket that is filled meanwhile
    live_values: int = _DEFAULT_LIVE_VALUES  # gathered at a time, at stage 3

    @classmethod
    def read(cls, section: Mapping[str, Any]) -> "ZeroForm":
        """The form that a `zero_optimization` section describes."""

        def device(key: str) -> str:
            found = str((section.get(key) or {}).get("device", "none"))
            return "device" if found == "none" else found

        stage = int(section.get("stage", 0))
        return cls(
            stage,
            device("offload_param") if stage == 3 else "device",
            device("offload_optimizer") if stage > 0 else "device",
            int(section.get("reduce_bucket_size", _DEFAULT_BUCKET_VALUES)) * (1 + bool(section.get("overlap_comm"))),
            int(section.get("stage3_max_live_parameters", _DEFAULT_LIVE_VALUES)),
        )

    def scattered_bytes(self, parameters: int, ranks: int) -> int:
        """The flat copy of a bucket of gradients that stage 3 makes to scatter them to their ranks."""
        return min(self.bucket_values, parameters) * FLOAT_BYTES if self.stage == 3 and ranks > 1 else 0

    def moved_bytes(self, parameters: int, weight_bytes: int, ranks: int, micro_batches: int) -> int:
        """Bytes between one rank's device and the host in a step: offloaded weights for every pass, and the gradients
        and weights that an offloaded master takes and gives."""
        part = -(-parameters // ranks)
        weights = 2 * micro_batches * weight_bytes * part * (self.weights_on != "device")
        return weights + (micro_batches * FLOAT_BYTES + weight_bytes) * part * (self.master_on != "device")

    def parts(self, parameters: int, weight_bytes: int, ranks: int, accumulates: bool, largest: int = 0) -> Parts:
        """One rank's memory of the compressed model while it trains (deepspeed_configs/README.md has the table).

        Args:
            accumulates: True where a step has several micro batches.
            largest: parameters of the largest weight, which stages 1 and 3 keep once more with several ranks.

        Source: DeepSpeed 0.19.8, counted with one rank and with two on processors.
        """
        n, part, half = parameters, -(-parameters // ranks), weight_bytes == 2
        bucket = min(self.bucket_values, n) * FLOAT_BYTES
        again = FLOAT_BYTES * largest * (ranks > 1)
        if self.stage == 3:
            return self._parted(n, part, weight_bytes, bucket + self.scattered_bytes(n, ranks), again)
        weights = Part("device", n * weight_bytes)
        if self.stage == 0:
            gradients, engine = Part("device", n * FLOAT_BYTES), Part("device", bucket if ranks > 1 else 0)
            return {WEIGHTS: weights, GRADIENTS: gradients, ENGINE: engine}
        if self.stage == 1:
            copies = FLOAT_BYTES * part + FLOAT_BYTES * n * half
            engine = Part(_PLACEMENTS[self.master_on], copies + bucket + again)
            return {WEIGHTS: weights, GRADIENTS: Part("device", n * weight_bytes), ENGINE: engine}
        if self.master_on == "device":
            return {WEIGHTS: weights, ENGINE: Part("device", 2 * FLOAT_BYTES * part + bucket)}
        copies = (2 * FLOAT_BYTES + weight_bytes + FLOAT_BYTES * (accumulates and not half)) * part
        gradients = Part("device", FLOAT_BYTES * part * half + bucket)
        return {WEIGHTS: weights, GRADIENTS: gradients, ENGINE: Part("pinned", copies)}

    def _parted(self, n: int, part: int, weight_bytes: int, reduced: int, again: int) -> Parts:
        """The parts at stage 3, which splits everything."""
        weights = Part(_PLACEMENTS[self.weights_on], weight_bytes * part)
        gathered = Part("device", min(self.live_values, n) * weight_bytes + reduced)
        if self.master_on == "nvme":
            # Gradients stay in host memory.
            return {WEIGHTS: weights, GATHERED: gathered, ENGINE: Part("pinned", 4 * part)}
        copies = (2 + (self.master_on != "device")) * FLOAT_BYTES * part + again
        return {WEIGHTS: weights, GATHERED: gathered, ENGINE: Part(_PLACEMENTS[self.master_on], copies)}


def forms_to_choose() -> dict[str, ZeroForm]:
    """The forms of `FILES_TO_CHOOSE`, by name."""
    sections = {name: read_json(resolve_deepspeed(name))["zero_optimization"] for name in FILES_TO_CHOOSE}
    return {name: ZeroForm.read(section) for name, section in sections.items()}
