"""The projection state of one matrix: its trainable values with their moments, as views of one block of bytes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pcscale.families.axes import PROJECTED_AXES
from pcscale.families.plan import PlannedWeight, kept_name
from pcscale.importance.select import KeptIndices
from pcscale.projection.algebra import Projection, Side
from pcscale.projection.layout import (
    ABSMAX,
    AUX,
    AUX_START,
    DELTA_IN,
    DELTA_OUT,
    MOMENTS,
    QUANTISED_BLOCK,
    TensorSpec,
)
from pcscale.storage.blockwise import BLOCK, Blockwise
from pcscale.storage.reader import TORCH_DTYPES

Moment = torch.Tensor | Blockwise

assert QUANTISED_BLOCK == BLOCK


@dataclass
class Trained:
    """A trainable value with its AdamW moments, all of one shape."""

    value: torch.Tensor
    exp_avg: Moment
    exp_avg_sq: Moment

    @classmethod
    def starting_at(cls, value: torch.Tensor) -> "Trained":
        return cls(value, torch.zeros_like(value), torch.zeros_like(value))

    def tensors(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The parts under the names that they have on disk."""
        yield name, self.value
        for moment in MOMENTS:
            stored = getattr(self, moment)
            if isinstance(stored, Blockwise):
                yield f"{name}.{moment}", stored.codes
                yield f"{name}.{moment}.{ABSMAX}", stored.absmax
            else:
                yield f"{name}.{moment}", stored


@dataclass(frozen=True)
class Kept:
    """The kept indices of the two sides of one matrix, on the device of its products; None: a side keeps its size."""

    out: torch.Tensor | None
    in_: torch.Tensor | None

    @classmethod
    def of(cls, planned: PlannedWeight, kept: KeptIndices, device: torch.device) -> "Kept":
        sides = kept_sides(planned, kept)
        return cls(*(None if indices is None else indices.to(device) for indices in sides))


@dataclass
class MatrixRecord:
    """Everything that training adds to one matrix.

    Attributes:
        parts: by name, as in `layout.value_shapes`: D of each projected side, or its factors, and `aux`.
        aux_start: where aux began, for weight decay; None: at zero, or there is no decay.
    """

    kept: Kept
    parts: dict[str, Trained]
    aux_start: torch.Tensor | None = None

    @classmethod
    def of(cls, kept: Kept, tensors: dict[str, torch.Tensor]) -> "MatrixRecord":
        """The record whose tensors these are, by the names that they have on disk."""
        parts = {
            name: Trained(tensors[name], *(_moment(tensors, f"{name}.{moment}") for moment in MOMENTS))
            for name in (*DELTA_OUT, *DELTA_IN, AUX)
            if name in tensors
        }
        return cls(kept, parts, tensors.get(AUX_START))

    def projection(self, dtype: torch.dtype = torch.float32) -> Projection:
        """The projection in the dtype of the products: views where the record is kept so.

        aux stays as it is kept: it is added to a product, not multiplied.
        """
        return projection_of(self.kept, {name: part.value for name, part in self.parts.items()}, dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names that a record file uses: `delta_in`, `delta_in.exp_avg`, …"""
        tensors = dict(pair for name, part in self.parts.items() for pair in part.tensors(name))
        return tensors if self.aux_start is None else tensors | {AUX_START: self.aux_start}


def projection_of(kept: Kept, values: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> Projection:
    """A matrix's projection from its trainable values by name.

    Args:
        dtype: of the factors; None: as they are.
    """
    sides = []
    for indices, names in ((kept.out, DELTA_OUT), (kept.in_, DELTA_IN)):
        factors = tuple(values[name] if dtype is None else values[name].to(dtype) for name in names if name in values)
        sides.append(None if indices is None else Side(indices, factors))
    return Projection(sides[0], sides[1], values[AUX])


def views_of(buffer: torch.Tensor, layout: dict[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """The tensors of a record as views of its bytes."""
    tensors, start = {}, 0
    for name, spec in layout.items():
        tensors[name] = buffer[start : start + spec.num_bytes].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
        start += spec.num_bytes
    return tensors


def kept_sides(planned: PlannedWeight, kept: KeptIndices) -> tuple[torch.Tensor | None, ...]:
    """The kept indices of each dim of a weight; None where it keeps its size."""
    return tuple(
        kept[kept_name(axis, planned.weight.layer)] if axis in PROJECTED_AXES and size != base_size else None
        for axis, base_size, size in zip(planned.weight.axes, planned.base_shape, planned.shape, strict=True)
    )


def _moment(tensors: dict[str, torch.Tensor], name: str) -> Moment:
    absmax = tensors.get(f"{name}.{ABSMAX}")
    return tensors[name] if absmax is None else Blockwise(tensors[name], absmax, signed=name.endswith(MOMENTS[0]))
