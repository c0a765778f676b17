"""The plan of a compression: a base, new widths, and both shapes of every weight. All counts follow from it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from pcscale.families.axes import FFN, PROJECTED_AXES, Q_HEADS, RESIDUAL, Sizes
from pcscale.families.hf_config import compressed_config
from pcscale.families.spec import Config, Family, Kind, Weight, is_tied, sizes_of

Shape = tuple[int, int]
Shapes = tuple[Shape, Shape]
"""A matrix's shape in the base, and its compressed one."""


@dataclass(frozen=True)
class PlannedWeight:
    """One tensor with its base shape and its compressed shape."""

    weight: Weight
    base_shape: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def is_matrix(self) -> bool:
        return self.weight.kind.is_matrix

    @property
    def projects_out(self) -> bool:
        return self.shape[0] != self.base_shape[0]

    @property
    def projects_in(self) -> bool:
        return self.is_matrix and self.shape[1] != self.base_shape[1]

    @property
    def shapes(self) -> Shapes:
        """Both shapes of a matrix."""
        (O, I), (o, i) = self.base_shape, self.shape
        return (O, I), (o, i)


@dataclass(frozen=True)
class Plan:
    """A base's config, and the widths that it is cut to."""

    family: Family
    base_config: Config
    hidden_size: int
    intermediate_size: int

    @classmethod
    def whole(cls, family: Family, base_config: Config) -> "Plan":
        """The plan that cuts nothing: the base at its own widths."""
        return cls(family, base_config, base_config["hidden_size"], base_config["intermediate_size"])

    @cached_property
    def config(self) -> Config:
        """The compressed model's config.json."""
        return compressed_config(self.base_config, self.hidden_size, self.intermediate_size)

    @cached_property
    def base_sizes(self) -> Sizes:
        return sizes_of(self.base_config)

    @cached_property
    def sizes(self) -> Sizes:
        return sizes_of(self.config)

    @cached_property
    def weights(self) -> tuple[PlannedWeight, ...]:
        """Every tensor, in the order of a forward pass."""
        return tuple(
            PlannedWeight(weight, weight.shape(self.base_sizes), weight.shape(self.sizes))
            for weight in self.family.weights(self.base_config)
        )

    @property
    def matrices(self) -> Iterator[PlannedWeight]:
        return (planned for planned in self.weights if planned.is_matrix)

    @cached_property
    def alike(self) -> tuple[tuple[PlannedWeight, int], ...]:
        """The first of all matrices that are alike in kind and both shapes, with their number."""
        found: dict[tuple[Kind, Shapes], list[PlannedWeight]] = {}
        for planned in self.matrices:
            found.setdefault((planned.weight.kind, planned.shapes), []).append(planned)
        return tuple((same[0], len(same)) for same in found.values())

    @cached_property
    def shapes(self) -> tuple[Shapes, ...]:
        """Both shapes of every matrix, in the order of a forward pass."""
        return tuple(planned.shapes for planned in self.matrices)

    @cached_property
    def base_layer_values(self) -> int:
        """Number of values in the matrices of one layer of the base."""
        return sum(math.prod(planned.base_shape) for planned in self.matrices if planned.weight.layer == 0)

    @property
    def num_layers(self) -> int:
        return self.base_config["num_hidden_layers"]

    @property
    def tied(self) -> bool:
        return is_tied(self.base_config)

    @property
    def base_parameters(self) -> int:
        """Number of the base's parameters, tied embeddings counted once."""
        return sum(math.prod(planned.base_shape) for planned in self.weights)

    @cached_property
    def parameters(self) -> int:
        return sum(math.prod(planned.shape) for planned in self.weights)

    @property
    def keep_fraction(self) -> float:
        return self.parameters / self.base_parameters

    def train_flops_per_token(self, sequence_length: int) -> int:
        """FLOPs of forward and backward: 6 for each weight that multiplies, and attention at half the square."""
        multiplied = sum(
            math.prod(planned.shape)
            for planned in self.matrices
            # The embedding is looked up; it multiplies only where it is the head as well.
            if planned.weight.kind is not Kind.EMBEDDING or self.tied
        )
        attention = self.num_layers * self.sizes[Q_HEADS] * sequence_length
        return 6 * multiplied + 6 * attention

    def kept_axes(self) -> Iterator[tuple[str, int, int]]:
        """Name, base size and compressed size of each set of kept indices: one residual, and an ffn for each layer."""
        yield kept_name(RESIDUAL, None), self.base_sizes[RESIDUAL], self.sizes[RESIDUAL]
        for layer in range(self.num_layers):
            yield kept_name(FFN, layer), self.base_sizes[FFN], self.sizes[FFN]


def kept_name(axis: str, layer: int | None) -> str:
    """The name of the kept indices (or of the scores) that an axis has in a layer."""
    assert axis in PROJECTED_AXES
    return RESIDUAL.value if axis == RESIDUAL else f"{FFN.value}.{layer}"
