"""The mathematics of Projected Compression: pure functions of tensors, nothing else.

A base weight `W_OI` is projected to `w_oi = p_out_oO @ W_OI @ p_in_Ii + aux_oi`. Both projections are in delta form,
`p = S + D` with S the fixed selection of the kept indices, so `W @ p_in = W[:, kept] + W @ D` and a zero D is exactly
the hard-pruned weight, to the last bit.

Legend: O, I base sizes of the out and in side; o, i compressed sizes; a side that keeps its size has neither kept
indices nor D (None).

Source: Stefaniak et al., Projected Compression, arXiv:2506.22255 (2025); delta form: docs/decisions/0002.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Projection:
    """The trainable values and the start of one matrix.

    Attributes:
        kept_out: `[o]` int64 kept rows of W; None: the out side keeps its size.
        delta_out: `[o, O]`; None with kept_out.
        kept_in: `[i]` int64 kept columns of W; None: the in side keeps its size.
        delta_in: `[I, i]`; None with kept_in.
        aux: `[o, i]`.
    """

    kept_out: torch.Tensor | None
    delta_out: torch.Tensor | None
    kept_in: torch.Tensor | None
    delta_in: torch.Tensor | None
    aux: torch.Tensor


@dataclass(frozen=True)
class Gradients:
    """The gradients of one matrix's trainable values, in their shapes."""

    delta_out: torch.Tensor | None
    delta_in: torch.Tensor | None
    aux: torch.Tensor


def out_side_first(O: int, I: int, o: int, i: int) -> bool:
    """Whether `(p_out @ W) @ p_in` takes fewer operations than `p_out @ (W @ p_in)`; the pull-back follows suit."""
    return o * I * (O + i) < O * i * (I + o)


def project_in(X_xI: torch.Tensor, kept_i: torch.Tensor | None, D_Ii: torch.Tensor | None) -> torch.Tensor:
    """`X @ p_in` as `[x, i]`: the kept columns and the change."""
    if kept_i is None or D_Ii is None:
        return X_xI
    return torch.addmm(X_xI.index_select(1, kept_i), X_xI, D_Ii)


def project_out(X_Ox: torch.Tensor, kept_o: torch.Tensor | None, D_oO: torch.Tensor | None) -> torch.Tensor:
    """`p_out @ X` as `[o, x]`: the kept rows and the change."""
    if kept_o is None or D_oO is None:
        return X_Ox
    return torch.addmm(X_Ox.index_select(0, kept_o), D_oO, X_Ox)


def compose(W_OI: torch.Tensor, projection: Projection, out_first: bool | None = None) -> torch.Tensor:
    """The compressed weight `w_oi`.

    Args:
        W_OI: the base weight, in the dtype of the products.
        projection: in the same dtype and on the same device.
        out_first: the multiplication order; None: the cheaper one.

    Returns:
        `[o, i]`, newly allocated.
    """
    p = projection
    if _order(W_OI, p, out_first):
        w_oi = project_in(project_out(W_OI, p.kept_out, p.delta_out), p.kept_in, p.delta_in)
    else:
        w_oi = project_out(project_in(W_OI, p.kept_in, p.delta_in), p.kept_out, p.delta_out)
    return w_oi + p.aux


def pull_back(
    W_OI: torch.Tensor, projection: Projection, G_oi: torch.Tensor, out_first: bool | None = None
) -> Gradients:
    """The gradients of D_out, D_in and aux, given `G_oi`, the gradient of the compressed weight.

    `dD_out = G (W p_in)ᵀ`, `dD_in = Wᵀ (p_outᵀ G)`; out side first, `dD_out = (G p_inᵀ) Wᵀ`, `dD_in = (p_out W)ᵀ G`;
    `daux = G`, which is returned itself, not copied.

    Args:
        W_OI: the base weight, in the dtype of the products.
        projection: in the same dtype and on the same device.
        G_oi: `[o, i]`, likewise.
        out_first: the multiplication order; None: the cheaper one.

    Memory: at most one temporary beside the gradients at a time.
    """
    p = projection
    if p.delta_out is None or p.delta_in is None:
        grad_out = None if p.delta_out is None else G_oi @ W_OI.T
        grad_in = None if p.delta_in is None else W_OI.T @ G_oi
    elif _order(W_OI, p, out_first):
        grad_in = project_out(W_OI, p.kept_out, p.delta_out).T @ G_oi
        grad_out = _add_at(G_oi @ p.delta_in.T, 1, p.kept_in, G_oi) @ W_OI.T
    else:
        grad_out = G_oi @ project_in(W_OI, p.kept_in, p.delta_in).T
        grad_in = W_OI.T @ _add_at(p.delta_out.T @ G_oi, 0, p.kept_out, G_oi)
    return Gradients(grad_out, grad_in, G_oi)


def _add_at(product: torch.Tensor, dim: int, kept: torch.Tensor | None, G_oi: torch.Tensor) -> torch.Tensor:
    """Add the share of the selection S to a product with D, in place."""
    return product if kept is None else product.index_add_(dim, kept, G_oi)


def _order(W_OI: torch.Tensor, projection: Projection, out_first: bool | None) -> bool:
    return out_side_first(*W_OI.shape, *projection.aux.shape) if out_first is None else out_first
