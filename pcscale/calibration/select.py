"""The choice of kept indices by scores."""

import torch

from pcscale.calibration.score import Scores
from pcscale.common.errors import RequestError
from pcscale.families.plan import Plan

KeptIndices = dict[str, torch.Tensor]
"""Sorted int64 indices by name: `residual` for the whole model, `ffn.<layer>` for a layer."""


def select(plan: Plan, scores: Scores) -> KeptIndices:
    """The indices with the highest scores, in ascending order; of equal scores the lower index is kept.

    Raises:
        RequestError: the scores come from another model.
    """
    kept: KeptIndices = {}
    for name, base_size, size in plan.kept_axes():
        score = scores.get(name)
        if score is None or tuple(score.shape) != (base_size,):
            found = "absent" if score is None else f"of shape {list(score.shape)}"
            raise RequestError(f"scores '{name}' are {found}, this base needs [{base_size}]. Calibrate on this base.")
        if not bool(torch.isfinite(score).all()):
            raise RequestError(f"scores '{name}' are not finite. Calibrate again.")
        kept[name] = torch.sort(score, descending=True, stable=True).indices[:size].sort().values
    return kept
