"""One compressed weight from mapped files, in blocks: anonymous memory does not grow with the matrix's area.

Blocks are a pure function of shapes, so every memory cap and shard size gives the same bytes.

Legend: O, I base sizes of the out and in side; o, i compressed sizes; b a block of rows or columns.
"""

from collections.abc import Iterator
from typing import Any

import torch

from pcscale.base.weight import FrozenWeight
from pcscale.common.sizes import MERGE_BLOCK
from pcscale.projection.algebra import Projection, Side
from pcscale.projection.costs import out_side_first


def blocks(size: int) -> Iterator[slice]:
    """Slices that cut rows or columns into blocks."""
    return (slice(start, min(start + MERGE_BLOCK, size)) for start in range(0, size, MERGE_BLOCK))


class Workspace:
    """Float32 buffers that are used again from block to block: fresh memory costs more than writing into it."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """A buffer `[rows, columns]`, uninitialised, in the memory that `name` had before."""
        if self._buffers.get(name, torch.empty(0)).numel() < rows * columns:
            self._buffers.pop(name, None)  # Let go before taking more.
            self._buffers[name] = torch.empty(rows * columns)
        return self._buffers[name][: rows * columns].view(rows, columns)

    def load(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """A float32 copy of `values`."""
        return self.take(name, *values.shape).copy_(values)


def compose_into(
    out_oi: torch.Tensor, weight: FrozenWeight, projection: Projection, workspace: Workspace | None = None
) -> None:
    """Write the compressed weight into `out_oi`, rounded to its dtype; products are float32.

    All tensors are most often mapped files. A workspace is used again for the next matrix.
    """
    o, i = out_oi.shape
    space, base = workspace or Workspace(), weight.shape
    first = 0 if out_side_first(base, (o, i), projection.rank) else 1
    then, names, sides = 1 - first, ("out", "in"), (projection.out, projection.in_)
    side, other = sides[first], sides[then]

    def pair(one: Any, two: Any) -> tuple[Any, Any]:
        """A shape or an index with `one` at the dim whose side is multiplied first."""
        return (one, two) if first == 0 else (two, one)

    for block in blocks(out_oi.shape[first]):
        size, factor = block.stop - block.start, None
        if side is not None:
            factor = _factor(side, first, block, space.take(names[first], *pair(size, base[first])), space)
        half = None if other is None else space.take(names[then], *pair(size, base[then]))
        for part in blocks(base[then]):
            length, index = part.stop - part.start, pair(block, part)
            result = space.take("result", *pair(size, length)) if half is None else half[pair(slice(None), part)]
            if side is None or factor is None:
                weight.copy_block(result, *index)
            else:
                W = weight.copy_block(space.take("base", *pair(base[first], length)), *pair(slice(None), part))
                _multiply(result, W, factor, side, first, block)
            if half is None:
                out_oi[index] = result.add_(projection.aux[index])
        if half is None or other is None:
            continue
        for part in blocks(out_oi.shape[then]):
            length, index = part.stop - part.start, pair(block, part)
            result = space.take("result", *pair(size, length))
            factor = _factor(other, then, part, space.take("base", *pair(base[then], length)), space)
            _multiply(result, half, factor, other, then, part)
            out_oi[index] = result.add_(projection.aux[index])


def _factor(side: Side, dim: int, block: slice, result: torch.Tensor, space: Workspace) -> torch.Tensor:
    """Form rows (dim 0) or columns (dim 1) of a side's D, plus S where that is dense, in float32."""
    index = (slice(None),) * dim + (block,)
    if len(side.factors) == 1:
        result.copy_(side.factors[0][index])
    else:
        U, V = space.load("u", side.factors[0]), space.load("v", side.factors[1][index])
        torch.mm(*((V, U) if dim == 0 else (U, V)), out=result)
    return result if side.selects else result.add_(side.start[index])


def _multiply(result: torch.Tensor, X: torch.Tensor, factor: torch.Tensor, side: Side, dim: int, block: slice) -> None:
    """Compute `result = factor @ X` (dim 0) or `X @ factor` (dim 1) in place, plus X's kept entries where S selects."""
    left, right = (factor, X) if dim == 0 else (X, factor)
    if side.selects:
        torch.addmm(X.index_select(dim, side.start[block]), left, right, out=result)
    else:
        torch.mm(left, right, out=result)
