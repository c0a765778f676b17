"""The cost of one matrix's products, and the cheaper order of them: arithmetic on sizes alone.

A projection multiplies as a whole, `[O, o]` values, or through a rank r as two thin factors that are never multiplied
with each other.

Legend: O, I base sizes of the out and in side; o, i compressed sizes; r the rank, None for a whole projection.
"""

from pcscale.families.plan import Plan, Shape

FLOPS_PER_BYTE = 50
"""The worth of moving a byte of a temporary, in operations: processors and GPUs do 10 to 300 in its time. It decides
only between orders whose FLOPs are close."""
_BYTES = 4


def compose_flops(base_shape: Shape, shape: Shape, rank: int | None = None, out_first: bool | None = None) -> int:
    """Floating-point operations of `p_out @ W @ p_in`; a side that keeps its size costs nothing.

    Args:
        out_first: the order; None: the cheaper one.
    """
    (O, I), (o, i) = base_shape, shape
    out_first = out_side_first(base_shape, shape, rank) if out_first is None else out_first
    in_lines, out_columns = (o, I) if out_first else (O, i)
    return 2 * (_apply(in_lines, I, i, rank) * (i != I) + _apply(out_columns, O, o, rank) * (o != O))


def pull_back_flops(base_shape: Shape, shape: Shape, rank: int | None = None, out_first: bool | None = None) -> int:
    """Operations of the gradients of both projections, the products that they share counted once."""
    (O, I), (o, i) = base_shape, shape
    if o == O:
        return 2 * _gradients(O, I, i, rank) * (i != I)
    if i == I:
        return 2 * _gradients(I, O, o, rank)
    if out_side_first(base_shape, shape, rank) if out_first is None else out_first:
        gradients = _gradients(o, I, i, rank) + _gradients(I, O, o, rank)
        return 2 * (_apply(I, O, o, rank) + _apply(o, I, i, rank) + gradients)
    gradients = _gradients(O, I, i, rank, shared=True) + _gradients(i, O, o, rank)
    return 2 * (_apply(O, I, i, rank) + _apply(i, O, o, rank) + gradients)


def visit_flops(base_shape: Shape, shape: Shape, rank: int | None = None) -> int:
    """Operations of a step on one matrix: pulling back and composing anew."""
    return pull_back_flops(base_shape, shape, rank) + compose_flops(base_shape, shape, rank)


def sweep_flops(plan: Plan, rank: int | None = None) -> tuple[int, int]:
    """Operations of composing every matrix of a plan once, and of pulling back to each of them once."""
    shapes = [(planned.shapes, count) for planned, count in plan.alike]
    compose = sum(compose_flops(*pair, rank) * count for pair, count in shapes)
    return compose, sum(pull_back_flops(*pair, rank) * count for pair, count in shapes)


def out_side_first(base_shape: Shape, shape: Shape, rank: int | None = None) -> bool:
    """Whether `(p_out @ W) @ p_in` is cheaper than `p_out @ (W @ p_in)`, in FLOPs and in bytes of its temporary.

    With one projected side there is no choice: that side comes first.
    """
    (O, I), (o, i) = base_shape, shape
    if o == O or i == I:
        return o != O
    costs = {
        out_first: compose_flops(base_shape, shape, rank, out_first)
        + FLOPS_PER_BYTE * _BYTES * (o * I if out_first else O * i)
        for out_first in (True, False)
    }
    return costs[True] < costs[False]


def _apply(lines: int, big: int, small: int, rank: int | None) -> int:
    """A projection from `big` to `small` (or back), on so many rows or columns."""
    return lines * (big * small if rank is None else rank * (big + small))


def _gradients(lines: int, big: int, small: int, rank: int | None, shared: bool = False) -> int:
    """Values multiplied for the gradient of one D, or of its factors; `shared`: the product with U is there already."""
    return lines * (big * small if rank is None else rank * ((1 if shared else 2) * big + 2 * small))
