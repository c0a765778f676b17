"""Every combination of what a user may set for memory's sake, with what it takes, the slow obvious way."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from pcscale.config.schema import RunConfig
from pcscale.families.plan import Plan
from pcscale.families.registry import FAMILIES
from pcscale.families.widths import plan_widths
from pcscale.memory.budget import ZERO_FILES, Budget, zero_file
from pcscale.memory.estimate import peaks
from pcscale.memory.hardware import HARDWARE
from pcscale.memory.place import Place, ZeroForm
from pcscale.memory.step_time import step_seconds
from tests.families.real_models import LLAMA_1B
from tests.memory.plans import SLOW_HOST, settings

GPU = HARDWARE["rtx-4090"]
HOST = SLOW_HOST
MODEL = LLAMA_1B | {"dtype": "bfloat16", "num_hidden_layers": 6}
STEP = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "sequence_length": 2048}
STATES = (("float32", "32bit"), ("bfloat16", "8bit"))


@cache
def plan_1b() -> Plan:
    return plan_widths(FAMILIES["llama"], MODEL, 1024, 4096)


def config(**changes: Any) -> RunConfig:
    return settings(**{**STEP, **changes})


@dataclass(frozen=True)
class Way:
    """One combination, with what it takes."""

    config: RunConfig
    device: int
    host: int
    disk: int
    seconds: float

    def fits(self, budget: Budget) -> bool:
        limits = ((self.device, budget.device), (self.host, budget.host), (self.disk, budget.disk))
        return all(limit is None or needed <= limit for needed, limit in limits)


def combinations(gpus: int, on_gpu: bool) -> Iterator[dict[str, Any]]:
    """Every combination of what a user may set for memory's sake, loop in loop."""
    sequences = 2 // gpus
    for bf16 in (False, True) if on_gpu else (False,):
        for precision in ("stored", "int8"):
            for record_dtype, moments in STATES:
                for residency in ("device", "cpu", "disk") if on_gpu else ("cpu", "disk"):
                    for base_home in ("disk", "cpu", "device") if on_gpu else ("disk", "cpu"):
                        for gradient_home in ("device", "cpu") if on_gpu and gpus == 1 else ("device",):
                            for checkpointing in (False, True):
                                for name in (None,) if gpus == 1 else tuple(ZERO_FILES):
                                    for batch in (1, 2):
                                        if sequences % batch == 0:
                                            yield {
                                                "bf16": bf16,
                                                "base_precision": precision,
                                                "record_dtype": record_dtype,
                                                "moments": moments,
                                                "residency": residency,
                                                "base_home": base_home,
                                                "gradient_home": gradient_home,
                                                "gradient_checkpointing": checkpointing,
                                                "deepspeed": name,
                                                "per_device_train_batch_size": batch,
                                                "gradient_accumulation_steps": sequences // batch,
                                            }


@cache
def all_ways(gpus: int = 1, on_gpu: bool = True) -> list[Way]:
    plan, found = plan_1b(), []
    for changes in combinations(gpus, on_gpu):
        run, name = config(**changes), changes["deepspeed"]
        zero = ZeroForm.read(zero_file(name)["zero_optimization"]) if name else None
        of_phases = list(peaks(plan, run, Place(on_gpu, gpus, zero=zero)).values())
        device, host, disk = (max(p[f"{key}_bytes"] for p in of_phases) for key in ("device", "host", "disk"))
        seconds = step_seconds(plan, run, GPU if on_gpu else HOST, gpus, zero.stage if zero else 0)["total"]
        found.append(Way(run, device, host * gpus, disk, seconds))
    return found


def least(resource: str, gpus: int = 1, on_gpu: bool = True) -> int:
    return min(getattr(way, resource) for way in all_ways(gpus, on_gpu))
