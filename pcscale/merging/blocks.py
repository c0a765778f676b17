"""One compressed weight from mapped files, in blocks: what is anonymous memory does not grow with the matrix's area.

Blocks are a pure function of shapes, so every memory cap and shard size gives the same bytes.

Legend: O, I base sizes of the out and in side; o, i compressed sizes; b a block of rows or columns.
"""

from collections.abc import Iterator

import torch

from pcscale.base.weight import FrozenWeight
from pcscale.families.costs import out_side_first
from pcscale.memory.working import MERGE_BLOCK
from pcscale.projection.algebra import Projection, Side


def blocks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + MERGE_BLOCK, size)) for start in range(0, size, MERGE_BLOCK))


class Workspace:
    """Float32 buffers that are used again from block to block: fresh memory costs more than what is written into it."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """`[rows, columns]`, uninitialised, in the memory that `name` had before."""
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
    """Write the compressed weight into `out_oi`, rounded to its dtype.

    Args:
        out_oi: `[o, i]`, most often a mapped file that is being written.
        weight: the base weight, most often mapped.
        projection: in the records' dtype, most often mapped. Products are float32.
        workspace: used again from matrix to matrix; None: one for this matrix.
    """
    o, i = out_oi.shape
    compose = _out_side_first if out_side_first(weight.shape, (o, i), projection.rank) else _in_side_first
    compose(out_oi, weight, projection, workspace or Workspace())


def _in_side_first(out_oi: torch.Tensor, weight: FrozenWeight, p: Projection, space: Workspace) -> None:
    O, I = weight.shape
    for columns in blocks(out_oi.shape[1]):
        width = columns.stop - columns.start
        D_Ib = None if p.in_ is None else _delta_in(p.in_, columns, space.take("in", I, width), space)
        X_Ob = None if p.out is None else space.take("out", O, width)
        for rows in blocks(O):
            height = rows.stop - rows.start
            x_bb = space.take("result", height, width) if X_Ob is None else X_Ob[rows]
            if D_Ib is None or p.in_ is None:
                weight.copy_block(x_bb, rows, columns)
            else:
                W_bI = weight.copy_block(space.take("base", height, I), rows)
                _multiply_add(x_bb, W_bI.index_select(1, p.in_.kept[columns]), W_bI, D_Ib)
            if X_Ob is None:
                out_oi[rows, columns] = x_bb.add_(p.aux[rows, columns])
        if X_Ob is None or p.out is None:
            continue
        for rows in blocks(len(out_oi)):
            height = rows.stop - rows.start
            w_bb = space.take("result", height, width)
            D_bO = _delta_out(p.out, rows, space.take("base", height, O), space)
            _multiply_add(w_bb, X_Ob.index_select(0, p.out.kept[rows]), D_bO, X_Ob)
            out_oi[rows, columns] = w_bb.add_(p.aux[rows, columns])


def _out_side_first(out_oi: torch.Tensor, weight: FrozenWeight, p: Projection, space: Workspace) -> None:
    assert p.out is not None
    O, I = weight.shape
    for rows in blocks(len(out_oi)):
        height = rows.stop - rows.start
        D_bO = _delta_out(p.out, rows, space.take("out", height, O), space)
        Z_bI = None if p.in_ is None else space.take("in", height, I)
        for columns in blocks(I):
            width = columns.stop - columns.start
            z_bb = space.take("result", height, width) if Z_bI is None else Z_bI[:, columns]
            W_Ob = weight.copy_block(space.take("base", O, width), slice(0, O), columns)
            _multiply_add(z_bb, W_Ob.index_select(0, p.out.kept[rows]), D_bO, W_Ob)
            if Z_bI is None:
                out_oi[rows, columns] = z_bb.add_(p.aux[rows, columns])
        if Z_bI is None or p.in_ is None:
            continue
        for columns in blocks(out_oi.shape[1]):
            width = columns.stop - columns.start
            w_bb = space.take("result", height, width)
            D_Ib = _delta_in(p.in_, columns, space.take("base", I, width), space)
            _multiply_add(w_bb, Z_bI.index_select(1, p.in_.kept[columns]), Z_bI, D_Ib)
            out_oi[rows, columns] = w_bb.add_(p.aux[rows, columns])


def _delta_in(side: Side, columns: slice, out_Ib: torch.Tensor, space: Workspace) -> torch.Tensor:
    """Columns of D_in in float32; of a D of low rank they are formed, a block at a time."""
    if len(side.factors) == 1:
        return out_Ib.copy_(side.factors[0][:, columns])
    U_Ir, V_ri = side.factors
    return torch.mm(space.load("u", U_Ir), space.load("v", V_ri[:, columns]), out=out_Ib)


def _delta_out(side: Side, rows: slice, out_bO: torch.Tensor, space: Workspace) -> torch.Tensor:
    """Rows of D_out, likewise."""
    if len(side.factors) == 1:
        return out_bO.copy_(side.factors[0][rows])
    U_rO, V_or = side.factors
    return torch.mm(space.load("v", V_or[rows]), space.load("u", U_rO), out=out_bO)


def _multiply_add(result: torch.Tensor, kept: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`result = kept + left @ right`, in the memory of `result`."""
    torch.addmm(kept, left, right, out=result)
