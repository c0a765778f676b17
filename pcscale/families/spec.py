"""The rows of a family's table, and the loop that turns them into the weights of one model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from pcscale.common.errors import RequestError
from pcscale.families.axes import FFN, HEAD_DIM, KV_HEADS, Q_HEADS, RESIDUAL, VOCAB, Axis, Sizes

Config = dict[str, Any]
"""A model's config.json."""

Condition = Callable[[Config], bool]


class Kind(StrEnum):
    """The use of a weight: matrices are projected, norms and biases are trained directly."""

    EMBEDDING = "embedding"
    LINEAR = "linear"
    HEAD = "head"
    NORM = "norm"
    BIAS = "bias"

    @property
    def is_matrix(self) -> bool:
        return self in (Kind.EMBEDDING, Kind.LINEAR, Kind.HEAD)


@dataclass(frozen=True)
class Weight:
    """One tensor of a model; in the table of a family its names lack the prefix of a layer, and `layer` is None."""

    name: str
    kind: Kind
    axes: tuple[Axis, ...]  # out before in
    layer: int | None = None  # None: outside the layers
    reads: str | None = None  # the weight of the norm whose output enters it; None: something else does
    when: Condition | None = None  # None: every model of the family has it

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(sizes[axis] for axis in self.axes)

    @property
    def module(self) -> str:
        """The dotted name of the module that owns the tensor."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Family:
    """A model family as data, named by its `model_type`; shapes, counts, starts and merging follow from its tables."""

    name: str
    examples: str
    layer_prefix: str
    """Prefix of the weights of layer number `{layer}`."""
    before: tuple[Weight, ...]
    """Weights used before the first layer."""
    layer: tuple[Weight, ...]
    """Weights of every layer."""
    after: tuple[Weight, ...]
    """Weights used after the last layer."""
    hidden_multiple: Callable[[Config], int] = lambda config: 1
    """The number that the config class wants hidden_size to be divisible by."""
    stated: tuple[str, ...] = ()
    """Sizes that config.json must state, since the config class has a fixed number of its own for an absent one."""

    def weights(self, config: Config) -> Iterator[Weight]:
        """Every tensor of a model with this config, once, in the order in which a forward pass needs them."""
        before, of_layer, after = (
            [weight for weight in table if weight.when is None or weight.when(config)]
            for table in (self.before, self.layer, self.after)
        )
        yield from before
        for layer in range(config["num_hidden_layers"]):
            prefix = self.layer_prefix.format(layer=layer)
            for row in of_layer:
                reads = None if row.reads is None else prefix + row.reads
                yield replace(row, name=prefix + row.name, layer=layer, reads=reads)
        yield from after


def sizes_of(config: Config) -> Sizes:
    """The size of every axis, from a config.json."""
    heads = config["num_attention_heads"]
    head_dim = head_dim_of(config)
    return {
        RESIDUAL: config["hidden_size"],
        FFN: config["intermediate_size"],
        Q_HEADS: heads * head_dim,
        KV_HEADS: (config.get("num_key_value_heads") or heads) * head_dim,
        HEAD_DIM: head_dim,
        VOCAB: config["vocab_size"],
    }


def head_dim_of(config: Config) -> int:
    """The size of one attention head: stated, or the hidden size over the number of heads."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def is_tied(config: Config) -> bool:
    """Tell whether the head is the embedding. The config classes of all families here default to untied."""
    return bool(config.get("tie_word_embeddings", False))


_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_OPTIONAL = ("num_key_value_heads", "head_dim")


def check_config(config: Config, where: str, stated: tuple[str, ...] = ()) -> None:
    """Refuse a config whose sizes are absent, no positive whole numbers or at odds with each other."""
    for key in _REQUIRED + stated + tuple(key for key in _OPTIONAL if config.get(key) is not None):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise RequestError(f"{where}: {key} is {value!r}, expected a positive whole number. Restore config.json.")
    if not config.get("head_dim") and config["hidden_size"] % config["num_attention_heads"]:
        raise RequestError(
            f"{where}: hidden_size {config['hidden_size']} is not divisible by num_attention_heads "
            f"{config['num_attention_heads']} and there is no head_dim. Restore config.json."
        )
    if config["num_attention_heads"] % (config.get("num_key_value_heads") or config["num_attention_heads"]):
        raise RequestError(
            f"{where}: {config['num_attention_heads']} attention heads cannot share "
            f"{config['num_key_value_heads']} key-value heads. Restore config.json."
        )
