"""The fastest settings that fit a budget, and, where none fit, what would. Needs no torch.

Every combination of what a user could set for memory's sake is estimated; thousands take seconds. None of them changes
what a step sees: sequences a step and all that belongs to the model stay.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from pcscale.common.errors import BudgetError, RequestError
from pcscale.common.units import format_bytes, parse_bytes
from pcscale.config.schema import RunConfig
from pcscale.families.plan import Plan
from pcscale.memory.components import owned_sizes
from pcscale.memory.estimate import peaks
from pcscale.memory.hardware import Hardware
from pcscale.memory.place import Place, ZeroForm
from pcscale.memory.step_time import TOTAL, step_seconds

RESOURCES = {"device": "device memory", "host": "host memory", "disk": "disk"}
_COMMON = {"reduce_bucket_size": 50_000_000, "contiguous_gradients": True, "overlap_comm": True}
_GATHERED = {"allgather_bucket_size": 50_000_000}
_STAGE_3 = {
    "sub_group_size": 100_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
}
_ON_HOST = {"device": "cpu", "pin_memory": True}


def _live(values: int) -> dict[str, int]:
    return {"stage3_max_live_parameters": values, "stage3_max_reuse_distance": values}


ZERO_FILES: dict[str, dict[str, Any]] = {
    "zero1.json": {"stage": 1, **_COMMON, **_GATHERED, "overlap_comm": False},
    "zero2.json": {"stage": 2, **_COMMON, **_GATHERED},
    "zero3.json": {"stage": 3, **_COMMON, **_STAGE_3, **_live(300_000_000)},
    "zero3_offload_cpu.json": {
        "stage": 3,
        "offload_param": _ON_HOST,
        "offload_optimizer": _ON_HOST,
        **_COMMON,
        **_STAGE_3,
        **_live(100_000_000),
    },
}
"""The `zero_optimization` of those files of deepspeed_configs/ that are chosen from, cheapest in traffic first."""
SAME_TIME = 1.02
"""Settings whose steps take this much longer at most count as equally fast; the more exact ones are taken."""
_STATES = ({"record_dtype": "float32", "moments": "32bit"}, {"record_dtype": "bfloat16", "moments": "8bit"})
KNOBS = (
    "bf16",
    "base_precision",
    "record_dtype",
    "moments",
    "residency",
    "base_home",
    "gradient_home",
    "gradient_checkpointing",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "deepspeed",
)
"""The settings that are chosen, most exact choices first: of equally fast ones the first in this order is taken."""
_OF_A_STEP = {"per_device_train_batch_size", "gradient_accumulation_steps", "deepspeed"}
"""Knobs that are chosen even where they were said: how a step's sequences, whose number stays, are shared out."""


@dataclass(frozen=True)
class Budget:
    """What there is. Units: bytes; None: no limit.

    Attributes:
        device: of each GPU; None: there is no GPU.
        host: of one host, which all GPUs share.
    """

    device: int | None = None
    host: int | None = None
    disk: int | None = None
    gpus: int = 1


@dataclass(frozen=True)
class Choice:
    """Settings with what they need.

    Attributes:
        needs: by resource: of each device, of the host with all ranks, of the disk. Units: bytes.
        seconds: of a step; infinite until it is asked for.
    """

    config: RunConfig
    place: Place
    needs: dict[str, int]
    seconds: float = field(default=float("inf"))

    def fits(self, budget: Budget) -> bool:
        return not self.over(budget)

    def over(self, budget: Budget) -> list[str]:
        """The resources that there is too little of."""
        limits = {"device": budget.device, "host": budget.host, "disk": budget.disk}
        return [name for name, limit in limits.items() if limit is not None and self.needs[name] > limit]


def zero_file(name: str) -> dict[str, Any]:
    """What one of `ZERO_FILES` holds."""
    return {"zero_optimization": ZERO_FILES[name]}


def needs_of(plan: Plan, config: RunConfig, place: Place) -> dict[str, int]:
    """The peaks over all phases, by resource."""
    found = peaks(plan, config, place).values()
    return {
        "device": max(peak["device_bytes"] for peak in found),
        "host": max(peak["host_bytes"] for peak in found) * place.sharing,
        "disk": max(peak["disk_bytes"] for peak in found),
    }


def choose(plan: Plan, config: RunConfig, budget: Budget, hardware: Hardware, said: Collection[str] = ()) -> Choice:
    """The fastest settings that fit; of equally fast ones the most exact.

    Args:
        config: what is not a knob stays as it is here.
        said: knobs that stay as well, but for how a step's sequences are cut into micro batches.

    Raises:
        RequestError: the GPUs cannot share a step's sequences evenly.
        BudgetError: nothing fits; the message names the least of each resource that would do.
    """
    if config.sequences_per_step % budget.gpus:
        raise RequestError(
            f"{config.sequences_per_step} sequences a step cannot be shared by {budget.gpus} GPUs: set "
            "gradient_accumulation_steps so that they can."
        )
    found = list(candidates(plan, config, budget, said))
    choice = fastest_fitting(plan, found, budget, hardware)
    if choice is None:
        raise BudgetError(_explain_refusal(found, config, budget, said))
    return choice


def fastest_fitting(plan: Plan, found: list[Choice], budget: Budget, hardware: Hardware) -> Choice | None:
    """Of these candidates the fastest that fits; of equally fast ones the first. None: none fits."""
    fitting = [choice for choice in found if choice.fits(budget)]
    if not fitting:
        return None
    timed = [replace(choice, seconds=_seconds(plan, choice, hardware)) for choice in fitting]
    fastest = min(choice.seconds for choice in timed)
    return next(choice for choice in timed if choice.seconds <= SAME_TIME * fastest)


def _seconds(plan: Plan, choice: Choice, hardware: Hardware) -> float:
    stage = choice.place.zero.stage if choice.place.zero else 0
    return step_seconds(plan, choice.config, hardware, choice.place.ranks, stage)[TOTAL]


def candidates(plan: Plan, config: RunConfig, budget: Budget, said: Collection[str] = ()) -> Iterator[Choice]:
    """Every combination with the knobs that were said as they are in `config`, the most exact first."""
    kept = _kept(config, said)
    found: set[tuple[Any, ...]] = set()
    on_gpu = budget.device is not None
    # A GPU computes in bfloat16 several times as fast; a processor gains nothing.
    model_dtypes = [config.bf16] if config.bf16 or not on_gpu else [False, True]
    precisions = ("stored", "int8") if config.base_precision == "stored" else ("int8",)
    states = [state for state in _STATES if _allowed(config, state)]
    homes = ("device", "cpu", "disk") if on_gpu else ("cpu", "disk")
    base_homes = ("disk", "cpu", "device") if on_gpu else ("disk", "cpu")
    if config.method != "projected":
        precisions, states, homes, base_homes = ("stored",), [{}], ("device",), ("disk",)
    zero_files = [None] if budget.gpus == 1 else list(ZERO_FILES)
    gradient_homes = ("device", "cpu") if budget.gpus == 1 and on_gpu else ("device",)
    options = product(
        model_dtypes,
        precisions,
        states,
        homes,
        base_homes,
        gradient_homes,
        (False, True),
        zero_files,
        _batches(config, budget),
    )
    for bf16, precision, state, residency, base_home, gradient_home, checkpointing, name, batch in options:
        changes = {
            "bf16": bf16,
            "base_precision": precision,
            **state,
            "residency": residency,
            "base_home": base_home,
            "gradient_home": gradient_home,
            "gradient_checkpointing": checkpointing,
            "deepspeed": name,
            **batch,
            **kept,
        }
        if tuple(changes.values()) in found:
            continue
        found.add(tuple(changes.values()))
        zero = ZeroForm.read(ZERO_FILES[name]) if name else None
        chosen, place = config.model_copy(update=changes), Place(on_gpu, budget.gpus, zero=zero)
        if _keeps_cap(plan, chosen, budget.gpus):
            yield Choice(chosen, place, needs_of(plan, chosen, place))


def _kept(config: RunConfig, said: Collection[str]) -> dict[str, Any]:
    return {key: getattr(config, key) for key in KNOBS if key in said and key not in _OF_A_STEP}


def _keeps_cap(plan: Plan, config: RunConfig, ranks: int) -> bool:
    """Whether records keep `pinned_memory`, as projection/residency.py asks."""
    if config.pinned_memory is None or config.residency == "device":
        return True
    owned = owned_sizes(plan, config, ranks)
    return (owned.records if config.residency == "cpu" else owned.largest) <= parse_bytes(config.pinned_memory)


def _allowed(config: RunConfig, state: dict[str, str]) -> bool:
    """Whether records in this format are no more exact than those that were asked for."""
    return not (config.record_dtype == "bfloat16" and state["record_dtype"] == "float32") and not (
        config.moments == "8bit" and state["moments"] == "32bit"
    )


def _batches(config: RunConfig, budget: Budget) -> list[dict[str, int]]:
    """Ways to cut a step's sequences into micro batches, the largest first."""
    each = config.sequences_per_step // budget.gpus
    sizes = [size for size in range(each, 0, -1) if each % size == 0]
    return [{"per_device_train_batch_size": size, "gradient_accumulation_steps": each // size} for size in sizes]


def _explain_refusal(found: list[Choice], config: RunConfig, budget: Budget, said: Collection[str]) -> str:
    """Why nothing fits: the least of each resource at all, and the one change that would help most."""
    if not found:
        return f"pinned_memory {config.pinned_memory} is too small for records in host memory and in files. Give more."
    limits = {"device": budget.device, "host": budget.host, "disk": budget.disk}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    least = ", ".join(f"{RESOURCES[name]} {format_bytes(min(c.needs[name] for c in found))}" for name in given)
    # What each resource must be where the others stay as they are.
    alone = {name: min((c.needs[name] for c in found if set(c.over(budget)) <= {name}), default=None) for name in given}
    possible = {name: needed for name, needed in alone.items() if needed is not None}
    stated = ", ".join(f"{RESOURCES[name]} {format_bytes(limit)}" for name, limit in given.items())
    kept = "".join(f", with {key}: {_word(value)}" for key, value in _kept(config, said).items())
    message = f"nothing fits {stated}{kept}. The least that any settings need of each: {least}. "
    if not possible:
        return message + "More than one of them is too small; a smaller keep or sequence_length needs less."
    name = min(possible, key=lambda name: possible[name] / given[name])
    return message + f"It would fit with {RESOURCES[name]} {format_bytes(possible[name])} ({possible[name]} bytes)."


def reasons(
    plan: Plan, choice: Choice, default: RunConfig, budget: Budget, hardware: Hardware, timed: bool = True
) -> dict[str, str]:
    """Why each setting is not what it would have been: what the other one would take.

    Args:
        timed: whether the hardware's speeds are worth saying.
    """
    found = {}
    for key in KNOBS:
        chosen, other = getattr(choice.config, key), getattr(default, key)
        if chosen == other or key in ("gradient_accumulation_steps", "deepspeed"):
            continue
        changes = {key: other}
        if key == "per_device_train_batch_size":
            each = choice.config.sequences_per_step
            if each % other:
                continue
            changes["gradient_accumulation_steps"] = each // other
        config = choice.config.model_copy(update=changes)
        instead = Choice(config, choice.place, needs_of(plan, config, choice.place))
        found[key] = _compared(plan, instead, choice, budget, hardware if timed else None, _word(other))
    return found


def _compared(plan: Plan, instead: Choice, choice: Choice, budget: Budget, hardware: Hardware | None, word: str) -> str:
    limits = {"device": budget.device, "host": budget.host, "disk": budget.disk}
    for name in instead.over(budget):
        limit = format_bytes(limits[name] or 0)
        return f"{word} would take {format_bytes(instead.needs[name])} of {limit} {RESOURCES[name]}"
    if hardware is None:
        return f"{word} fits too, and is slower"
    ratio = _seconds(plan, instead, hardware) / choice.seconds
    return f"{word} fits too, and takes {ratio:.2f} × the time"


def _word(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)
