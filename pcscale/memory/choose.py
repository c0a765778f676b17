"""The settings that fit a budget and cost least, and, where none fit, what would. Needs no torch.

Every combination of `KNOBS` is a candidate. None of them changes what a step sees: sequences a step and all that
belongs to the model stay. A candidate's cost is what one rank's step computes and moves (`Work`): FLOPs, with
those that are recomputed, and bytes over each link at the worth of a byte there (`Worth`). Of candidates that fit and
cost about the same the most exact one is chosen. No time is predicted for this: machines differ too much.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

from pcscale.common.errors import BudgetError, RequestError
from pcscale.common.units import format_bytes, parse_bytes
from pcscale.config.schema import PlanConfig
from pcscale.memory.deployment import Deployment, ModelSplit
from pcscale.memory.predict import Prediction
from pcscale.memory.shared import KNOBS

RESOURCES = {"device": "device memory", "host": "host memory", "disk": "disk"}
SAME_COST = 1.02
"""Settings whose steps cost this much more at most count as equally good; the more exact ones are taken."""


class Worth(NamedTuple):
    """FLOPs of the compressed model in whose time one byte crosses a link.

    Attributes:
        bus: between host and device; without a GPU from memory to memory.
        disk: of one NVMe drive.
        ranks: between ranks.
        float32: times that an operation in float32 counts, where bfloat16 has units of its own.
    """

    bus: int
    disk: int
    ranks: int
    float32: int


ON_GPU = Worth(bus=5_000, disk=30_000, ranks=5_000, float32=4)
"""Worths beside a GPU that trains at some 120 TFLOP/s in bfloat16: PCIe moves 25 GB/s, for ranks as well, a drive 4
GB/s. Faster GPUs come with faster links; float32 runs at a half (TF32 products of the sweep) to a fifteenth of that."""
ON_HOST = Worth(bus=20, disk=100, ranks=250, float32=1)
"""Worths on processors that train at some 0.2 TFLOP/s: memory copies 10 GB/s, a drive 2 GB/s, gloo 0.8 GB/s."""
_STATES = ({"record_dtype": "float32", "moments": "32bit"}, {"record_dtype": "bfloat16", "moments": "8bit"})
_OF_A_STEP = {"per_device_train_batch_size", "gradient_accumulation_steps", "deepspeed"}
"""Knobs that are chosen even where they were given: how a step's sequences, whose number stays, are shared out."""


@dataclass(frozen=True)
class Budget:
    """The memory, disk and devices that there are. Units: bytes; None: no limit.

    Attributes:
        device: of each GPU; None: there is no GPU.
        host: of one host, which all GPUs share.
    """

    device: int | None = None
    host: int | None = None
    disk: int | None = None
    gpus: int = 1

    @property
    def limits(self) -> dict[str, int]:
        """The stated limits by resource."""
        return {name: limit for name in RESOURCES if (limit := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Choice:
    """Settings on a deployment, with what they need and cost, each computed when it is first asked for."""

    prediction: Prediction

    @property
    def config(self) -> PlanConfig:
        return self.prediction.config

    @cached_property
    def needs(self) -> dict[str, int]:
        """Bytes by resource: of each device, of the host with all ranks, of the disk."""
        return self.prediction.needs

    @cached_property
    def cost(self) -> float:
        """The step's FLOPs, and its bytes at their worth. Units: FLOPs."""
        flops, bus, disk, ranks = self.prediction.work
        worth = ON_GPU if self.prediction.deployment.on_gpu else ON_HOST
        counted = flops * (1 if self.config.bf16 else worth.float32)
        return counted + worth.bus * bus + worth.disk * disk + worth.ranks * ranks

    def over(self, budget: Budget) -> list[str]:
        """The resources that there is too little of."""
        return [name for name, limit in budget.limits.items() if self.needs[name] > limit]


def choose(
    prediction: Prediction, budget: Budget, forms: Mapping[str, ModelSplit], given: Collection[str] = ()
) -> Choice:
    """The settings that fit and cost least; of those that cost about the same the most exact.

    Args:
        prediction: of the plan and of settings whose other keys than `KNOBS` stay as they are.
        forms: the ways to split the model among several GPUs, cheapest in traffic first, by the names that run.yaml
            gives DeepSpeed's files.
        given: knobs that stay as well, but for how a step's sequences are cut into micro batches.

    Raises:
        RequestError: the GPUs cannot share a step's sequences evenly.
        BudgetError: nothing fits; the message names the least of each resource that would do.
    """
    config = prediction.config
    if config.sequences_per_step % budget.gpus:
        raise RequestError(
            f"{config.sequences_per_step} sequences a step cannot be shared by {budget.gpus} GPUs: set "
            "gradient_accumulation_steps so that they can."
        )
    found = list(candidates(prediction, budget, forms, given))
    choice = cheapest_fitting(found, budget)
    if choice is None:
        raise BudgetError(_explain_refusal(found, config, budget, given))
    return choice


def cheapest_fitting(found: list[Choice], budget: Budget) -> Choice | None:
    """The first candidate that fits and costs about the least of those that fit; None: none fits.

    Args:
        found: most exact first.
    """
    by_cost = sorted(found, key=lambda choice: choice.cost)
    # Memory is predicted for the cheap ones alone, until one fits.
    cheapest = next((choice for choice in by_cost if not choice.over(budget)), None)
    if cheapest is None:
        return None
    return next(choice for choice in found if choice.cost <= SAME_COST * cheapest.cost and not choice.over(budget))


def candidates(
    prediction: Prediction,
    budget: Budget,
    forms: Mapping[str, ModelSplit] = MappingProxyType({}),
    given: Collection[str] = (),
) -> Iterator[Choice]:
    """Every combination of knobs with the given ones as they are, the most exact first."""
    splits = {None: None} if budget.gpus == 1 else forms
    # Predictions for one deployment share what does not depend on the knobs that they differ in.
    bases = {
        name: replace(prediction, deployment=Deployment(budget.device is not None, budget.gpus, zero=split), memo={})
        for name, split in splits.items()
    }
    kept = _kept(prediction.config, given)
    axes = [_with_kept(axis, kept) for axis in _axes(prediction.config, budget)]
    for options in product(*axes, _values("deepspeed", *bases), _batches(prediction.config, budget)):
        knobs = {key: value for option in options for key, value in option.items()}
        varied = bases[knobs["deepspeed"]].varied(**knobs)
        if _keeps_cap(varied):
            yield Choice(varied)


def _axes(config: PlanConfig, budget: Budget) -> Iterator[list[dict[str, Any]]]:
    """The values of each knob, or of two that go together, the most exact first."""
    on_gpu = budget.device is not None
    # A GPU computes in bfloat16 several times as fast; a processor gains nothing.
    yield _values("bf16", *([config.bf16] if config.bf16 or not on_gpu else [False, True]))
    if config.method == "projected":
        yield _values("base_precision", *(["stored", "int8"] if config.base_precision == "stored" else ["int8"]))
        # No more exact than what was asked for.
        yield list(_STATES if (config.record_dtype, config.moments) == ("float32", "32bit") else _STATES[1:])
        yield _values("residency", *(["device", "cpu", "disk"] if on_gpu else ["cpu", "disk"]))
        yield _values("base_home", *(["disk", "cpu", "device"] if on_gpu else ["disk", "cpu"]))
    yield _values("gradient_home", *(["device", "cpu"] if budget.gpus == 1 and on_gpu else ["device"]))
    yield _values("gradient_checkpointing", False, True)


def _values(knob: str, *values: Any) -> list[dict[str, Any]]:
    return [{knob: value} for value in values]


def _with_kept(axis: list[dict[str, Any]], kept: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options of an axis with the knobs in them that are kept, each once."""
    options = [{key: kept.get(key, value) for key, value in option.items()} for option in axis]
    return [option for position, option in enumerate(options) if option not in options[:position]]


def _kept(config: PlanConfig, given: Collection[str]) -> dict[str, Any]:
    return {key: getattr(config, key) for key in KNOBS if key in given and key not in _OF_A_STEP}


def _keeps_cap(prediction: Prediction) -> bool:
    """True if records keep `pinned_memory`, as projection/residency.py asks."""
    config, owned = prediction.config, prediction.owned
    pinned = {"device": 0, "cpu": owned.records, "disk": owned.largest}[config.residency]
    return config.pinned_memory is None or pinned <= parse_bytes(config.pinned_memory)


def _batches(config: PlanConfig, budget: Budget) -> list[dict[str, Any]]:
    """Ways to cut a step's sequences into micro batches, the largest first."""
    each = config.sequences_per_step // budget.gpus
    sizes = [size for size in range(each, 0, -1) if each % size == 0]
    return [{"per_device_train_batch_size": size, "gradient_accumulation_steps": each // size} for size in sizes]


def _explain_refusal(found: list[Choice], config: PlanConfig, budget: Budget, given: Collection[str]) -> str:
    """Why nothing fits: the least of each resource at all, and the one change that would help most."""
    if not found:
        return f"pinned_memory {config.pinned_memory} is too small for records in host memory and in files. Give more."
    limits = budget.limits
    least = ", ".join(f"{RESOURCES[name]} {format_bytes(min(c.needs[name] for c in found))}" for name in limits)
    # What each resource must be where the others stay as they are.
    alone = {name: [c.needs[name] for c in found if c.over(budget) == [name]] for name in limits}
    possible = {name: min(needs) for name, needs in alone.items() if needs}
    stated = ", ".join(f"{RESOURCES[name]} {format_bytes(limit)}" for name, limit in limits.items())
    kept = "".join(f", with {key}: {str(value).lower()}" for key, value in _kept(config, given).items())
    message = f"nothing fits {stated}{kept}. The least that any settings need of each: {least}. "
    if not possible:
        return message + "More than one of them is too small; a smaller keep or sequence_length needs less."
    name = min(possible, key=lambda name: possible[name] / limits[name])
    return message + f"It would fit with {RESOURCES[name]} {format_bytes(possible[name])} ({possible[name]} bytes)."


def reasons(choice: Choice, default: PlanConfig, budget: Budget) -> dict[str, str]:
    """The reason for each setting that is not what it would have been: what the other one would take."""
    found = {}
    for key in KNOBS:
        other = getattr(default, key)
        if getattr(choice.config, key) == other or key in ("gradient_accumulation_steps", "deepspeed"):
            continue
        changes = {key: other}
        if key == "per_device_train_batch_size":
            changes["gradient_accumulation_steps"], rest = divmod(choice.config.sequences_per_step, other)
            if rest:
                continue
        instead = Choice(choice.prediction.varied(**changes))
        over = instead.over(budget)
        if over:
            taken, limit = format_bytes(instead.needs[over[0]]), format_bytes(budget.limits[over[0]])
            found[key] = f"{str(other).lower()} would take {taken} of {limit} {RESOURCES[over[0]]}"
        else:
            found[key] = f"{str(other).lower()} fits too, and {_compared(instead, choice)}"
    return found


def _compared(instead: Choice, choice: Choice) -> str:
    """The operations and bytes of other settings that the chosen ones save."""
    (own_flops, *own_bytes), (other_flops, *other_bytes) = choice.prediction.work, instead.prediction.work
    flops = other_flops / own_flops
    bus = "over the bus" if choice.prediction.deployment.on_gpu else "within memory"
    links = zip((bus, "to and from the disk", "between ranks"), own_bytes, other_bytes, strict=True)
    moved = [f"{format_bytes(other - own)} more {where}" for where, own, other in links if other > own]
    parts = ["computes in float32"] if choice.config.bf16 and not instead.config.bf16 else []
    parts += [f"computes {flops:.2f} × the FLOPs"] if flops >= SAME_COST else []
    parts += [f"moves {' and '.join(moved)} a step"] if moved else []
    return ", ".join(parts) or "costs about the same"
