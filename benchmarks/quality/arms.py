"""The arms of the comparison: what each changes of the settings that all share, at which rates, sizes and seeds."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

SHARED = {"calibration_tokens": 32768, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
HARD_PRUNING = {"method": "hard_prune"}
OUR_START = {"start": "pca_least_squares", "importance": "energy"}
OUR_RECIPE = OUR_START | {"projection_rates": "per_matrix"}


def alone(*rates: float) -> tuple[dict[str, float], ...]:
    """One rate for all that is trained."""
    return tuple({"learning_rate": rate} for rate in rates)


def pairs(*rates: tuple[float, float]) -> tuple[dict[str, float], ...]:
    """Of the projections, and of aux, norms and biases."""
    return tuple({"learning_rate": rate, "aux_learning_rate": aux} for rate, aux in rates)


@dataclass(frozen=True)
class Arm:
    """One line of the comparison.

    Attributes:
        settings: beside what all share.
        rates: tried at half of the parameters with the first seed; the best one is taken for everything else.
        first: it is also run with further seeds, and at further shares of the parameters.
    """

    name: str
    settings: dict[str, Any]
    rates: tuple[dict[str, float], ...]
    first: bool = False


@dataclass(frozen=True)
class Budget:
    """How much an arm trains.

    Attributes:
        settings: beside what all arms share.
        arms: that are compared.
        variations: of our recipe, at its best rates: by name what they change.
    """

    name: str
    settings: dict[str, Any]
    arms: tuple[Arm, ...]
    variations: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        values: of run.yaml, without base, output and data.
    """

    name: str
    values: dict[str, Any] = field(hash=False)

    @property
    def rates(self) -> dict[str, float]:
        return {key: self.values[key] for key in ("learning_rate", "aux_learning_rate") if key in self.values}


CONTROL = Arm("hard pruning, published start", HARD_PRUNING, alone(3e-4, 6e-4, 1.2e-3, 2.4e-3), first=True)
PUBLISHED = Arm("Projected Compression, published form and start", {}, alone(3.75e-5, 7.5e-5, 1.5e-4, 3e-4), first=True)
PRUNED = Arm("hard pruning, our start", HARD_PRUNING | OUR_START, alone(3e-4, 6e-4, 1.2e-3, 2.4e-3), first=True)
OURS = Arm(
    "Projected Compression, our recipe",
    OUR_RECIPE,
    pairs((6e-5, 6e-4), (1.8e-4, 6e-4), (1.2e-4, 1.2e-3), (3.6e-4, 1.2e-3), (2.4e-4, 2.4e-3)),
    first=True,
)
UNIFORM = Arm(
    "our recipe, one rate for all projections",
    OUR_START,
    pairs((2e-5, 6e-4), (6e-5, 6e-4), (4e-5, 1.2e-3), (1.2e-4, 1.2e-3)),
)
TEACHING = {
    "with distillation": {"distill": {"weight": 0.5}},
    "with distillation, top 64": {"distill": {"weight": 0.5, "top_k": 64}},
}
SHORT = Budget(
    "0.1 M tokens",
    {
        "sequence_length": 256,
        "eval_tokens": 16384,
        "max_steps": 100,
        "warmup_steps": 10,
        "eval_steps": 20,
        "save_steps": 100,
    },
    (CONTROL, PUBLISHED, PRUNED, OURS, UNIFORM),
    {
        **TEACHING,
        # A step with a teacher takes 1.4 times as long on two cores.
        "with distillation, at equal time": {"distill": {"weight": 0.5}, "max_steps": 72, "save_steps": 72},
        "low-rank deltas, 32": {"projection_rank": 32},
        "low-rank deltas, 128": {"projection_rank": 128},
        "4-byte state": {"record_dtype": "bfloat16", "moments": "8bit"},
        "8-bit base": {"base_precision": "int8"},
        "start selection": {"start": "selection"},
        "start rescaled": {"start": "rescaled"},
        "start least_squares": {"start": "least_squares"},
        "start pca": {"start": "pca"},
        "importance activation": {"importance": "activation"},
        "weight decay 0.1": {"weight_decay": 0.1},
        "betas 0.9, 0.99": {"adam_beta2": 0.99},
        "clipping at 0.3": {"max_grad_norm": 0.3},
        "clipping at 100": {"max_grad_norm": 100.0},
        "warm-up of 40 steps": {"warmup_steps": 40},
    },
)
LONG = Budget(
    "0.8 M tokens",
    {
        "sequence_length": 512,
        "eval_tokens": 65536,
        "max_steps": 96,
        "per_device_train_batch_size": 16,
        "warmup_steps": 12,
        "eval_steps": 16,
        "save_steps": 96,
    },
    (
        replace(CONTROL, rates=alone(6e-4, 1.2e-3, 2.4e-3)),
        replace(PUBLISHED, rates=alone(7.5e-5, 1.5e-4, 3e-4)),
        replace(PRUNED, rates=alone(6e-4, 1.2e-3, 2.4e-3)),
        replace(OURS, rates=pairs((1.2e-4, 1.2e-3), (3.6e-4, 1.2e-3), (2.4e-4, 2.4e-3))),
    ),
    TEACHING,
)
LONGEST = replace(
    LONG,
    name="20 M tokens",
    settings={
        **LONG.settings,
        "max_steps": 1280,
        "per_device_train_batch_size": 32,
        "warmup_steps": 40,
        "eval_steps": 64,
        "save_steps": 1280,
    },
)
"""Each arm at the rate that was its best over 0.8 M tokens; the corpus of 4.6 M tokens is repeated."""
SEEDS, KEEPS = (1, 2), (0.7, 0.3)


def at(budget: Budget, rates: dict[str, dict[str, float]]) -> Budget:
    """The budget with one rate for each arm, by its name."""
    return replace(budget, arms=tuple(replace(arm, rates=(rates[arm.name],)) for arm in budget.arms))


def trials(budget: Budget, arm: Arm) -> list[Job]:
    """The runs that the best rate is found by."""
    return [Job(arm.name, _values(budget, arm.settings, rates)) for rates in arm.rates]


def others(budget: Budget, arm: Arm, rates: dict[str, float]) -> Iterator[Job]:
    """The runs at a rate that was found: with further seeds, at further sizes; of our recipe its variations."""
    if arm.first and budget is SHORT:
        for seed in SEEDS:
            yield seeded(budget, arm, rates, seed)
        for keep in KEEPS:
            yield sized(budget, arm, rates, keep)
    if arm.name == OURS.name:
        for name, changes in budget.variations.items():
            yield varied(budget, rates, name, changes)


def seeded(budget: Budget, arm: Arm, rates: dict[str, float], seed: int) -> Job:
    return Job(f"{arm.name}, seed {seed}", _values(budget, arm.settings, rates) | {"seed": seed})


def sized(budget: Budget, arm: Arm, rates: dict[str, float], keep: float) -> Job:
    return Job(f"{arm.name}, {keep:.0%}", _values(budget, arm.settings, rates) | {"keep": keep})


def varied(budget: Budget, rates: dict[str, float], name: str, changes: dict[str, Any]) -> Job:
    return Job(f"our recipe, {name}", _values(budget, OUR_RECIPE, rates) | changes)


def _values(budget: Budget, settings: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    return {**SHARED, **budget.settings, **settings, **rates, "keep": 0.5, "seed": 0, "keep_checkpoints": 1}
