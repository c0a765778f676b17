"""The projection state of one matrix: its trainable values with their moments, as views of one block of bytes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pcscale.families.axes import PROJECTED_AXES
from pcscale.families.plan import PlannedWeight, kept_name
from pcscale.projection.algebra import Projection, Side
from pcscale.projection.layout import (
    ABSMAX,
    AUX,
    AUX_START,
    DELTA_IN,
    DELTA_OUT,
    MOMENTS,
    TensorSpec,
)
from pcscale.storage.blockwise import Blockwise
from pcscale.storage.reader import TORCH_DTYPES

Moment = torch.Tensor | Blockwise
FixedTensors = dict[str, torch.Tensor]
"""What S is made of, for all matrices: kept indices by axis and layer (`residual`, `ffn.<layer>`), and of a rotated
axis its basis and the scales that norms give it."""


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
class FixedSide:
    """S of one side of one matrix, on the device of its products, in what it is made of.

    Attributes:
        kept: `[o]` or `[i]` int64, what S selects of the base's axis.
        basis: `[big, small]` float32, of which S is made instead, for all matrices on that axis; None: S selects.
        scale: `[big]` float32, what each row of the basis is multiplied with; None: nothing.
    """

    kept: torch.Tensor
    basis: torch.Tensor | None = None
    scale: torch.Tensor | None = None

    def start(self, dtype: torch.dtype, dim: int) -> torch.Tensor:
        """S as `algebra.Side` takes it; a dense one is newly allocated, `[o, O]` for dim 0 and `[I, i]` for dim 1."""
        if self.basis is None:
            return self.kept
        whole = self.basis if self.scale is None else self.basis * self.scale[:, None]
        return (whole.T if dim == 0 else whole).to(dtype)


@dataclass(frozen=True)
class FixedSides:
    """S of both sides of a matrix, or of a vector's one; None: a side keeps its size."""

    out: FixedSide | None
    in_: FixedSide | None = None

    @classmethod
    def of(cls, planned: PlannedWeight, fixed: FixedTensors) -> "FixedSides":
        sides: list[FixedSide | None] = []
        for axis, base_size, size in zip(planned.weight.axes, planned.base_shape, planned.shape, strict=True):
            name = kept_name(axis, planned.weight.layer) if axis in PROJECTED_AXES else None
            if name is None or (size == base_size and basis_name(name) not in fixed):
                sides.append(None)
                continue
            # A norm is folded into what reads it, on the in side.
            reads = planned.weight.reads if len(sides) == 1 else None
            scale = None if reads is None else fixed.get(scale_name(reads))
            sides.append(FixedSide(fixed[name], fixed.get(basis_name(name)), scale))
        return cls(*sides)


@dataclass
class MatrixRecord:
    """Everything that training adds to one matrix.

    Attributes:
        parts: by name, as in `layout.value_shapes`: D of each projected side, or its factors, and `aux`.
        aux_start: where aux began, for weight decay; None: at zero, or there is no decay.
    """

    fixed: FixedSides
    parts: dict[str, Trained]
    aux_start: torch.Tensor | None = None

    @classmethod
    def of(cls, fixed: FixedSides, tensors: dict[str, torch.Tensor]) -> "MatrixRecord":
        """The record whose tensors these are, by the names that they have on disk."""
        parts = {
            name: Trained(tensors[name], *(_moment(tensors, f"{name}.{moment}") for moment in MOMENTS))
            for name in (*DELTA_OUT, *DELTA_IN, AUX)
            if name in tensors
        }
        return cls(fixed, parts, tensors.get(AUX_START))

    def projection(self, dtype: torch.dtype = torch.float32) -> Projection:
        """The projection in the dtype of the products: views where the record is kept so.

        aux stays as it is kept: it is added to a product, not multiplied.
        """
        return projection_of(self.fixed, {name: part.value for name, part in self.parts.items()}, dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names that a record file uses: `delta_in`, `delta_in.exp_avg`, …"""
        tensors = dict(pair for name, part in self.parts.items() for pair in part.tensors(name))
        return tensors if self.aux_start is None else tensors | {AUX_START: self.aux_start}


def projection_of(fixed: FixedSides, values: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> Projection:
    """A matrix's projection from its trainable values by name.

    Args:
        dtype: of the factors and of a dense S; None: factors as they are.
    """
    sides = []
    for dim, (side, names) in enumerate(((fixed.out, DELTA_OUT), (fixed.in_, DELTA_IN))):
        factors = tuple(values[name] if dtype is None else values[name].to(dtype) for name in names if name in values)
        sides.append(None if side is None else Side(side.start(dtype or torch.float32, dim), factors))
    return Projection(sides[0], sides[1], values[AUX])


def basis_name(axis: str) -> str:
    """The name of an axis's basis among the fixed tensors: `[big, small]` float32."""
    return f"{axis}.basis"


def scale_name(norm: str) -> str:
    """The name of what the rows of the basis are multiplied with in what reads this norm: `[big]` float32."""
    return f"scale.{norm}"


def views_of(buffer: torch.Tensor, layout: dict[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """The tensors of a record as views of its bytes."""
    tensors, start = {}, 0
    for name, spec in layout.items():
        tensors[name] = buffer[start : start + spec.num_bytes].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
        start += spec.num_bytes
    return tensors


def _moment(tensors: dict[str, torch.Tensor], name: str) -> Moment:
    absmax = tensors.get(f"{name}.{ABSMAX}")
    return tensors[name] if absmax is None else Blockwise(tensors[name], absmax, signed=name.endswith(MOMENTS[0]))
