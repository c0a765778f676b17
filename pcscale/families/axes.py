"""The named dimensions that weights are made of. An axis is named; a dim is its index in a tensor."""

from enum import StrEnum


class Axis(StrEnum):
    """One named weight dimension. The value is the name that messages and files use."""

    RESIDUAL = "residual"
    FFN = "ffn"
    Q_HEADS = "q_heads"
    """Query heads times head_dim."""
    KV_HEADS = "kv_heads"
    """Key (or value) heads times head_dim."""
    HEAD_DIM = "head_dim"
    VOCAB = "vocab"


RESIDUAL, FFN, Q_HEADS, KV_HEADS, HEAD_DIM, VOCAB = Axis

PROJECTED_AXES = (RESIDUAL, FFN)
"""The axes that compression narrows; all others keep their size."""

Sizes = dict[Axis, int]
