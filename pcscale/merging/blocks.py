"""One compressed weight from mapped files, in blocks: what is anonymous memory does not grow with the matrix's area.

Blocks are a pure function of shapes, so every memory cap and shard size gives the same bytes.

Legend: O, I base sizes of the out and in side; o, i compressed sizes; b a block of rows or columns.
"""

from collections.abc import Iterator

import torch

from pcscale.memory.estimate import MERGE_BLOCK
from pcscale.projection.algebra import Projection, out_side_first, project_in, project_out

_COMPUTE = torch.float32


def blocks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + MERGE_BLOCK, size)) for start in range(0, size, MERGE_BLOCK))


def compose_into(out_oi: torch.Tensor, W_OI: torch.Tensor, projection: Projection) -> None:
    """Write the compressed weight into `out_oi`, rounded to its dtype.

    Args:
        out_oi: `[o, i]`, most often a mapped file that is being written.
        W_OI: the base weight in its stored dtype, most often mapped.
        projection: in the records' dtype, most often mapped. Products are float32.
    """
    if projection.delta_out is not None and (
        projection.delta_in is None or out_side_first(*W_OI.shape, *projection.aux.shape)
    ):
        _out_side_first(out_oi, W_OI, projection)
    else:
        _in_side_first(out_oi, W_OI, projection)


def _in_side_first(out_oi: torch.Tensor, W_OI: torch.Tensor, p: Projection) -> None:
    for columns in blocks(out_oi.shape[1]):
        kept_b = None if p.kept_in is None else p.kept_in[columns]
        D_Ib = None if p.delta_in is None else p.delta_in[:, columns].to(_COMPUTE)
        X_Ob = None if p.delta_out is None else torch.empty(len(W_OI), columns.stop - columns.start)
        for rows in blocks(len(W_OI)):
            W_bI = W_OI[rows] if p.delta_in is not None else W_OI[rows, columns]
            x_bb = project_in(W_bI.to(_COMPUTE), kept_b, D_Ib)
            if X_Ob is None:
                out_oi[rows, columns] = x_bb + p.aux[rows, columns]
            else:
                X_Ob[rows] = x_bb
        if X_Ob is None or p.delta_out is None or p.kept_out is None:
            continue
        for rows in blocks(len(out_oi)):
            w_bb = project_out(X_Ob, p.kept_out[rows], p.delta_out[rows].to(_COMPUTE))
            out_oi[rows, columns] = w_bb + p.aux[rows, columns]


def _out_side_first(out_oi: torch.Tensor, W_OI: torch.Tensor, p: Projection) -> None:
    assert p.kept_out is not None
    assert p.delta_out is not None
    for rows in blocks(len(out_oi)):
        D_bO = p.delta_out[rows].to(_COMPUTE)
        Z_bI = None if p.delta_in is None else torch.empty(rows.stop - rows.start, W_OI.shape[1])
        for columns in blocks(W_OI.shape[1]):
            z_bb = project_out(W_OI[:, columns].to(_COMPUTE), p.kept_out[rows], D_bO)
            if Z_bI is None:
                out_oi[rows, columns] = z_bb + p.aux[rows, columns]
            else:
                Z_bI[:, columns] = z_bb
        if Z_bI is None or p.delta_in is None or p.kept_in is None:
            continue
        for columns in blocks(out_oi.shape[1]):
            w_bb = project_in(Z_bI, p.kept_in[columns], p.delta_in[:, columns].to(_COMPUTE))
            out_oi[rows, columns] = w_bb + p.aux[rows, columns]
