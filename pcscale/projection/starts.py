"""Starts: the compressed model before the first step."""

import torch

from pcscale.families.plan import Plan
from pcscale.importance.score import ReadTensor
from pcscale.importance.select import KeptIndices
from pcscale.projection.record import kept_sides


def selection_start(plan: Plan, kept: KeptIndices, read: ReadTensor) -> dict[str, torch.Tensor]:
    """The hard-pruned model: of every base weight the kept rows and columns, by name, in the stored dtype.

    Source: method as published (0/1 selection matrices, aux = 0).
    """
    tensors: dict[str, torch.Tensor] = {}
    for planned in plan.weights:
        tensor = read(planned.name)
        for dim, indices in enumerate(kept_sides(planned, kept)):
            if indices is not None:
                tensor = tensor.index_select(dim, indices)
        tensors[planned.name] = tensor
    return tensors
