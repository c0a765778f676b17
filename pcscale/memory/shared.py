"""Sizes that predictions of one plan share: each is computed once for all settings that it does not depend on."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

from pcscale.common.sizes import QUANTISED_BLOCK
from pcscale.config.schema import PlanConfig
from pcscale.families.axes import FFN
from pcscale.families.hf_config import stored_dtype
from pcscale.families.plan import Plan, PlannedWeight, Shapes
from pcscale.memory import working
from pcscale.memory.deployment import FLOAT_BYTES, ONE_GPU, Deployment
from pcscale.projection.costs import sweep_flops, visit_flops
from pcscale.projection.layout import AHEAD, overlap_bytes, record_bytes, record_format, record_layout, trainable_values
from pcscale.projection.owners import rounds

KNOBS = (
    *("bf16", "base_precision", "record_dtype", "moments", "residency", "base_home", "gradient_home"),
    *("gradient_checkpointing", "per_device_train_batch_size", "gradient_accumulation_steps", "deepspeed"),
)
"""The settings that change what a run takes and not what it computes, most exact choices first: of settings that cost
about the same the first in this order is chosen. They are all that predictions with one memo differ in."""
Value = TypeVar("Value")


class Shared(Generic[Value]):
    """A property that is computed once for each combination of the settings that it depends on."""

    def __init__(self, settings: tuple[str, ...], compute: Callable[[Any], Value]) -> None:
        self.settings, self.compute, self.__doc__ = settings, compute, compute.__doc__

    def __get__(self, owner: "SharedSizes", owner_type: type) -> Value:
        memo = owner.memo
        key = (self, *[getattr(owner.config, setting) for setting in self.settings])
        if key not in memo:
            memo[key] = self.compute(owner)
        return memo[key]


def shared(*knobs: str) -> Callable[[Callable[[Any], Value]], Shared[Value]]:
    """Make a method a `Shared` property; name every one of `KNOBS` that it depends on."""
    return lambda compute: Shared(knobs, compute)


@dataclass(frozen=True)
class OwnedSizes:
    """The sizes of one rank's matrices. Units: bytes.

    Attributes:
        records: of all its records, those that are moments with them.
        largest: of its largest record.
        overlap: of the buffers that let their motion overlap with work.
        base: of its base weights, as they are kept.
        under_way: of the base weights that are worked on and read ahead at a time.
    """

    records: int
    largest: int
    moments: int
    overlap: int
    base: int
    under_way: int


@dataclass(frozen=True)
class SharedSizes:
    """A run's plan, settings and deployment, with the sizes that follow from them.

    Attributes:
        memo: of the shared properties; every prediction with it has this plan and deployment, and differs in `KNOBS`.
    """

    plan: Plan
    config: PlanConfig
    deployment: Deployment = ONE_GPU
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def projects(self) -> bool:
        """True if there are records; hard pruning has none."""
        return self.config.method == "projected"

    @property
    def weight_bytes(self) -> int:
        """Bytes of a value of the compressed model."""
        return working.weight_bytes(self.config)

    @property
    def product_bytes(self) -> int:
        """Bytes of a value in the base's forward and in the sweep's products."""
        return 2 if self.deployment.on_gpu and self.config.bf16 else FLOAT_BYTES

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of a value of the base as it is stored."""
        return FLOAT_BYTES if stored_dtype(self.plan.base_config) == "float32" else 2

    @shared()
    def matrix_values(self) -> int:
        """Values of all compressed matrices."""
        return sum(math.prod(planned.shape) * count for planned, count in self.plan.alike)

    @shared()
    def basis_bytes(self) -> int:
        """The dense S of a rotated residual stream with its scales; 0 for one that selects."""
        return working.basis_bytes(self.plan) * self.config.rotates

    @property
    def rebuilt_values(self) -> int:
        """Entries that give one layer's dropped ffn channels from the kept ones; 0 where the start rebuilds none."""
        kept = self.plan.sizes[FFN]
        return kept * (self.plan.base_sizes[FFN] - kept) * self.config.rebuilds

    @shared("base_precision")
    def base_bytes(self) -> int:
        """The base's matrices as `base_precision` keeps them."""
        return sum(self._kept_bytes(planned) * count for planned, count in self.plan.alike)

    def _kept_bytes(self, planned: PlannedWeight) -> int:
        values = math.prod(planned.base_shape)
        if self.config.base_precision == "int8":
            return values + FLOAT_BYTES * -(-values // QUANTISED_BLOCK)
        return values * self.stored_bytes

    @shared("base_precision", "record_dtype", "moments")
    def record_bytes(self) -> tuple[int, int]:
        """All records of all ranks, and one of each size."""
        form = record_format(self.config)
        sizes = [(record_bytes(planned, form), count) for planned, count in self.plan.alike]
        return sum(size * count for size, count in sizes), sum({size for size, _ in sizes})

    @shared()
    def record_values(self) -> int:
        """Trainable values in records, of all ranks; 0 for hard pruning."""
        values = sum(trainable_values(planned, self.config.rank) * count for planned, count in self.plan.alike)
        return values * self.projects

    @property
    def direct_values(self) -> int:
        """Trainable values without a record: norms and biases; for hard pruning everything."""
        return self.plan.parameters - self.matrix_values * self.projects

    @shared()
    def sweep_flops(self) -> tuple[int, int]:
        """Operations of composing and of pulling back, of all ranks; 0 for hard pruning."""
        compose, pull_back = sweep_flops(self.plan, self.config.product_rank)
        return compose * self.projects, pull_back * self.projects

    @shared("base_precision", "record_dtype", "moments")
    def owned(self) -> OwnedSizes:
        """The sizes of the rank that holds most."""
        form, of_shapes = record_format(self.config), {}
        for planned, _ in self.plan.alike:
            moments = sum(spec.num_bytes for name, spec in record_layout(planned, form).items() if "." in name)
            of_shapes[planned.shapes] = record_bytes(planned, form), moments, self._kept_bytes(planned)
        found = []
        for shapes in self._owned_shapes:
            records, moments, base = ([of_shapes[pair][part] for pair in shapes] for part in range(3))
            under_way = max((sum(base[first : first + AHEAD + 1]) for first in range(len(base))), default=0)
            sizes = (sum(records), max(records, default=0), sum(moments), overlap_bytes(records))
            found.append(OwnedSizes(*sizes, sum(base), under_way))
        return max(found, key=lambda sizes: sizes.records)

    @shared()
    def _owned_shapes(self) -> list[list[Shapes]]:
        """By rank, the shapes of the matrices that it owns, in the order of its visits."""
        shapes, ranks = self.plan.shapes, self.deployment.ranks
        costs = {str(position): visit_flops(*pair, self.config.rank) for position, pair in enumerate(shapes)}
        by_round = rounds(costs, ranks)
        return [[shapes[int(name)] for one in by_round if (name := one[rank]) is not None] for rank in range(ranks)]
