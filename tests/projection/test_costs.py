"""Which order of products is taken, and why; that the counts are those of torch is shown with the algebra."""

import itertools
from collections.abc import Iterator

import pytest

from pcscale.projection.costs import FLOPS_PER_BYTE, Shape, compose_flops, out_side_first, pull_back_flops

SIZES = [2, 3, 4, 6, 8, 12, 24, 60]
FLOAT_BYTES = 4
RANKS = [None, 1, 5]


def both_sides() -> Iterator[tuple[Shape, Shape]]:
    """Base and compressed shapes in which both sides shrink."""
    for O, I, o, i in itertools.product(SIZES, repeat=4):
        if o < O and i < I:
            yield (O, I), (o, i)


def temporary(base_shape: Shape, shape: Shape, out_first: bool) -> int:
    """Values of what the first product leaves for the second."""
    return shape[0] * base_shape[1] if out_first else base_shape[0] * shape[1]


def test_the_order_with_the_fewest_operations_is_taken_where_it_saves_more_than_its_temporary_costs() -> None:
    decided = set()
    for base_shape, shape in both_sides():
        flops = {first: compose_flops(base_shape, shape, out_first=first) for first in (True, False)}
        worth = abs(temporary(base_shape, shape, True) - temporary(base_shape, shape, False))
        if abs(flops[True] - flops[False]) > FLOPS_PER_BYTE * FLOAT_BYTES * worth:
            first = out_side_first(base_shape, shape)
            assert flops[first] < flops[not first], (base_shape, shape)
            decided.add(first)
    assert decided == {True, False}


def test_with_equal_operations_the_smaller_temporary_wins() -> None:
    decided = set()
    for base_shape, shape in both_sides():
        flops = {first: compose_flops(base_shape, shape, out_first=first) for first in (True, False)}
        values = {first: temporary(base_shape, shape, first) for first in (True, False)}
        if flops[True] == flops[False] and values[True] != values[False]:
            first = out_side_first(base_shape, shape)
            assert values[first] < values[not first], (base_shape, shape)
            decided.add(first)
    assert decided == {True, False}


@pytest.mark.parametrize("rank", [1, 5, 400])
def test_of_a_low_rank_the_order_with_the_fewest_operations_has_the_smaller_temporary_too(rank: int) -> None:
    for base_shape, shape in both_sides():
        first = out_side_first(base_shape, shape, rank)
        found, other = (
            (compose_flops(base_shape, shape, rank, order), temporary(base_shape, shape, order))
            for order in (first, not first)
        )
        assert found[0] <= other[0]
        assert found[1] <= other[1]


def test_a_few_operations_more_are_taken_for_a_much_smaller_temporary() -> None:
    """(o + I) O i against (O + i) o I operations: 57,200 against 60,606, but 572 values against 481."""
    base_shape, shape = (52, 37), (13, 11)
    assert compose_flops(base_shape, shape, out_first=False) < compose_flops(base_shape, shape, out_first=True)
    assert out_side_first(base_shape, shape)


def test_a_whole_order_of_magnitude_of_operations_outweighs_any_temporary() -> None:
    """The in side shrinks to almost nothing: 4096 · 8 values are more than 4 · 4096, and still cheaper."""
    base_shape, shape = (8192, 4096), (4096, 8)
    assert not out_side_first(base_shape, shape)
    assert compose_flops(base_shape, shape, out_first=False) * 10 < compose_flops(base_shape, shape, out_first=True)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(
    ("shape", "first"), [((4, 60), True), ((60, 4), False), ((60, 60), False)], ids=["out", "in", "none"]
)
def test_with_one_side_there_is_no_choice(shape: Shape, first: bool, rank: int | None) -> None:
    assert out_side_first((60, 60), shape, rank) == first
    assert len({compose_flops((60, 60), shape, rank, order) for order in (True, False, None)}) == 1
    assert len({pull_back_flops((60, 60), shape, rank, order) for order in (True, False, None)}) == 1


def test_a_matrix_that_keeps_its_shape_costs_nothing() -> None:
    assert compose_flops((60, 24), (60, 24)) == pull_back_flops((60, 24), (60, 24)) == 0


@pytest.mark.parametrize("rank", RANKS)
def test_without_an_order_the_chosen_one_is_counted(rank: int | None) -> None:
    for base_shape, shape in both_sides():
        first = out_side_first(base_shape, shape, rank)
        assert compose_flops(base_shape, shape, rank) == compose_flops(base_shape, shape, rank, first)
        assert pull_back_flops(base_shape, shape, rank) == pull_back_flops(base_shape, shape, rank, first)


def test_operations_of_whole_projections_are_those_of_the_method_s_formulas() -> None:
    O, I, o, i = 60, 24, 8, 12
    assert compose_flops((O, I), (o, i), out_first=True) == 2 * (o * O * I + o * I * i)
    assert compose_flops((O, I), (o, i), out_first=False) == 2 * (O * I * i + o * O * i)
    assert compose_flops((O, I), (o, I)) == 2 * o * O * I
    assert compose_flops((O, I), (O, i)) == 2 * O * I * i
    # Each gradient is the product of two matrices, one of which a product itself has to be made for.
    assert pull_back_flops((O, I), (o, i), out_first=False) == 2 * (2 * O * I * i + 2 * o * O * i)
    assert pull_back_flops((O, I), (o, i), out_first=True) == 2 * (2 * o * O * I + 2 * o * I * i)
    assert pull_back_flops((O, I), (o, I)) == 2 * o * I * O
    assert pull_back_flops((O, I), (O, i)) == 2 * I * O * i


def test_a_low_rank_multiplies_through_its_factors() -> None:
    O, I, o, i, r = 60, 24, 8, 12, 3
    assert compose_flops((O, I), (o, i), r, out_first=True) == 2 * r * (I * (O + o) + o * (I + i))
    assert compose_flops((O, I), (o, i), r, out_first=False) == 2 * r * (O * (I + i) + i * (O + o))


def test_a_low_rank_is_cheaper_exactly_where_its_factors_are_smaller() -> None:
    O, I, o = 60, 24, 30
    whole = compose_flops((O, I), (o, I))
    for rank in range(1, 40):
        cheaper = compose_flops((O, I), (o, I), rank) < whole
        assert cheaper == (rank * (O + o) < O * o)
