"""Proof 1: the algebra against autograd over dense projections, in every combination of sides, ranks and orders."""

import functools
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pcscale.projection.algebra import Gradients, Projection, Side, compose, pull_back
from pcscale.projection.costs import compose_flops, out_side_first, pull_back_flops, sweep_flops
from tests.projection.parts import Compression, TinyBase

FLOAT64_TOLERANCE = 1e-12
"""Sums of some ten products of normal numbers, in float64, in another order."""
SIDES = [(True, True), (True, False), (False, True), (False, False)]
SIDE_NAMES = ["both", "out", "in", "none"]
ORDERS = [True, False, None]
RANKS = [None, 2]
RANK_NAMES = ["full", "low rank"]
BASE_SHAPE, SHAPE = (7, 9), (4, 5)

all_sides = pytest.mark.parametrize(("out", "in_"), SIDES, ids=SIDE_NAMES)
all_ranks = pytest.mark.parametrize("rank", RANKS, ids=RANK_NAMES)
all_orders = pytest.mark.parametrize("out_first", ORDERS)


def random_projection(
    out: bool, in_: bool, rank: int | None, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, Projection]:
    """A base weight and a projection of it whose sides are both, one or none projected."""
    generator = torch.Generator().manual_seed(3)
    (O, I), (o, i) = BASE_SHAPE, SHAPE
    o, i = o if out else O, i if in_ else I

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    W_OI, aux_oi = normal(O, I), normal(o, i)
    out_side = in_side = None
    if out:
        factors = (normal(o, O),) if rank is None else (normal(rank, O), normal(o, rank))
        out_side = Side(torch.tensor([0, 2, 3, 6]), factors)
    if in_:
        factors = (normal(I, i),) if rank is None else (normal(I, rank), normal(rank, i))
        in_side = Side(torch.tensor([1, 2, 4, 7, 8]), factors)
    return W_OI, Projection(out_side, in_side, aux_oi)


def values_of(projection: Projection) -> list[torch.Tensor]:
    """The trainable values: the factors of the out side, those of the in side, aux."""
    return [factor for side in (projection.out, projection.in_) if side for factor in side.factors] + [projection.aux]


def values_like(gradients: Gradients) -> list[torch.Tensor]:
    """The gradients in the same order."""
    return [*gradients.out, *gradients.in_, gradients.aux]


def with_values(projection: Projection, values: list[torch.Tensor]) -> Projection:
    """The same projection with other trainable values."""
    remaining = iter(values)
    sides = [
        None if side is None else Side(side.start, tuple(next(remaining) for _ in side.factors))
        for side in (projection.out, projection.in_)
    ]
    return Projection(sides[0], sides[1], next(remaining))


def operands(W_OI: torch.Tensor, projection: Projection, G_oi: torch.Tensor) -> list[torch.Tensor]:
    kept = [side.start for side in (projection.out, projection.in_) if side]
    return [W_OI, G_oi, *kept, *values_of(projection)]


def dense(W_OI: torch.Tensor, projection: Projection) -> torch.Tensor:
    """The composed weight from its definition: D whole, S as a matrix of zeros and ones."""
    O, I = W_OI.shape
    p_oO, p_Ii = torch.eye(O, dtype=W_OI.dtype), torch.eye(I, dtype=W_OI.dtype)
    if projection.out is not None:
        # On the out side U is [r, O] and V [o, r]: D = V U.
        p_oO = p_oO[projection.out.start] + functools.reduce(torch.matmul, reversed(projection.out.factors))
    if projection.in_ is not None:
        p_Ii = p_Ii[:, projection.in_.start] + functools.reduce(torch.matmul, projection.in_.factors)
    return p_oO @ W_OI @ p_Ii + projection.aux


def by_autograd(
    W_OI: torch.Tensor, projection: Projection, G_oi: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The composed weight and the gradients of `sum(G * w)`, from the definition."""
    leaves = [value.clone().requires_grad_(True) for value in values_of(projection)]
    w_oi = dense(W_OI, with_values(projection, leaves))
    return w_oi.detach(), list(torch.autograd.grad(w_oi, leaves, G_oi))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)


def random_gradient(projection: Projection) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(projection.aux.shape, generator=generator, dtype=projection.aux.dtype)


@all_orders
@all_ranks
@all_sides
def test_composing_is_the_product_with_dense_projections(
    out: bool, in_: bool, rank: int | None, out_first: bool | None
) -> None:
    W_OI, projection = random_projection(out, in_, rank)
    assert_close(compose(W_OI, projection, out_first), dense(W_OI, projection))


@all_orders
@all_ranks
@all_sides
def test_pulling_back_is_what_autograd_does(out: bool, in_: bool, rank: int | None, out_first: bool | None) -> None:
    W_OI, projection = random_projection(out, in_, rank)
    G_oi = random_gradient(projection)
    found = values_like(pull_back(W_OI, projection, G_oi, out_first))
    _, expected = by_autograd(W_OI, projection, G_oi)
    assert len(found) == len(expected) == 1 + (out + in_) * (1 if rank is None else 2)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


@all_ranks
@all_sides
def test_gradients_have_the_shapes_of_what_they_change(out: bool, in_: bool, rank: int | None) -> None:
    W_OI, projection = random_projection(out, in_, rank)
    found = pull_back(W_OI, projection, random_gradient(projection))
    for side, gradients in ((projection.out, found.out), (projection.in_, found.in_)):
        factors = () if side is None else side.factors
        assert [value.shape for value in factors] == [gradient.shape for gradient in gradients]
    assert found.aux.shape == projection.aux.shape


@all_sides
def test_the_rank_is_the_thin_size_of_the_factors(out: bool, in_: bool) -> None:
    assert random_projection(out, in_, None)[1].rank is None
    assert random_projection(out, in_, 2)[1].rank == (2 if out or in_ else None)


@all_ranks
@all_sides
def test_finite_differences_agree_with_the_pull_back(out: bool, in_: bool, rank: int | None) -> None:
    W_OI, projection = random_projection(out, in_, rank)
    leaves = [value.clone().requires_grad_(True) for value in values_of(projection)]

    class Composed(torch.autograd.Function):
        """The package's own pair of functions, as autograd's forward and backward."""

        @staticmethod
        def forward(context, *tensors: torch.Tensor) -> torch.Tensor:
            context.projection = with_values(projection, list(tensors))
            return compose(W_OI, context.projection)

        @staticmethod
        def backward(context, G_oi: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(values_like(pull_back(W_OI, context.projection, G_oi)))

    assert torch.autograd.gradcheck(Composed.apply, tuple(leaves))


@all_orders
@all_ranks
@all_sides
def test_operands_are_left_as_they_were(out: bool, in_: bool, rank: int | None, out_first: bool | None) -> None:
    W_OI, projection = random_projection(out, in_, rank)
    G_oi = random_gradient(projection)
    given = operands(W_OI, projection, G_oi)
    before = [operand.clone() for operand in given]
    w_oi = compose(W_OI, projection, out_first)
    gradients = pull_back(W_OI, projection, G_oi, out_first)
    assert all(torch.equal(operand, copy) for operand, copy in zip(given, before, strict=True))
    addresses = {operand.data_ptr() for operand in given}
    assert w_oi.data_ptr() not in addresses
    assert addresses.isdisjoint(part.data_ptr() for part in (*gradients.out, *gradients.in_))
    assert gradients.aux is G_oi


@all_orders
@all_ranks
@all_sides
def test_a_zero_delta_composes_to_the_kept_entries_to_the_last_bit(
    out: bool, in_: bool, rank: int | None, out_first: bool | None
) -> None:
    W_OI, projection = random_projection(out, in_, rank, torch.float32)
    kept_oi = W_OI
    if projection.out is not None:
        projection.out.factors[-1].zero_()  # Of a low rank V alone: U is never zero.
        kept_oi = kept_oi[projection.out.start]
    if projection.in_ is not None:
        projection.in_.factors[-1].zero_()
        kept_oi = kept_oi[:, projection.in_.start]
    assert torch.equal(compose(W_OI, projection, out_first), kept_oi + projection.aux)


def meta_projection(O: int, I: int, o: int, i: int, rank: int | None) -> tuple[torch.Tensor, Projection]:
    """Sizes alone: the meta device multiplies nothing. A side of equal sizes is not projected."""

    def factors(whole: tuple[int, int], U: tuple[int, int], V: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        return (torch.empty(whole),) if rank is None else (torch.empty(U), torch.empty(V))

    r = rank or 0
    with torch.device("meta"):
        out = None if o == O else Side(torch.empty(o, dtype=torch.int64), factors((o, O), (r, O), (o, r)))
        in_ = None if i == I else Side(torch.empty(i, dtype=torch.int64), factors((I, i), (I, r), (r, i)))
        return torch.empty(O, I), Projection(out, in_, torch.empty(o, i))


def counted_flops(O: int, I: int, o: int, i: int, rank: int | None, out_first: bool | None) -> tuple[int, int]:
    """What torch counts while it composes, and pulls back, matrices of that size."""
    W_OI, projection = meta_projection(O, I, o, i, rank)
    with FlopCounterMode(display=False) as composing:
        compose(W_OI, projection, out_first)
    with FlopCounterMode(display=False) as pulling:
        pull_back(W_OI, projection, projection.aux, out_first)
    return composing.get_total_flops(), pulling.get_total_flops()


@all_orders
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_operations_are_those_that_the_costs_state(rank: int | None, out_first: bool | None) -> None:
    shapes = [(O, I, o, i) for O, I, o, i in itertools.product([5, 8, 30], repeat=4) if o <= O and i <= I]
    seen = set()
    for O, I, o, i in shapes:
        found = counted_flops(O, I, o, i, rank, out_first)
        sizes = ((O, I), (o, i), rank)
        if o == O or i == I:
            # One side, or none: there is no order to choose.
            assert found == (compose_flops(*sizes), pull_back_flops(*sizes))
        assert found == (compose_flops(*sizes, out_first), pull_back_flops(*sizes, out_first)), sizes
        seen.add((o < O, i < I))
    assert seen == set(SIDES)


@all_ranks
def test_the_chosen_order_is_the_one_that_the_costs_name(rank: int | None) -> None:
    chosen = set()
    for O, I, o, i in itertools.product([5, 8, 30], repeat=4):
        if o < O and i < I:
            first = out_side_first((O, I), (o, i), rank)
            chosen.add(first)
            assert counted_flops(O, I, o, i, rank, None) == counted_flops(O, I, o, i, rank, first)
    assert chosen == {True, False}


def test_the_plan_counts_the_operations_that_are_made(tiny_base: TinyBase) -> None:
    compression = Compression.of(tiny_base("llama", False))
    optimizer = compression.optimizer(compression.model())
    composing = pulling = 0
    for planned in compression.plan.matrices:
        W_OI, projection = compression.weights[planned.name], optimizer.records[planned.name].projection()
        with FlopCounterMode(display=False) as counter:
            compose(W_OI, projection)
        assert counter.get_total_flops() == compose_flops(*planned.shapes), planned.name
        composing += counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            pull_back(W_OI, projection, projection.aux)
        assert counter.get_total_flops() == pull_back_flops(*planned.shapes), planned.name
        pulling += counter.get_total_flops()
    assert (composing, pulling) == sweep_flops(compression.plan)
    assert 0 < composing < pulling
