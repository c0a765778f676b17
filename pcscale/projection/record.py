"""The projection state of one matrix: D_out, D_in, aux and their moments, with its form on disk."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pcscale.families.axes import PROJECTED_AXES
from pcscale.families.plan import PlannedWeight, kept_name
from pcscale.importance.select import KeptIndices
from pcscale.projection.algebra import Projection

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Trained:
    """A trainable value with its AdamW moments, all of one shape."""

    value: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor

    @classmethod
    def starting_at(cls, value: torch.Tensor) -> "Trained":
        return cls(value, torch.zeros_like(value), torch.zeros_like(value))

    def tensors(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The parts under the names that they have on disk."""
        yield name, self.value
        for moment in MOMENTS:
            yield f"{name}.{moment}", getattr(self, moment)


@dataclass
class MatrixRecord:
    """Everything that training adds to one matrix.

    Memory: three times 4 bytes a trainable value.
    """

    kept_out: torch.Tensor | None  # None: this side keeps its size
    kept_in: torch.Tensor | None
    parts: dict[str, Trained]
    """`delta_out` and `delta_in` where their side is projected, `aux` always."""

    @classmethod
    def fresh(cls, planned: PlannedWeight, kept: KeptIndices, device: torch.device) -> "MatrixRecord":
        """The state at the start: every D and aux zero."""
        shapes = record_shapes(planned)
        parts = {name: Trained.starting_at(torch.zeros(shape, device=device)) for name, shape in shapes.items()}
        record = cls(None, None, parts)
        record.keep(planned, kept)
        return record

    def keep(self, planned: PlannedWeight, kept: KeptIndices) -> None:
        """Select these channels of the base weight from now on."""
        device = self.parts["aux"].value.device
        self.kept_out, self.kept_in = (_on(indices, device) for indices in kept_sides(planned, kept))

    @property
    def projection(self) -> Projection:
        values = {name: part.value for name, part in self.parts.items()}
        return Projection(self.kept_out, values.get("delta_out"), self.kept_in, values.get("delta_in"), values["aux"])

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names that a record file uses: `delta_in`, `delta_in.exp_avg`, …"""
        return dict(pair for name, part in self.parts.items() for pair in part.tensors(name))


def record_shapes(planned: PlannedWeight) -> dict[str, tuple[int, ...]]:
    """The trainable values of one matrix: names and shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    if planned.projects_out:
        shapes["delta_out"] = (planned.shape[0], planned.base_shape[0])
    if planned.projects_in:
        shapes["delta_in"] = (planned.base_shape[1], planned.shape[1])
    shapes["aux"] = planned.shape
    return shapes


def kept_sides(planned: PlannedWeight, kept: KeptIndices) -> tuple[torch.Tensor | None, ...]:
    """The kept indices of each dim of a weight; None where it keeps its size."""
    return tuple(
        kept[kept_name(axis, planned.weight.layer)] if axis in PROJECTED_AXES and size != base_size else None
        for axis, base_size, size in zip(planned.weight.axes, planned.base_shape, planned.shape, strict=True)
    )


def _on(indices: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    # A copy on the host as well: `keep` alone decides what a record selects.
    return None if indices is None else indices.to(device, copy=True)
