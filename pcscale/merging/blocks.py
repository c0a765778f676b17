"""One compressed weight from mapped files, in blocks: anonymous memory does not grow with the matrix's area.

Blocks are a pure function of shapes, so every memory cap and shard size gives the same bytes.

Legend: O, I base sizes of the out and in side; o, i compressed sizes; b a block of rows or columns.
"""

from collections.abc import Iterator

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
    compose = _out_side_first if out_side_first(weight.shape, (o, i), projection.rank) else _in_side_first
    compose(out_oi, weight, projection, workspace or Workspace())


def _in_side_first(out_oi: torch.Tensor, weight: FrozenWeight, p: Projection, space: Workspace) -> None:
    O, I = weight.shape
    for columns in blocks(out_oi.shape[1]):
        width = columns.stop - columns.start
        D_Ib = None if p.in_ is None else _factor(p.in_, 1, columns, space.take("in", I, width), space)
        X_Ob = None if p.out is None else space.take("out", O, width)
        for rows in blocks(O):
            height = rows.stop - rows.start
            x_bb = space.take("result", height, width) if X_Ob is None else X_Ob[rows]
            if D_Ib is None or p.in_ is None:
                weight.copy_block(x_bb, rows, columns)
            else:
                W_bI = weight.copy_block(space.take("base", height, I), rows)
                _multiply(x_bb, W_bI, D_Ib, p.in_, 1, columns)
            if X_Ob is None:
                out_oi[rows, columns] = x_bb.add_(p.aux[rows, columns])
        if X_Ob is None or p.out is None:
            continue
        for rows in blocks(len(out_oi)):
            height = rows.stop - rows.start
            w_bb = space.take("result", height, width)
            D_bO = _factor(p.out, 0, rows, space.take("base", height, O), space)
            _multiply(w_bb, X_Ob, D_bO, p.out, 0, rows)
            out_oi[rows, columns] = w_bb.add_(p.aux[rows, columns])


def _out_side_first(out_oi: torch.Tensor, weight: FrozenWeight, p: Projection, space: Workspace) -> None:
    assert p.out is not None
    O, I = weight.shape
    for rows in blocks(len(out_oi)):
        height = rows.stop - rows.start
        D_bO = _factor(p.out, 0, rows, space.take("out", height, O), space)
        Z_bI = None if p.in_ is None else space.take("in", height, I)
        for columns in blocks(I):
            width = columns.stop - columns.start
            z_bb = space.take("result", height, width) if Z_bI is None else Z_bI[:, columns]
            W_Ob = weight.copy_block(space.take("base", O, width), slice(0, O), columns)
            _multiply(z_bb, W_Ob, D_bO, p.out, 0, rows)
            if Z_bI is None:
                out_oi[rows, columns] = z_bb.add_(p.aux[rows, columns])
        if Z_bI is None or p.in_ is None:
            continue
        for columns in blocks(out_oi.shape[1]):
            width = columns.stop - columns.start
            w_bb = space.take("result", height, width)
            D_Ib = _factor(p.in_, 1, columns, space.take("base", I, width), space)
            _multiply(w_bb, Z_bI, D_Ib, p.in_, 1, columns)
            out_oi[rows, columns] = w_bb.add_(p.aux[rows, columns])


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
