"""Proof 1 for a dense S: the algebra against autograd over the whole projections."""

import functools

import pytest
import torch

from pcscale.projection.algebra import Projection, Side, compose, pull_back
from tests.projection.test_algebra import (
    all_orders,
    all_ranks,
    all_sides,
    assert_close,
    random_gradient,
    random_projection,
    values_like,
    values_of,
    with_values,
)


def with_dense_starts(projection: Projection) -> Projection:
    """The same projection with normal numbers for S."""
    generator = torch.Generator().manual_seed(9)

    def dense(side: Side | None, delta: torch.Tensor | None) -> Side | None:
        if side is None or delta is None:
            return None
        return Side(torch.randn(delta.shape, generator=generator, dtype=delta.dtype), side.factors)

    out = None if projection.out is None else functools.reduce(torch.matmul, reversed(projection.out.factors))
    in_ = None if projection.in_ is None else functools.reduce(torch.matmul, projection.in_.factors)
    return Projection(dense(projection.out, out), dense(projection.in_, in_), projection.aux)


def by_definition(W_OI: torch.Tensor, projection: Projection) -> torch.Tensor:
    w_oi = W_OI
    if projection.out is not None:
        w_oi = (projection.out.start + functools.reduce(torch.matmul, reversed(projection.out.factors))) @ w_oi
    if projection.in_ is not None:
        w_oi = w_oi @ (projection.in_.start + functools.reduce(torch.matmul, projection.in_.factors))
    return w_oi + projection.aux


@all_orders
@all_ranks
@all_sides
def test_it_composes_and_pulls_back_as_autograd_does(
    out: bool, in_: bool, rank: int | None, out_first: bool | None
) -> None:
    W_OI, projection = random_projection(out, in_, rank)
    projection, G_oi = with_dense_starts(projection), random_gradient(projection)
    leaves = [value.clone().requires_grad_() for value in values_of(projection)]
    expected_oi = by_definition(W_OI, with_values(projection, leaves))
    expected = torch.autograd.grad(expected_oi, leaves, G_oi)
    assert_close(compose(W_OI, projection, out_first), expected_oi.detach())
    for found, gradient in zip(values_like(pull_back(W_OI, projection, G_oi, out_first)), expected, strict=True):
        assert_close(found, gradient)


@pytest.mark.parametrize("rank", [None, 2])
def test_operands_stay_as_they_are(rank: int | None) -> None:
    W_OI, projection = random_projection(True, True, rank)
    projection = with_dense_starts(projection)
    operands = [W_OI, *values_of(projection), *(side.start for side in (projection.out, projection.in_) if side)]
    before = [operand.clone() for operand in operands]
    compose(W_OI, projection)
    pull_back(W_OI, projection, random_gradient(projection))
    assert all(torch.equal(operand, copy) for operand, copy in zip(operands, before, strict=True))
