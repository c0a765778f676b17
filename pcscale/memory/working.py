"""Bytes that live for a moment only: activations, logits, the products of a visit, the buffers of a merge. Needs no
torch."""

import math
from collections import Counter

from pcscale.common.sizes import MERGE_BLOCK
from pcscale.config.schema import PlanConfig
from pcscale.families.axes import FFN, HEAD_DIM, KV_HEADS, Q_HEADS, RESIDUAL
from pcscale.families.plan import Plan, PlannedWeight
from pcscale.families.spec import Kind
from pcscale.memory.deployment import FLOAT_BYTES
from pcscale.projection.costs import out_side_first
from pcscale.projection.layout import AUX, RecordFormat, row_blocks, value_shapes


def weight_bytes(config: PlanConfig) -> int:
    """Bytes of a value of the compressed model."""
    return 2 if config.bf16 else FLOAT_BYTES


def micro_batch_tokens(config: PlanConfig) -> int:
    return config.per_device_train_batch_size * config.sequence_length


def forward_products(plan: Plan, config: PlanConfig, of_base: bool = False) -> int:
    """Multiplications of one token's way through all layers of the compressed model, or of the base."""
    sizes = plan.base_sizes if of_base else plan.sizes
    alike = [
        (planned.shapes[not of_base], count) for planned, count in plan.alike if planned.weight.kind is Kind.LINEAR
    ]
    linear = sum(math.prod(shape) * count for shape, count in alike)
    return linear + plan.num_layers * sizes[Q_HEADS] * config.sequence_length


def layer_activation_bytes(plan: Plan, config: PlanConfig) -> int:
    """Activations of one micro batch that one layer keeps for its backward pass.

    A norm keeps its input and the normalised one in float32 and what it gives; rotation, attention and the ffn keep
    what their products read. Counted in torch with hooks on saved tensors, for every family
    (tests/memory/test_activations.py).
    """
    sizes, value = plan.sizes, weight_bytes(config)
    norm = 2 * value + FLOAT_BYTES if value < FLOAT_BYTES else 3 * value
    counted = [weight for weight in plan.family.layer if weight.kind is Kind.NORM]
    norms = Counter(weight.axes[0] for weight in counted if weight.when is None or weight.when(plan.base_config))
    heads = sizes[Q_HEADS] // sizes[HEAD_DIM]
    values = norms[RESIDUAL] * norm * sizes[RESIDUAL]
    # Of a norm over heads the rotation keeps nothing.
    values += (norm - value) * (sizes[Q_HEADS] + sizes[KV_HEADS]) * (norms[HEAD_DIM] > 0)
    values += 2 * value * (sizes[Q_HEADS] + sizes[KV_HEADS]) + FLOAT_BYTES * heads
    values += 4 * value * sizes[FFN]
    return micro_batch_tokens(config) * values


def activation_bytes(plan: Plan, config: PlanConfig) -> int:
    """Activations that the backward pass of one micro batch needs; with checkpointing each layer's input, and one
    layer anew."""
    hidden = micro_batch_tokens(config) * plan.sizes[RESIDUAL]
    layer = layer_activation_bytes(plan, config)
    # The last norm, and the copy of what it gives that the loss reads.
    outside = hidden * (FLOAT_BYTES + 3 * weight_bytes(config))
    if config.gradient_checkpointing:
        return plan.num_layers * hidden * weight_bytes(config) + layer + outside
    return plan.num_layers * layer + outside


def block_rows(planned: PlannedWeight) -> int:
    """Rows of the base weight that a visit works on at a time."""
    return max(block.stop - block.start for block in row_blocks(planned))


def visit_bytes(planned: PlannedWeight, form: RecordFormat, value_bytes: int) -> int:
    """Factors in the dtype of the products, their gradients, and products: what a visit holds beside base and record.

    Args:
        value_bytes: of the products' dtype.
    """
    (base_out, base_in), (out, in_) = planned.shapes
    factors = sum(math.prod(shape) for name, shape in value_shapes(planned, form.rank).items() if name != AUX)
    copies = 0 if value_bytes == FLOAT_BYTES and form.dtype == "float32" else factors
    if base_out == out:
        # The gradient of one block beside the sum of those before, or the kept columns beside a product.
        return (copies + max(2 * factors, 2 * block_rows(planned) * in_)) * value_bytes
    product = out * base_in if out_side_first(*planned.shapes, form.rank) else base_out * in_
    # Gradients beside one product, or the product beside the kept entries that it is added to.
    return (copies + max(factors + product, 2 * product)) * value_bytes


def basis_bytes(plan: Plan) -> int:
    """The dense S of a rotated residual stream, and a scale for each norm that is read; 0 where its width stays."""
    base, compressed = plan.base_sizes[RESIDUAL], plan.sizes[RESIDUAL]
    norms = {planned.weight.reads for planned in plan.weights} - {None}
    return FLOAT_BYTES * base * (compressed + len(norms)) * (base != compressed)


def merge_need_bytes(plan: Plan, rank: int | None = None, rotates: bool = False) -> int:
    """Anonymous memory that merging takes at most, the interpreter aside: the buffers of merging/blocks.py.

    They are used again from matrix to matrix, so each is as large as the matrix that needs most of it.

    Args:
        rotates: whether S of the residual stream is dense; scaled for a norm it is a copy.
    """
    sizes = [_merge_buffers(planned, rank) for planned, _ in plan.alike]
    scaled = basis_bytes(plan) if rotates else 0
    return FLOAT_BYTES * sum(max(column) for column in zip(*sizes, strict=True)) + scaled


def _merge_buffers(planned: PlannedWeight, rank: int | None) -> tuple[int, int, int, int, int]:
    """Values of the buffers `in`, `out`, `base`, of the factors of a low rank, and of the results: kept entries,
    product and two conversions."""
    base_out, base_in = planned.base_shape
    rows, columns = min(base_out, MERGE_BLOCK), min(base_in, MERGE_BLOCK)
    in_side, out_side = base_in * columns * planned.projects_in, base_out * rows * planned.projects_out
    factors = (rank or 0) * (max(base_out, base_in) + MERGE_BLOCK)
    return in_side, out_side, max(in_side, out_side), factors, 4 * rows * columns
