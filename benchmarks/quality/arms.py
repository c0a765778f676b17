"""The arms of the comparison: what each changes of the settings that all share, at which rates, sizes and seeds."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SHARED = {
    "calibration_tokens": 32768,
    "sequence_length": 256,
    "eval_tokens": 16384,
    "max_steps": 100,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 10,
    "eval_steps": 20,
    "save_steps": 100,
    "keep_checkpoints": 1,
}
"""100 steps of 1,024 tokens."""
HARD_PRUNING = {"method": "hard_prune"}
OUR_START = {"start": "pca_least_squares", "importance": "energy"}
OUR_RATES = {"projection_rates": "per_matrix"}


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
        settings: beside `SHARED`.
        rates: tried at half of the parameters with the first seed; the best one is taken for everything else.
        keeps: further shares of the parameters.
        seeds: further seeds at half of the parameters.
    """

    name: str
    settings: dict[str, Any]
    rates: tuple[dict[str, float], ...]
    keeps: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        values: of run.yaml, without base, output and data.
    """

    arm: str
    values: dict[str, Any] = field(hash=False)


FIRST = {"keeps": (0.7, 0.3), "seeds": (1, 2)}
ARMS = (
    Arm("hard pruning, published start", HARD_PRUNING, alone(3e-4, 6e-4, 1.2e-3), **FIRST),
    Arm("Projected Compression, published form and start", {}, alone(3.75e-5, 7.5e-5, 1.5e-4), **FIRST),
    Arm("hard pruning, our start", HARD_PRUNING | OUR_START, alone(3e-4, 6e-4, 1.2e-3), **FIRST),
    Arm(
        "Projected Compression, our recipe",
        OUR_START | OUR_RATES,
        pairs((6e-5, 6e-4), (1.8e-4, 6e-4), (1.2e-4, 1.2e-3)),
        **FIRST,
    ),
)


def trials(arm: Arm) -> Iterator[Job]:
    """The runs that the best rate is found by."""
    for rates in arm.rates:
        yield Job(arm.name, {**SHARED, **arm.settings, **rates, "keep": 0.5, "seed": 0})


def others(arm: Arm, rates: dict[str, float]) -> Iterator[Job]:
    """The runs at a rate that was found."""
    values = {**SHARED, **arm.settings, **rates}
    for seed in arm.seeds:
        yield Job(arm.name, {**values, "keep": 0.5, "seed": seed})
    for keep in arm.keeps:
        yield Job(arm.name, {**values, "keep": keep, "seed": 0})
