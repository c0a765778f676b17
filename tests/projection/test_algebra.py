"""Proof 1: the algebra against autograd over dense projections, in every combination of sides and both orders."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pcscale.projection.algebra import Gradients, Projection, compose, out_side_first, pull_back
from tests.projection.parts import Compression, TinyBase

FLOAT64_TOLERANCE = 1e-12
"""Sums of some ten products of normal numbers, in float64, in another order."""
SIDES = [(True, True), (True, False), (False, True), (False, False)]
SIDE_NAMES = ["both", "out", "in", "none"]
ORDERS = [True, False, None]
BASE_SHAPE, SHAPE = (7, 9), (4, 5)


def random_projection(out: bool, in_: bool, dtype: torch.dtype, zero: bool = False) -> tuple[torch.Tensor, Projection]:
    """A base weight and a projection of it whose sides are both, one or none projected."""
    generator = torch.Generator().manual_seed(3)
    (O, I), (o, i) = BASE_SHAPE, SHAPE
    o, i = o if out else O, i if in_ else I

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    def delta(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype) if zero else normal(*shape)

    return normal(O, I), Projection(
        kept_out=torch.tensor([0, 2, 3, 6]) if out else None,
        delta_out=delta(o, O) if out else None,
        kept_in=torch.tensor([1, 2, 4, 7, 8]) if in_ else None,
        delta_in=delta(I, i) if in_ else None,
        aux=normal(o, i),
    )


def dense_sides(
    projection: Projection, W_OI: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
    """`p_out` and `p_in` as whole matrices, and the leaves D_out, D_in of the graph."""
    dense, leaves = [], []
    O, I = W_OI.shape
    eyes = (torch.eye(O, dtype=W_OI.dtype), torch.eye(I, dtype=W_OI.dtype))
    for side, (kept, delta) in enumerate(
        [(projection.kept_out, projection.delta_out), (projection.kept_in, projection.delta_in)]
    ):
        if kept is None or delta is None:
            leaf, matrix = None, eyes[side]
        else:
            leaf = delta.clone().requires_grad_(True)
            matrix = leaf + (eyes[side][kept] if side == 0 else eyes[side][:, kept])
        leaves.append(leaf)
        dense.append(matrix)
    return dense[0], dense[1], leaves


def by_autograd(W_OI: torch.Tensor, projection: Projection, G_oi: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
    """The composed weight and the gradients of `sum(G * w)`, from the definition."""
    p_oO, p_Ii, (D_oO, D_Ii) = dense_sides(projection, W_OI)
    aux_oi = projection.aux.clone().requires_grad_(True)
    w_oi = p_oO @ W_OI @ p_Ii + aux_oi
    w_oi.backward(G_oi)
    assert aux_oi.grad is not None
    return w_oi.detach(), Gradients(
        None if D_oO is None else D_oO.grad, None if D_Ii is None else D_Ii.grad, aux_oi.grad
    )


def assert_close(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    if found is None or expected is None:
        assert found is expected
    else:
        torch.testing.assert_close(found, expected, rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)


def random_gradient(projection: Projection) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(projection.aux.shape, generator=generator, dtype=projection.aux.dtype)


@pytest.mark.parametrize("out_first", ORDERS)
@pytest.mark.parametrize(("out", "in_"), SIDES, ids=SIDE_NAMES)
def test_composing_is_the_product_with_dense_projections(out: bool, in_: bool, out_first: bool | None) -> None:
    W_OI, projection = random_projection(out, in_, torch.float64)
    expected, _ = by_autograd(W_OI, projection, random_gradient(projection))
    assert_close(compose(W_OI, projection, out_first), expected)


@pytest.mark.parametrize("out_first", ORDERS)
@pytest.mark.parametrize(("out", "in_"), SIDES, ids=SIDE_NAMES)
def test_pulling_back_is_what_autograd_does(out: bool, in_: bool, out_first: bool | None) -> None:
    W_OI, projection = random_projection(out, in_, torch.float64)
    G_oi = random_gradient(projection)
    found = pull_back(W_OI, projection, G_oi, out_first)
    _, expected = by_autograd(W_OI, projection, G_oi)
    assert_close(found.delta_out, expected.delta_out)
    assert_close(found.delta_in, expected.delta_in)
    assert_close(found.aux, expected.aux)


@pytest.mark.parametrize(("out", "in_"), SIDES, ids=SIDE_NAMES)
def test_gradients_have_the_shapes_of_what_they_change(out: bool, in_: bool) -> None:
    W_OI, projection = random_projection(out, in_, torch.float64)
    found = pull_back(W_OI, projection, random_gradient(projection))
    for name in ("delta_out", "delta_in", "aux"):
        value, gradient = getattr(projection, name), getattr(found, name)
        assert (value is None) == (gradient is None)
        assert value is None or value.shape == gradient.shape


@pytest.mark.parametrize(("out", "in_"), SIDES, ids=SIDE_NAMES)
def test_finite_differences_agree_with_the_pull_back(out: bool, in_: bool) -> None:
    W_OI, projection = random_projection(out, in_, torch.float64)
    values = {name: getattr(projection, name) for name in ("delta_out", "delta_in", "aux")}
    leaves = {name: value.clone().requires_grad_(True) for name, value in values.items() if value is not None}

    class Composed(torch.autograd.Function):
        """The package's own pair of functions, as autograd's forward and backward."""

        @staticmethod
        def forward(context, *tensors: torch.Tensor) -> torch.Tensor:
            context.projection = Projection(
                kept_out=projection.kept_out,
                kept_in=projection.kept_in,
                **{**values, **dict(zip(leaves, tensors, strict=True))},
            )
            return compose(W_OI, context.projection)

        @staticmethod
        def backward(context, G_oi: torch.Tensor) -> tuple[torch.Tensor, ...]:
            gradients = pull_back(W_OI, context.projection, G_oi)
            return tuple(getattr(gradients, name) for name in leaves)

    assert torch.autograd.gradcheck(Composed.apply, tuple(leaves.values()))


@pytest.mark.parametrize("out_first", ORDERS)
@pytest.mark.parametrize(("out", "in_"), SIDES, ids=SIDE_NAMES)
def test_operands_are_left_as_they_were(out: bool, in_: bool, out_first: bool | None) -> None:
    W_OI, projection = random_projection(out, in_, torch.float64)
    G_oi = random_gradient(projection)
    operands = [W_OI, G_oi, *(value for value in vars(projection).values() if value is not None)]
    before = [operand.clone() for operand in operands]
    w_oi = compose(W_OI, projection, out_first)
    pull_back(W_OI, projection, G_oi, out_first)
    assert all(torch.equal(operand, copy) for operand, copy in zip(operands, before, strict=True))
    assert w_oi.data_ptr() not in {operand.data_ptr() for operand in operands}


@pytest.mark.parametrize("out_first", ORDERS)
@pytest.mark.parametrize(("out", "in_"), SIDES, ids=SIDE_NAMES)
def test_a_zero_delta_composes_to_the_kept_entries_to_the_last_bit(
    out: bool, in_: bool, out_first: bool | None
) -> None:
    W_OI, projection = random_projection(out, in_, torch.float32, zero=True)
    kept_oi = W_OI
    if projection.kept_out is not None:
        kept_oi = kept_oi[projection.kept_out]
    if projection.kept_in is not None:
        kept_oi = kept_oi[:, projection.kept_in]
    assert torch.equal(compose(W_OI, projection, out_first), kept_oi + projection.aux)


def counted_flops(O: int, I: int, o: int, i: int, out_first: bool | None) -> int:
    """What torch counts while it composes matrices of that size; the meta device multiplies nothing."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        projection = Projection(
            kept_out=torch.empty(o, dtype=torch.int64),
            delta_out=torch.empty(o, O),
            kept_in=torch.empty(i, dtype=torch.int64),
            delta_in=torch.empty(I, i),
            aux=torch.empty(o, i),
        )
        compose(torch.empty(O, I), projection, out_first)
    return counter.get_total_flops()


def test_the_order_rule_takes_the_fewest_operations() -> None:
    sizes = [3, 8, 30]
    chosen = set()
    for O, I, o, i in itertools.product(sizes, repeat=4):
        if o < O and i < I:
            first, second = counted_flops(O, I, o, i, True), counted_flops(O, I, o, i, False)
            chosen.add(out_side_first(O, I, o, i))
            assert out_side_first(O, I, o, i) == (first < second)
            assert counted_flops(O, I, o, i, None) == min(first, second)
    assert chosen == {True, False}


def test_the_plan_counts_the_operations_that_are_made(tiny_base: TinyBase) -> None:
    compression = Compression.of(tiny_base("llama", False))
    optimizer = compression.optimizer(compression.model())
    composing = pulling = 0
    for planned in compression.plan.matrices:
        W_OI, projection = compression.weights[planned.name], optimizer.records[planned.name].projection
        with FlopCounterMode(display=False) as counter:
            compose(W_OI, projection)
        assert counter.get_total_flops() == planned.compose_flops, planned.name
        composing += counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            pull_back(W_OI, projection, projection.aux)
        assert counter.get_total_flops() == planned.pull_back_flops, planned.name
        pulling += counter.get_total_flops()
    assert (composing, pulling) == (compression.plan.compose_flops, compression.plan.pull_back_flops)
    assert 0 < composing < pulling
