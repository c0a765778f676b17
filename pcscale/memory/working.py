"""What lives for a moment only: activations, logits, the products of a visit. Bytes from sizes alone, without torch."""

import math
from functools import lru_cache

from pcscale.common.sizes import (
    CACHED_PROBABILITY_BYTES,
    HIDDEN_BUDGET_BYTES,
    LOGIT_CHUNK_VALUES,
    MERGE_BLOCK,
    QUANTISED_BLOCK,
    token_bytes,
)
from pcscale.config.schema import RunConfig
from pcscale.families.axes import FFN, HEAD_DIM, KV_HEADS, Q_HEADS, RESIDUAL, VOCAB, Sizes
from pcscale.families.hf_config import stored_dtype
from pcscale.families.plan import Plan, PlannedWeight
from pcscale.families.spec import Config, Kind
from pcscale.memory.place import FLOAT_BYTES
from pcscale.projection.costs import Shape, out_side_first
from pcscale.projection.layout import RecordFormat, row_blocks


def stored_bytes(base_config: Config) -> int:
    """Of a base value."""
    return FLOAT_BYTES if stored_dtype(base_config) == "float32" else 2


def kept_base_bytes(planned: PlannedWeight, base_config: Config, config: RunConfig) -> int:
    """One base weight as `base_precision` keeps it."""
    values = math.prod(planned.base_shape)
    if config.base_precision == "int8":
        return values + FLOAT_BYTES * -(-values // QUANTISED_BLOCK)
    return values * stored_bytes(base_config)


def taught_bytes(plan: Plan, config: RunConfig, value: int) -> int:
    """What one rank reads in a step to be taught: the base's weights once a pass, or its tokens of a cache.

    Args:
        value: bytes of a hidden state's value.
    """
    if config.distill is None:
        return 0
    sizes, top_k = plan.base_sizes, config.distill.top_k
    if config.distill.cache is not None and top_k is not None:
        return config.tokens_per_step * top_k * (CACHED_PROBABILITY_BYTES + token_bytes(sizes[VOCAB]))
    batches = max(1, HIDDEN_BUDGET_BYTES // (micro_batch_tokens(config) * sizes[RESIDUAL] * value))
    passes = -(-config.gradient_accumulation_steps // batches)
    # Of the embedding only rows are looked up; where the whole distribution counts, the head stays on the device.
    left_out = (not plan.tied) + (top_k is None)
    values = plan.base_parameters - left_out * sizes[VOCAB] * sizes[RESIDUAL]
    return passes * values * stored_bytes(plan.base_config)


def micro_batch_tokens(config: RunConfig) -> int:
    return config.per_device_train_batch_size * config.sequence_length


def layer_activation_bytes(plan: Plan, config: RunConfig) -> int:
    """What one layer keeps for its backward pass, of one micro batch.

    A norm keeps its input and the normalised one in float32 and what it gives; rotation, attention and the ffn keep
    what their products read. Counted in torch with hooks on saved tensors, for every family
    (tests/memory/test_activations.py).
    """
    sizes, value = plan.sizes, weight_bytes(config)
    norm = 2 * value + FLOAT_BYTES if value < FLOAT_BYTES else 3 * value
    norms = _layer_norms(plan)
    heads = sizes[Q_HEADS] // sizes[HEAD_DIM]
    values = norms[RESIDUAL] * norm * sizes[RESIDUAL]
    # Of a norm over heads the rotation keeps nothing.
    values += (norm - value) * (sizes[Q_HEADS] + sizes[KV_HEADS]) * (norms[HEAD_DIM] > 0)
    values += 2 * value * (sizes[Q_HEADS] + sizes[KV_HEADS]) + FLOAT_BYTES * heads
    values += 4 * value * sizes[FFN]
    return micro_batch_tokens(config) * values


def _layer_norms(plan: Plan) -> Sizes:
    found: Sizes = {RESIDUAL: 0, HEAD_DIM: 0}
    for weight in plan.family.layer:
        applies = weight.when is None or weight.when(plan.base_config)
        if weight.kind is Kind.NORM and applies and weight.axes[0] in found:
            found[weight.axes[0]] += 1
    return found


def weight_bytes(config: RunConfig) -> int:
    """Of a value of the compressed model."""
    return 2 if config.bf16 else FLOAT_BYTES


def activation_bytes(plan: Plan, config: RunConfig) -> int:
    """What the backward pass of one micro batch needs; with checkpointing each layer's input, and one layer anew."""
    hidden = micro_batch_tokens(config) * plan.sizes[RESIDUAL]
    layer = layer_activation_bytes(plan, config)
    # The last norm, and the copy of what it gives that the loss reads.
    outside = hidden * (FLOAT_BYTES + 3 * weight_bytes(config))
    if config.gradient_checkpointing:
        return plan.num_layers * hidden * weight_bytes(config) + layer + outside
    return plan.num_layers * layer + outside


def one_layer_bytes(sizes: Sizes, config: RunConfig, value_bytes: int) -> int:
    """What a layer's forward holds at a time without a backward pass: the ffn's, beside the residual stream's."""
    return micro_batch_tokens(config) * (3 * sizes[FFN] + 4 * sizes[RESIDUAL]) * value_bytes


def logit_bytes(plan: Plan, config: RunConfig, copies: int) -> int:
    """So many float32 copies of one chunk."""
    return copies * min(micro_batch_tokens(config) * plan.sizes[VOCAB], LOGIT_CHUNK_VALUES) * FLOAT_BYTES


def block_bytes(planned: PlannedWeight, value_bytes: int) -> int:
    """The base weight, or a block of its rows, in the dtype of the products."""
    rows = max(block.stop - block.start for block in row_blocks(planned))
    return rows * planned.base_shape[1] * value_bytes


def visit_bytes(planned: PlannedWeight, form: RecordFormat, value_bytes: int) -> int:
    """What a visit holds beside base and record: factors in the dtype of the products, their gradients, and products.

    Args:
        value_bytes: of the products' dtype.
    """
    return _visit_bytes(planned.base_shape, planned.shape, _whole_rows(planned), form, value_bytes)


def _whole_rows(planned: PlannedWeight) -> int:
    return max(block.stop - block.start for block in row_blocks(planned))


@lru_cache(maxsize=4096)
def _visit_bytes(base_shape: Shape, shape: Shape, rows: int, form: RecordFormat, value_bytes: int) -> int:
    (base_out, base_in), (out, in_) = base_shape, shape
    factors = _factor_values(base_shape, shape, form.rank)
    copies = 0 if value_bytes == FLOAT_BYTES and form.dtype == "float32" else factors
    if base_out == out:
        # The gradient of one block beside the sum of those before, or the kept columns beside a product.
        return (copies + max(2 * factors, 2 * rows * in_)) * value_bytes
    product = out * base_in if out_side_first(base_shape, shape, form.rank) else base_out * in_
    # Gradients beside one product, or the product beside the kept entries that it is added to.
    return (copies + max(factors + product, 2 * product)) * value_bytes


def _factor_values(base_shape: Shape, shape: Shape, rank: int | None) -> int:
    """Values of a matrix's projections, D whole or as factors."""
    sides = [(big, small) for big, small in zip(base_shape, shape, strict=True) if big != small]
    return sum(big * small if rank is None else rank * (big + small) for big, small in sides)


def merge_need_bytes(plan: Plan, rank: int | None = None, rotates: bool = False) -> int:
    """Anonymous memory that merging takes at most, the interpreter aside: the buffers of merging/blocks.py.

    They are used again from matrix to matrix, so each is as large as the matrix that needs most of it.

    Args:
        rotates: whether S of the residual stream is dense; scaled for a norm it is a copy.
    """
    sizes = [_merge_buffers(planned, rank) for planned, _ in plan.alike]
    scaled = basis_bytes(plan) if rotates else 0
    return FLOAT_BYTES * sum(max(column) for column in zip(*sizes, strict=True)) + scaled


def basis_bytes(plan: Plan) -> int:
    """The dense S of a rotated residual stream, and a scale for each norm that is read; 0 where its width stays."""
    base, compressed = plan.base_sizes[RESIDUAL], plan.sizes[RESIDUAL]
    norms = {planned.weight.reads for planned in plan.weights} - {None}
    return FLOAT_BYTES * base * (compressed + len(norms)) * (base != compressed)


def rebuilt_values(plan: Plan) -> int:
    """What kept ffn channels of one layer say of the dropped ones."""
    return plan.sizes[FFN] * (plan.base_sizes[FFN] - plan.sizes[FFN])


def _merge_buffers(planned: PlannedWeight, rank: int | None) -> tuple[int, int, int, int, int]:
    """Values of the buffers `in`, `out`, `base`, of the factors of a low rank, and of the results: kept entries,
    product and two conversions."""
    base_out, base_in = planned.base_shape
    rows, columns = min(base_out, MERGE_BLOCK), min(base_in, MERGE_BLOCK)
    in_side, out_side = base_in * columns * planned.projects_in, base_out * rows * planned.projects_out
    factors = (rank or 0) * (max(base_out, base_in) + MERGE_BLOCK)
    return in_side, out_side, max(in_side, out_side), factors, 4 * rows * columns
