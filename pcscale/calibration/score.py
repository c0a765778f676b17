"""Importance scores that need no text: weight magnitude, and random ones to compare with.

Scores are one float32 vector for each set of kept indices: `residual` for the whole model, `ffn.<layer>` for a layer.
"""

from collections.abc import Callable

import torch

from pcscale.families.axes import PROJECTED_AXES
from pcscale.families.plan import Plan, kept_name

Scores = dict[str, torch.Tensor]
ReadTensor = Callable[[str], torch.Tensor]


def magnitude_scores(plan: Plan, read: ReadTensor) -> Scores:
    """Sums of the absolute weights that touch a channel, over every matrix that has its axis."""
    scores = {name: torch.zeros(size) for name, size, _ in plan.kept_axes()}
    for planned in plan.matrices:
        axes = planned.weight.axes
        for dim, axis in enumerate(axes):
            if axis in PROJECTED_AXES:
                touching = torch.linalg.vector_norm(read(planned.name), ord=1, dim=1 - dim, dtype=torch.float32)
                scores[kept_name(axis, planned.weight.layer)] += touching
    return scores


def random_scores(plan: Plan, seed: int) -> Scores:
    """Independent uniform scores, a pure function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(size, generator=generator) for name, size, _ in plan.kept_axes()}
