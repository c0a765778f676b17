"""The projection state of one matrix: its trainable values with their moments, as views of one block of bytes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pcscale.families.axes import PROJECTED_AXES
from pcscale.families.plan import PlannedWeight, kept_name
from pcscale.projection.algebra import Projection, Side
from pcscale.projection.layout import ABSMAX, AUX, AUX_START, DELTA_IN, DELTA_OUT, MOMENTS, TensorSpec
from pcscale.storage.blockwise import Blockwise
from pcscale.storage.reader import TORCH_DTYPES

Moment = torch.Tensor | Blockwise
FixedTensors = dict[str, torch.Tensor]
"""The parts of S, for all matrices: kept indices by axis and layer (`residual`, `ffn.<layer>`), and of a rotated
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


@dataclass
class MatrixRecord:
    """Everything that training adds to one matrix.

    Attributes:
        fixed: on the device of the products.
        parts: by name, as in `layout.value_shapes`: D of each projected side, or its factors, and `aux`.
        aux_start: where aux began, for weight decay; None: at zero, or there is no decay.
    """

    planned: PlannedWeight
    fixed: FixedTensors
    parts: dict[str, Trained]
    aux_start: torch.Tensor | None = None

    @classmethod
    def of(cls, planned: PlannedWeight, fixed: FixedTensors, tensors: dict[str, torch.Tensor]) -> "MatrixRecord":
        """The record whose tensors these are, by the names that they have on disk."""
        parts = {
            name: Trained(tensors[name], *(_moment(tensors, f"{name}.{moment}") for moment in MOMENTS))
            for name in (*DELTA_OUT, *DELTA_IN, AUX)
            if name in tensors
        }
        return cls(planned, fixed, parts, tensors.get(AUX_START))

    def projection(self, dtype: torch.dtype = torch.float32) -> Projection:
        """The projection in the dtype of the products: views where the record is kept so.

        aux stays as it is kept: it is added to a product, not multiplied.
        """
        return projection_of(self.planned, self.fixed, {name: part.value for name, part in self.parts.items()}, dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names that a record file uses: `delta_in`, `delta_in.exp_avg`, …"""
        tensors = dict(pair for name, part in self.parts.items() for pair in part.tensors(name))
        return tensors if self.aux_start is None else tensors | {AUX_START: self.aux_start}


def projection_of(
    planned: PlannedWeight, fixed: FixedTensors, values: dict[str, torch.Tensor], dtype: torch.dtype | None = None
) -> Projection:
    """A matrix's projection from its trainable values by name.

    Args:
        dtype: of the factors and of a dense S; None: factors as they are, S float32.
    """
    sides = []
    for dim, names in enumerate((DELTA_OUT, DELTA_IN)):
        start = start_of(planned, fixed, dim, dtype or torch.float32)
        factors = tuple(values[name] if dtype is None else values[name].to(dtype) for name in names if name in values)
        sides.append(None if start is None else Side(start, factors))
    return Projection(sides[0], sides[1], values[AUX])


def start_of(
    planned: PlannedWeight, fixed: FixedTensors, dim: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor | None:
    """S of one dim of a weight, as `algebra.Side` takes it; None: the weight keeps its size there.

    Returns:
        `[o]` or `[i]` int64, selected entries; or dense, in `dtype`: `[o, O]` for dim 0, `[I, i]` for dim 1.
    """
    axis = planned.weight.axes[dim]
    if axis not in PROJECTED_AXES:
        return None
    name = kept_name(axis, planned.weight.layer)
    basis = fixed.get(basis_name(name))
    if basis is None:
        return None if planned.shape[dim] == planned.base_shape[dim] else fixed[name]
    if dim == 0:
        return basis.T.to(dtype)
    # A norm is folded into what reads it.
    scale = None if planned.weight.reads is None else fixed.get(scale_name(planned.weight.reads))
    return (basis if scale is None else basis * scale[:, None]).to(dtype)


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
