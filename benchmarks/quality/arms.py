"""The arms of the comparison: what each changes of the settings that all share, at which rates, sizes and seeds."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.shapes import PUBLISHED_START, SMOLLM2_HALF

SHARED = {"bf16": True, "calibration_tokens": 16384, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
HARD_PRUNING = {"method": "hard_prune"}
OUR_START = {"start": "pca_least_squares", "importance": "energy"}
PUBLISHED_FORM = PUBLISHED_START | {"projection_rates": "uniform"}
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
    """

    name: str
    settings: dict[str, Any]
    rates: tuple[dict[str, float], ...]


@dataclass(frozen=True)
class Budget:
    """How much an arm trains.

    Attributes:
        about: what is compared, for its report.
        settings: beside what all arms share.
        arms: that are compared.
        variations: of our recipe, at its best rates: by name what they change.
        seeds: further ones, for every arm at its best rate.
        sizes: further ones by their share of the base's parameters, likewise.
    """

    about: str
    settings: dict[str, Any]
    arms: tuple[Arm, ...]
    variations: dict[str, dict[str, Any]]
    seeds: tuple[int, ...] = ()
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def control(self) -> Arm | None:
        return next((arm for arm in self.arms if arm.name == CONTROL.name), None)

    @property
    def ours(self) -> Arm:
        return next(arm for arm in self.arms if arm.name == OURS.name)


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


CONTROL = Arm("hard pruning, published start", HARD_PRUNING | PUBLISHED_START, alone(3e-4, 6e-4, 1.2e-3))
PUBLISHED = Arm(
    "Projected Compression, published form and start",
    PUBLISHED_FORM,
    pairs(*((rate, rate) for rate in (3.75e-5, 7.5e-5, 1.5e-4))),
)
PRUNED = Arm("hard pruning, our start", HARD_PRUNING | OUR_START, alone(1.5e-4, 3e-4, 6e-4))
OURS = Arm(
    "Projected Compression, our recipe",
    OUR_RECIPE,
    pairs((3e-5, 3e-4), (9e-5, 3e-4), (2.7e-4, 3e-4), (1.8e-4, 1.5e-4)),
)
TAUGHT = "with distillation"
TEACHING = {
    TAUGHT: {"distill": {"weight": 0.5}},
    "with distillation, top 64": {"distill": {"weight": 0.5, "top_k": 64}},
}
SHORT = Budget(
    "Arm by arm over 0.1 M tokens, at 50, 70 and 30 % of the parameters ([curves](quality.png)). Each arm has its own "
    "best of three rates at 50 %, our recipe of four pairs; the best is that of the held-out text that the losses are "
    "of. Further seeds and sizes, and variations of our recipe, take those rates. A variation of fewer steps draws on "
    "less text, so its start and order are others.",
    {
        "sequence_length": 256,
        "eval_tokens": 8192,
        "max_steps": 100,
        "warmup_steps": 10,
        "eval_steps": 25,
        "save_steps": 100,
    },
    (CONTROL, PUBLISHED, PRUNED, OURS),
    {
        **TEACHING,
        "with distillation, in as much time": {**TEACHING[TAUGHT], "max_steps": 60},
        "low-rank deltas, 32": {"projection_rank": 32},
        "low-rank deltas, 128": {"projection_rank": 128},
        "4-byte state": {"record_dtype": "bfloat16", "moments": "8bit"},
        "8-bit base": {"base_precision": "int8"},
        "at the default widths, 396 and 832": {"hidden_size": 396, "intermediate_size": 832},
    },
    seeds=(1, 2),
    sizes={
        "70 %": {"hidden_size": 450, "intermediate_size": 1280},
        "30 %": {"hidden_size": 252, "intermediate_size": 704},
    },
)
BRIEF = Budget(
    "What each setting of our recipe does, one at a time, over 0.05 M tokens at 50 % of the parameters and one pair of "
    "rates.",
    {**SHORT.settings, "max_steps": 50, "eval_steps": 50, "save_steps": 50},
    (replace(OURS, rates=pairs((9e-5, 3e-4))),),
    {
        "one rate of 1e-5 for all projections": {"projection_rates": "uniform", "learning_rate": 1e-5},
        "one rate of 3e-5 for all projections": {"projection_rates": "uniform", "learning_rate": 3e-5},
        "start selection": {"start": "selection"},
        "start rescaled": {"start": "rescaled"},
        "start least_squares": {"start": "least_squares"},
        "start pca": {"start": "pca"},
        "importance activation": {"importance": "activation"},
        "weight decay 0.1": {"weight_decay": 0.1},
        "betas 0.9, 0.99": {"adam_beta2": 0.99},
        "no clipping": {"max_grad_norm": 1e6},
        "warm-up of 2 steps": {"warmup_steps": 2},
        "distillation of weight 1": {"distill": {"weight": 1.0}},
    },
)
SPLITS = ((306, 1392), (324, 1256), (396, 832), (432, 680), (504, 432))
"""Hidden and ffn sizes of as many parameters as 360 and 1024, to 0.25 %."""
WIDTHS = replace(
    BRIEF,
    about="How one budget of parameters is split between hidden and ffn: our recipe over 0.05 M tokens at one pair of "
    "rates.",
    variations={
        f"hidden {hidden}, ffn {ffn}": {"hidden_size": hidden, "intermediate_size": ffn} for hidden, ffn in SPLITS
    },
)
LONG = Budget(
    "Arm by arm over 2 M tokens, 65,536 a step, at 50 % of the parameters, each with its own best of three rates or "
    "more.",
    {
        "sequence_length": 512,
        "eval_tokens": 65536,
        "max_steps": 32,
        "per_device_train_batch_size": 64,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 4,
        "eval_steps": 8,
        "save_steps": 32,
    },
    (
        replace(CONTROL, rates=alone(1.2e-3, 2.4e-3, 4.8e-3)),
        replace(
            PUBLISHED,
            settings=PUBLISHED.settings | {"base_home": "device"},
            rates=pairs(*((rate, rate) for rate in (3.75e-5, 7.5e-5, 1.5e-4, 3e-4, 6e-4))),
        ),
        replace(PRUNED, rates=alone(6e-4, 1.2e-3, 2.4e-3)),
        replace(
            OURS,
            settings=OURS.settings | {"base_home": "device"},
            rates=pairs((9e-5, 1.2e-3), (4.5e-5, 1.2e-3), (1.8e-4, 1.2e-3), (9e-5, 6e-4)),
        ),
    ),
    {TAUGHT: TEACHING[TAUGHT]},
)
LONGEST = replace(
    LONG,
    about="Arm by arm over 20 M tokens, 65,536 a step, at 50 % of the parameters, each at the rate that was its best "
    "over 2 M tokens (quality-long). The corpus of 4.6 M tokens is repeated.",
    settings={**LONG.settings, "max_steps": 320, "warmup_steps": 10, "eval_steps": 20, "save_steps": 320},
)


def at(budget: Budget, rates: dict[str, dict[str, float]]) -> Budget:
    """The budget with one rate for each arm, by its name."""
    return replace(budget, arms=tuple(replace(arm, rates=(rates[arm.name],)) for arm in budget.arms))


def trials(budget: Budget, arm: Arm) -> list[Job]:
    """The runs that the best rate is found by."""
    return [Job(arm.name, _values(budget, arm.settings, rates)) for rates in arm.rates]


def variants(budget: Budget, rates: dict[str, float]) -> Iterator[Job]:
    """Our recipe's variations, at the rates that were found for it."""
    for name, changes in budget.variations.items():
        yield varied(budget, rates, name, changes)


def repetitions(budget: Budget, arm: Arm, rates: dict[str, float]) -> Iterator[Job]:
    """With further seeds, and at further sizes, at the rates that were found."""
    for seed in budget.seeds:
        yield seeded(budget, arm, rates, seed)
    for share in budget.sizes:
        yield sized(budget, arm, rates, share)


def seeded(budget: Budget, arm: Arm, rates: dict[str, float], seed: int) -> Job:
    return Job(f"{arm.name}, seed {seed}", _values(budget, arm.settings, rates) | {"seed": seed})


def sized(budget: Budget, arm: Arm, rates: dict[str, float], share: str) -> Job:
    return Job(f"{arm.name}, {share}", _values(budget, arm.settings, rates) | budget.sizes[share])


def varied(budget: Budget, rates: dict[str, float], name: str, changes: dict[str, Any]) -> Job:
    return Job(f"our recipe, {name}", _values(budget, budget.ours.settings, rates) | changes)


def _values(budget: Budget, settings: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    return {**SHARED, **budget.settings, **settings, **rates, **SMOLLM2_HALF, "seed": 0, "keep_checkpoints": 1}
