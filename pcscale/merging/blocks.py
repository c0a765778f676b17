"""One compressed weight from mapped files, in blocks: what is anonymous memory does not grow with the matrix's area.

Blocks are a pure function of shapes, so every memory cap and shard size gives the same bytes.

Legend: O, I base sizes of the out and in side; o, i compressed sizes; b a block of rows or columns.
"""

from collections.abc import Iterator

import torch

from pcscale.memory.estimate import MERGE_BLOCK
from pcscale.projection.algebra import Projection, out_side_first


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
    out_oi: torch.Tensor, W_OI: torch.Tensor, projection: Projection, workspace: Workspace | None = None
) -> None:
    """Write the compressed weight into `out_oi`, rounded to its dtype.

    Args:
        out_oi: `[o, i]`, most often a mapped file that is being written.
        W_OI: the base weight in its stored dtype, most often mapped.
        projection: in the records' dtype, most often mapped. Products are float32.
        workspace: used again from matrix to matrix; None: one for this matrix.
    """
    workspace = workspace or Workspace()
    if projection.delta_out is not None and (
        projection.delta_in is None or out_side_first(*W_OI.shape, *projection.aux.shape)
    ):
        _out_side_first(out_oi, W_OI, projection, workspace)
    else:
        _in_side_first(out_oi, W_OI, projection, workspace)


def _in_side_first(out_oi: torch.Tensor, W_OI: torch.Tensor, p: Projection, space: Workspace) -> None:
    O = len(W_OI)
    for columns in blocks(out_oi.shape[1]):
        width = columns.stop - columns.start
        D_Ib = None if p.delta_in is None else space.load("in", p.delta_in[:, columns])
        X_Ob = None if p.delta_out is None else space.take("out", O, width)
        for rows in blocks(O):
            height = rows.stop - rows.start
            x_bb = space.take("result", height, width) if X_Ob is None else X_Ob[rows]
            if D_Ib is None or p.kept_in is None:
                x_bb.copy_(W_OI[rows, columns])
            else:
                W_bI = space.load("base", W_OI[rows])
                _multiply_add(x_bb, W_bI.index_select(1, p.kept_in[columns]), W_bI, D_Ib)
            if X_Ob is None:
                out_oi[rows, columns] = x_bb.add_(p.aux[rows, columns])
        if X_Ob is None or p.delta_out is None or p.kept_out is None:
            continue
        for rows in blocks(len(out_oi)):
            w_bb = space.take("result", rows.stop - rows.start, width)
            D_bO = space.load("base", p.delta_out[rows])
            _multiply_add(w_bb, X_Ob.index_select(0, p.kept_out[rows]), D_bO, X_Ob)
            out_oi[rows, columns] = w_bb.add_(p.aux[rows, columns])


def _out_side_first(out_oi: torch.Tensor, W_OI: torch.Tensor, p: Projection, space: Workspace) -> None:
    assert p.kept_out is not None
    assert p.delta_out is not None
    I = W_OI.shape[1]
    for rows in blocks(len(out_oi)):
        height = rows.stop - rows.start
        D_bO = space.load("out", p.delta_out[rows])
        Z_bI = None if p.delta_in is None else space.take("in", height, I)
        for columns in blocks(I):
            z_bb = space.take("result", height, columns.stop - columns.start) if Z_bI is None else Z_bI[:, columns]
            W_Ob = space.load("base", W_OI[:, columns])
            _multiply_add(z_bb, W_Ob.index_select(0, p.kept_out[rows]), D_bO, W_Ob)
            if Z_bI is None:
                out_oi[rows, columns] = z_bb.add_(p.aux[rows, columns])
        if Z_bI is None or p.delta_in is None or p.kept_in is None:
            continue
        for columns in blocks(out_oi.shape[1]):
            w_bb = space.take("result", height, columns.stop - columns.start)
            D_Ib = space.load("base", p.delta_in[:, columns])
            _multiply_add(w_bb, Z_bI.index_select(1, p.kept_in[columns]), Z_bI, D_Ib)
            out_oi[rows, columns] = w_bb.add_(p.aux[rows, columns])


def _multiply_add(result: torch.Tensor, kept: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`result = kept + left @ right`, in the memory of `result`."""
    torch.addmm(kept, left, right, out=result)
