"""The owner of each projected matrix: a pure function of costs and the number of ranks.

An owner alone holds a matrix's base weight, record and moments, gets its reduced gradient and publishes its new weight.
The sweep goes in rounds of one matrix per owner, so that all ranks read, compute and publish at the same time.
"""

from collections.abc import Mapping, Sequence

from pcscale.common.topology import Topology
from pcscale.families.plan import PlannedWeight
from pcscale.projection.costs import visit_flops

Round = tuple[str | None, ...]
"""By rank, the matrix that it works on; None: it has none left."""


def sweep_rounds(matrices: Sequence[PlannedWeight], rank: int | None, world_size: int) -> list[Round]:
    """The rounds of a sweep over these matrices; `rank` is that of D, which decides what a visit costs."""
    return rounds({planned.name: visit_flops(*planned.shapes, rank) for planned in matrices}, world_size)


def owned_matrices(matrices: Sequence[PlannedWeight], rank: int | None, topology: Topology) -> list[str]:
    """The matrices that a process owns, in the order of its visits."""
    found = sweep_rounds(matrices, rank, topology.world_size)
    return [name for one in found if (name := one[topology.rank]) is not None]


def rounds(costs: Mapping[str, int], world_size: int) -> list[Round]:
    """The rounds of a sweep, given the cost of a visit to each matrix, in any unit.

    With several ranks the costly ones go first, each to the rank that has least to do: a round's matrices take about
    equally long, and so do the ranks' sums. One rank keeps the order.
    """
    if world_size == 1:
        return [(name,) for name in costs]
    owned: list[list[str]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for name in sorted(costs, key=lambda name: -costs[name]):
        least = loads.index(min(loads))
        owned[least].append(name)
        loads[least] += costs[name]
    last = max(map(len, owned))
    return [tuple(names[k] if k < len(names) else None for names in owned) for k in range(last)]
