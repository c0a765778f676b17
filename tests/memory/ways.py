"""Every combination of what a user may set for memory's sake, each predicted by itself, the slow obvious way."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from pcscale.config.schema import PlanConfig
from pcscale.distributed.zero_form import forms_to_choose
from pcscale.families.plan import Plan
from pcscale.families.registry import FAMILIES
from pcscale.families.widths import plan_widths
from pcscale.memory.choose import Budget, Choice
from pcscale.memory.deployment import Deployment
from pcscale.memory.predict import Prediction, Work
from tests.families.real_models import LLAMA_1B
from tests.memory.plans import settings

MODEL = LLAMA_1B | {"dtype": "bfloat16", "num_hidden_layers": 6}
STEP = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "sequence_length": 2048}
STATES = (("float32", "32bit"), ("bfloat16", "8bit"))
FORMS = forms_to_choose()


@cache
def plan_1b() -> Plan:
    return plan_widths(FAMILIES["llama"], MODEL, 1024, 4096)


def config(**changes: Any) -> PlanConfig:
    return settings(**{**STEP, **changes})


def prediction(**changes: Any) -> Prediction:
    """The prediction that a search begins with."""
    return Prediction(plan_1b(), config(**changes))


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
                                for name in (None,) if gpus == 1 else tuple(FORMS):
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


@dataclass(frozen=True)
class Way:
    """One combination, with what it takes."""

    config: PlanConfig
    deployment: Deployment
    needs: dict[str, int]
    cost: float
    work: Work

    def fits(self, budget: Budget) -> bool:
        return all(self.needs[name] <= limit for name, limit in budget.limits.items())


@cache
def all_ways(gpus: int = 1, on_gpu: bool = True) -> list[Way]:
    found = []
    for changes in combinations(gpus, on_gpu):
        name, run = changes["deepspeed"], config(**changes)
        deployment = Deployment(on_gpu, gpus, zero=FORMS[name] if name else None)
        alone = Prediction(plan_1b(), run, deployment)
        found.append(Way(run, deployment, alone.needs, Choice(alone).cost, alone.work))
    return found


def least(resource: str, gpus: int = 1, on_gpu: bool = True) -> int:
    return min(way.needs[resource] for way in all_ways(gpus, on_gpu))
