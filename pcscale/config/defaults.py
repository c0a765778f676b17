"""Defaults that run.yaml and `ProjectedAdamW` share, each typed once (docs/recipe.md has what they rest on)."""

from decimal import Decimal

LEARNING_RATE = 1e-4
"""Peak rate of the projections."""
HARD_PRUNE_LEARNING_RATE = 3e-4
"""Peak rate of everything that hard pruning trains."""
AUX_RATIO = 3
"""Rate of aux, norms and biases over the rate of the projections."""
PROJECTION_RATES = "per_matrix"
BETAS = (0.9, 0.95)
EPSILON = 1e-8
WEIGHT_DECAY = 0.0
START = "pca_least_squares"
IMPORTANCE = "energy"
CALIBRATION_TOKENS = 262_144
SEQUENCE_LENGTH = 512
BATCH_SIZE = 4
EVAL_TOKENS = 65_536


def learning_rate(method: str) -> float:
    """The peak rate of a method, `projected` or `hard_prune`."""
    return LEARNING_RATE if method == "projected" else HARD_PRUNE_LEARNING_RATE


def aux_learning_rate(method: str, rate: float) -> float:
    """The peak rate of aux, norms and biases beside a rate of the projections; with hard_prune it is the same."""
    if method != "projected":
        return rate
    return float(AUX_RATIO * Decimal(str(rate)))  # 3e-4 is what people read in run.yaml.
