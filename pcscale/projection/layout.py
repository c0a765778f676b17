"""The layout of a record: the names, dtypes and shapes of its tensors, in the order that they lie in. Needs no torch.

A record is one block of bytes, the data of a safetensors file, so that it moves in one copy and is written as it is.

Legend: O, I base sizes of the out and in side; o, i compressed sizes; r the rank of D.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pcscale.common.errors import RequestError
from pcscale.common.sizes import QUANTISED_BLOCK
from pcscale.common.units import aligned
from pcscale.config.schema import PlanConfig
from pcscale.families.plan import PlannedWeight
from pcscale.storage.index import ITEM_BYTES

MOMENTS = ("exp_avg", "exp_avg_sq")
ABSMAX = "absmax"
AUX = "aux"
AUX_START = "aux_start"
DELTA_OUT, DELTA_IN = ("delta_out", "delta_out_u", "delta_out_v"), ("delta_in", "delta_in_u", "delta_in_v")
"""The trainable values of a projection: D whole, or its factors U (on the base's axis) and V (on the other)."""
MIN_8BIT_VALUES = 4096
"""Tensors with fewer keep moments in 32 bits, as bitsandbytes documents of its `min_8bit_size`."""
ROW_BLOCK = 4096
"""Rows that a matrix whose out side keeps its size is visited in; a multiple of the 256 that 8-bit codes come in."""
AHEAD = 7
"""Matrices that are read ahead of the one that is worked on, as far as buffers have room: about a layer. Small ones
are done before a large one could be read beside them."""
_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class RecordFormat:
    """The precision and form of records, as in `State`.

    Attributes:
        aux_start: whether a record keeps where aux began: with weight decay and a start of aux that is not zero.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    moments: Literal["32bit", "8bit"] = "32bit"
    rank: int | None = None
    aux_start: bool = False


def record_format(config: PlanConfig) -> RecordFormat:
    """The format that a run keeps its records in."""
    aux_start = config.weight_decay > 0 and (config.base_precision == "int8" or config.rebuilds)
    return RecordFormat(config.record_dtype, config.moments, config.rank, aux_start)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a record, its dtype in the safetensors format's spelling."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


def value_shapes(planned: PlannedWeight, rank: int | None = None) -> dict[str, tuple[int, ...]]:
    """The trainable values of one matrix by name."""
    (O, I), (o, i) = planned.base_shape, planned.shape
    shapes: dict[str, tuple[int, ...]] = {}
    if planned.projects_out:
        shapes |= {DELTA_OUT[0]: (o, O)} if rank is None else {DELTA_OUT[1]: (rank, O), DELTA_OUT[2]: (o, rank)}
    if planned.projects_in:
        shapes |= {DELTA_IN[0]: (I, i)} if rank is None else {DELTA_IN[1]: (I, rank), DELTA_IN[2]: (rank, i)}
    shapes[AUX] = planned.shape
    return shapes


def record_layout(planned: PlannedWeight, form: RecordFormat) -> dict[str, TensorSpec]:
    """Every tensor of a record: wide dtypes first, so that each begins at a multiple of its item's size."""
    layout: dict[str, TensorSpec] = {}
    for name, shape in value_shapes(planned, form.rank).items():
        layout[name], count = TensorSpec(_DTYPES[form.dtype], shape), math.prod(shape)
        coded = form.moments == "8bit" and count >= MIN_8BIT_VALUES
        for moment in MOMENTS:
            layout[f"{name}.{moment}"] = TensorSpec("U8" if coded else "F32", shape)
            if coded:
                layout[f"{name}.{moment}.{ABSMAX}"] = TensorSpec("F32", (-(-count // QUANTISED_BLOCK),))
    if form.aux_start:
        layout[AUX_START] = TensorSpec(_DTYPES[form.dtype], planned.shape)
    return dict(sorted(layout.items(), key=lambda item: -ITEM_BYTES[item[1].dtype]))


def record_bytes(planned: PlannedWeight, form: RecordFormat) -> int:
    return sum(spec.num_bytes for spec in record_layout(planned, form).values())


def row_blocks(planned: PlannedWeight) -> Iterator[slice]:
    """The base's rows that a visit works on at a time: all where the out side is projected, else block by block."""
    rows = planned.base_shape[0]
    block = rows if planned.projects_out else ROW_BLOCK
    return (slice(start, min(start + block, rows)) for start in range(0, rows, block))


def trainable_values(planned: PlannedWeight, rank: int | None = None) -> int:
    """Values that training changes: those of the record; the entries of a norm or bias."""
    if not planned.is_matrix:
        return math.prod(planned.shape)
    return sum(math.prod(shape) for shape in value_shapes(planned, rank).values())


def check_rank(matrices: Iterable[PlannedWeight], rank: int | None) -> None:
    """Refuse a rank at which the factors of some D hold more values than D itself."""
    limits = [
        math.ceil(big * small / (big + small)) - 1
        for planned in matrices
        for big, small in zip(planned.base_shape, planned.shape, strict=True)
        if big != small
    ]
    if rank is not None and rank > min(limits, default=rank):
        raise RequestError(
            f"projection_rank {rank} saves nothing: the factors of a D would hold more values than D. "
            f"Give at most {min(limits)}, or full."
        )


def overlap_bytes(sizes: list[int]) -> int:
    """The least size of buffers in which motion overlaps with work: one record comes, one is worked on, one goes."""
    return max((sum(map(aligned, sizes[first : first + 3])) for first in range(len(sizes))), default=0)
