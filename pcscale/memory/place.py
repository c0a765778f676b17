"""What a run is spread over: a GPU or the host alone, how many ranks, and what ZeRO does with the compressed model."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pcscale.common.ledger import ENGINE, GRADIENTS, WEIGHTS

FLOAT_BYTES = 4
GATHERED = "gathered weights and gradients"
"""What stage 3 puts together for as long as it is needed."""
_DEFAULT_BUCKET_VALUES = 500_000_000
_DEFAULT_LIVE_VALUES = 1_000_000_000


@dataclass(frozen=True)
class Part:
    """One component's memory.

    Attributes:
        home: `device`, `host` (anonymous), `pinned` or `disk`.
        num_bytes: Units: bytes.
    """

    home: str
    num_bytes: int


Parts = dict[str, Part]


@dataclass(frozen=True)
class ZeroForm:
    """What a DeepSpeed file's `zero_optimization` section says of where the compressed model lives.

    Attributes:
        weights_on: `device`, `cpu` or `nvme`; at stage 3.
        master_on: where float32 copies and gradients are; likewise.
        bucket_values: values that are reduced at a time, with those of a second bucket that is filled meanwhile.
        live_values: gathered values at a time, at stage 3.
    """

    stage: int = 0
    weights_on: str = "device"
    master_on: str = "device"
    bucket_values: int = _DEFAULT_BUCKET_VALUES
    live_values: int = _DEFAULT_LIVE_VALUES

    @classmethod
    def read(cls, section: Mapping[str, Any]) -> "ZeroForm":
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

    def parts(self, parameters: int, weight_bytes: int, ranks: int, accumulates: bool, largest: int = 0) -> Parts:
        """What one rank holds of the compressed model while it trains (deepspeed_configs/README.md has the table).

        Args:
            parameters: of the compressed model.
            weight_bytes: 2 or 4.
            accumulates: whether a step has several micro batches.
            largest: parameters of the largest weight, which stages 1 and 3 keep once more with several ranks.

        Source: DeepSpeed 0.19.8, counted with one rank and with two on processors.
        """
        n, part, half = parameters, -(-parameters // ranks), weight_bytes == 2
        bucket = min(self.bucket_values, n) * FLOAT_BYTES
        again = FLOAT_BYTES * largest * (ranks > 1)
        if self.stage == 0:
            return {
                WEIGHTS: Part("device", n * weight_bytes),
                GRADIENTS: Part("device", n * FLOAT_BYTES),
                ENGINE: Part("device", bucket if ranks > 1 else 0),
            }
        homes = {"device": "device", "cpu": "pinned", "nvme": "disk"}
        if self.stage == 1:
            copies = FLOAT_BYTES * part + FLOAT_BYTES * n * half
            return {
                WEIGHTS: Part("device", n * weight_bytes),
                GRADIENTS: Part("device", n * weight_bytes),
                ENGINE: Part(homes[self.master_on], copies + bucket + again),
            }
        if self.stage == 2 and self.master_on == "device":
            return {WEIGHTS: Part("device", n * weight_bytes), ENGINE: Part("device", 2 * FLOAT_BYTES * part + bucket)}
        if self.stage == 2:
            copies = (2 * FLOAT_BYTES + weight_bytes + FLOAT_BYTES * (accumulates and not half)) * part
            on_device = FLOAT_BYTES * part * half + bucket
            return {
                WEIGHTS: Part("device", n * weight_bytes),
                GRADIENTS: Part("device", on_device),
                ENGINE: Part("pinned", copies),
            }
        gathered = min(self.live_values, n) * weight_bytes
        weights = Part(homes[self.weights_on], weight_bytes * part)
        reduced = bucket + self.scattered_bytes(n, ranks)
        if self.master_on == "nvme":
            # Gradients stay in host memory.
            return {WEIGHTS: weights, GATHERED: Part("device", gathered + reduced), ENGINE: Part("pinned", 4 * part)}
        doubled = self.master_on != "device"
        return {
            WEIGHTS: weights,
            GATHERED: Part("device", gathered + reduced),
            ENGINE: Part(homes[self.master_on], (2 + doubled) * FLOAT_BYTES * part + again),
        }


@dataclass(frozen=True)
class Place:
    """What a run is spread over.

    Attributes:
        on_gpu: False: what the device would hold, the host does.
        ranks: processes, each with a device of its own.
        ranks_of_a_host: how many of them share its memory; None: all.
        zero: what DeepSpeed does; None: one process without it.
    """

    on_gpu: bool = True
    ranks: int = 1
    ranks_of_a_host: int | None = None
    zero: ZeroForm | None = None

    @cached_property
    def sharing(self) -> int:
        """Ranks on one host."""
        return min(self.ranks, self.ranks_of_a_host or self.ranks)

    def settle(self, parts: Parts) -> Parts:
        """The same parts where there is no GPU: all memory is the host's, and nothing is on its way to a device."""
        if self.on_gpu:
            return parts
        return {
            name: part if part.home == "disk" else Part("host", part.num_bytes)
            for name, part in parts.items()
            if name not in ON_GPU_ONLY
        }


ON_GPU_ONLY = ("base on its way", "pinned buffers", "device context")
