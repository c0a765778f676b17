"""The mathematics of Projected Compression: pure functions of tensors, nothing else.

A base weight `W_OI` is projected to `w_oi = p_out_oO @ W_OI @ p_in_Ii + aux_oi`. Both projections are in delta form,
`p = S + D` with S the fixed start. Most often S selects the kept indices, so `W @ p_in = W[:, kept] + W @ D`: a zero D
is exactly the hard-pruned weight, to the last bit, and a D of low rank, `U V`, is never formed. A dense S (a rotation)
is added to D before it multiplies, which costs the same products as D alone, of low rank as many as whole.

Legend: O, I base sizes of the out and in side; o, i compressed sizes; r the rank of D; x any size. A side that keeps
its size has no projection (None).

Source: Stefaniak et al., Projected Compression, arXiv:2506.22255 (2025); delta form: docs/decisions/0002.
"""

from dataclasses import dataclass

import torch

from pcscale.projection.costs import out_side_first

Factors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Side:
    """One projection `p = S + D`.

    Attributes:
        start: S: `[o]` or `[i]` int64, what it selects of the base's axis; or S itself, dense, in D's shape.
        factors: `(D,)` with D `[o, O]` or `[I, i]`; or `(U, V)`, U on the base's axis: `U_rO` and `V_or`, or `U_Ir` and
            `V_ri`.
    """

    start: torch.Tensor
    factors: Factors

    @property
    def selects(self) -> bool:
        return self.start.ndim == 1


@dataclass(frozen=True)
class Projection:
    """The trainable values and the start of one matrix, all in one dtype and on one device; aux is `[o, i]`."""

    out: Side | None  # None: the side keeps its size.
    in_: Side | None
    aux: torch.Tensor

    @property
    def rank(self) -> int | None:
        side = self.in_ or self.out
        # The in side's U is [I, r], the out side's [r, O].
        return None if side is None or len(side.factors) == 1 else side.factors[0].shape[1 if self.in_ else 0]


@dataclass(frozen=True)
class Gradients:
    """The gradients of one matrix's trainable values, in the order and the shapes of their factors."""

    out: Factors
    in_: Factors
    aux: torch.Tensor


def project_in(X_xI: torch.Tensor, side: Side | None) -> torch.Tensor:
    """`X @ p_in` as `[x, i]`: the kept columns and the change."""
    return X_xI if side is None else _applied_in(X_xI, side, _inner(X_xI, side))


def project_out(X_Ox: torch.Tensor, side: Side | None) -> torch.Tensor:
    """`p_out @ X` as `[o, x]`: the kept rows and the change."""
    if side is None:
        return X_Ox
    if not side.selects:
        return _whole(side, 0) @ X_Ox
    inner = X_Ox if len(side.factors) == 1 else side.factors[0] @ X_Ox
    return torch.addmm(X_Ox.index_select(0, side.start), side.factors[-1], inner)


def _whole(side: Side, dim: int) -> torch.Tensor:
    """The projection itself, of a dense S: `p_out` `[o, O]` for dim 0, `p_in` `[I, i]` for dim 1."""
    if len(side.factors) == 1:
        return side.start + side.factors[0]
    U, V = side.factors
    return torch.addmm(side.start, V, U) if dim == 0 else torch.addmm(side.start, U, V)


def compose(W_OI: torch.Tensor, projection: Projection, out_first: bool | None = None) -> torch.Tensor:
    """The compressed weight `[o, i]`, newly allocated.

    Args:
        W_OI, projection: the base weight and its projection, in one dtype and on one device.
        out_first: the multiplication order; None: the cheaper one.
    """
    p = projection
    if _order(W_OI, p, out_first):
        w_oi = project_in(project_out(W_OI, p.out), p.in_)
    else:
        w_oi = project_out(project_in(W_OI, p.in_), p.out)
    # With a side that is projected the product is ours to add to.
    return w_oi + p.aux if w_oi is W_OI else w_oi.add_(p.aux)


def pull_back(
    W_OI: torch.Tensor, projection: Projection, G_oi: torch.Tensor, out_first: bool | None = None
) -> Gradients:
    """The gradients of both D and of aux, given `G_oi`, the gradient of the compressed weight.

    `dD_out = G (W p_in)ᵀ`, `dD_in = Wᵀ (p_outᵀ G)`; out side first, `dD_out = (G p_inᵀ) Wᵀ`, `dD_in = (p_out W)ᵀ G`;
    `daux = G`, which is returned itself, not copied. A D = U V passes its gradient on: `dU = dD Vᵀ`, `dV = Uᵀ dD`, each
    multiplied from its thin end.

    Args:
        W_OI, projection, G_oi: in one dtype and on one device.
        out_first: the multiplication order; None: the cheaper one.

    Memory: at most one temporary of `[O, i]` or `[o, I]` beside the gradients at a time.
    """
    p = projection
    if p.out is None or p.in_ is None:
        out = () if p.out is None else _out_gradients(G_oi, W_OI, p.out)
        in_ = () if p.in_ is None else _in_gradients(W_OI, G_oi, p.in_, _inner(W_OI, p.in_))
    elif _order(W_OI, p, out_first):
        Y_oI = project_out(W_OI, p.out)
        in_ = _in_gradients(Y_oI, G_oi, p.in_, _inner(Y_oI, p.in_))
        del Y_oI
        out = _out_gradients(_project_back(G_oi, p.in_, 1), W_OI, p.out)
    else:
        inner = _inner(W_OI, p.in_)
        out = _out_gradients(G_oi, _applied_in(W_OI, p.in_, inner), p.out)
        in_ = _in_gradients(W_OI, _project_back(G_oi, p.out, 0), p.in_, inner)
    return Gradients(out, in_, G_oi)


def _inner(X_xI: torch.Tensor, side: Side) -> torch.Tensor:
    """The operand of the last factor: X itself, or `X @ U`."""
    return X_xI if len(side.factors) == 1 else X_xI @ side.factors[0]


def _applied_in(X_xI: torch.Tensor, side: Side, inner: torch.Tensor) -> torch.Tensor:
    if not side.selects:
        return X_xI @ _whole(side, 1)
    return torch.addmm(X_xI.index_select(1, side.start), inner, side.factors[-1])


def _project_back(G: torch.Tensor, side: Side, dim: int) -> torch.Tensor:
    """`p_outᵀ @ G` as `[O, x]` for dim 0, `G @ p_inᵀ` as `[x, I]` for dim 1."""
    product = G
    for factor in reversed(side.factors) if side.selects else (_whole(side, dim),):
        product = factor.T @ product if dim == 0 else product @ factor.T
    return product.index_add_(dim, side.start, G) if side.selects else product


def _out_gradients(left_ox: torch.Tensor, right_Ox: torch.Tensor, side: Side) -> Factors:
    """The gradients of D_out, whose whole gradient is `left @ rightᵀ`."""
    if len(side.factors) == 1:
        return (left_ox @ right_Ox.T,)
    U_rO, V_or = side.factors
    return (V_or.T @ left_ox) @ right_Ox.T, left_ox @ (U_rO @ right_Ox).T


def _in_gradients(left_xI: torch.Tensor, right_xi: torch.Tensor, side: Side, inner: torch.Tensor) -> Factors:
    """The gradients of D_in, whose whole gradient is `leftᵀ @ right`; `inner` is `_inner(left, side)`."""
    if len(side.factors) == 1:
        return (left_xI.T @ right_xi,)
    return left_xI.T @ (right_xi @ side.factors[1].T), inner.T @ right_xi


def _order(W_OI: torch.Tensor, projection: Projection, out_first: bool | None) -> bool:
    if out_first is not None:
        return out_first
    (O, I), (o, i) = W_OI.shape, projection.aux.shape
    return out_side_first((O, I), (o, i), projection.rank)
