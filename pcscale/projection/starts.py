"""Starts: the compressed model before the first step."""

import torch

from pcscale.families.plan import Plan, PlannedWeight
from pcscale.importance.score import ReadTensor
from pcscale.importance.select import KeptIndices
from pcscale.projection.layout import AUX, AUX_START, DELTA_IN, DELTA_OUT, RecordFormat, value_shapes
from pcscale.projection.record import kept_sides
from pcscale.projection.rounding import NoiseKey


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


def start_values(
    planned: PlannedWeight, form: RecordFormat, lost: torch.Tensor | None, key: NoiseKey
) -> dict[str, torch.Tensor]:
    """What is not zero in a record at the start, by name; the composed weight is that of `selection_start`.

    Args:
        lost: `[o, i]`, what the precision of the base loses of the kept entries (method, section 3.3); None: nothing.
        key: of the random U of a low rank.

    D of low rank is U V with V zero. U is normal with variance 1 / rank: an entry of D then moves by about the learning
    rate in a step of Adam, as it does when D is whole.
    """
    generator = torch.Generator().manual_seed(key)
    values = {
        name: torch.randn(shape, generator=generator) * (form.rank or 1) ** -0.5
        for name, shape in value_shapes(planned, form.rank).items()
        if name in (DELTA_OUT[1], DELTA_IN[1])
    }
    if lost is not None:
        values[AUX] = lost
        if form.aux_start:
            values[AUX_START] = lost
    return values
