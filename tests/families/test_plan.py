"""Counts of a plan: the published figures, stock transformers, and products counted one by one."""

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from pcscale.families.plan import Plan, PlannedWeight, kept_name
from pcscale.families.registry import FAMILIES
from pcscale.families.spec import Config
from pcscale.families.widths import plan_widths
from pcscale.projection.costs import compose_flops, pull_back_flops, sweep_flops
from pcscale.projection.layout import trainable_values
from tests.families.real_models import LLAMA_1B, LLAMA_1B_UNTIED, LLAMA_8B, REAL, SMOLLM2
from tests.family_checks import stock_model

LLAMA = FAMILIES["llama"]
FP32_ADAM_BYTES = 16
"""Weight, gradient and two moments of one trainable value."""


def _plan(config: Config, hidden_size: int, intermediate_size: int) -> Plan:
    return plan_widths(LLAMA, config, hidden_size, intermediate_size)


@pytest.mark.parametrize(
    ("config", "widths", "compressed", "trainable", "trainable_gib", "pruned_gib"),
    [
        (LLAMA_1B, (1344, 5376), "0.63", "3.05", "45.5", "9.4"),
        (LLAMA_1B_UNTIED, (1344, 5376), "0.80", "3.23", "48.1", "11.9"),
        (LLAMA_8B, (1056, 3168), "0.94", "6.28", "93.5", "14.0"),
        (LLAMA_8B, (3072, 9216), "4.51", "20.04", "298.6", "67.2"),
        (SMOLLM2, (432, 768), "0.07", "0.23", "3.4", "1.1"),
    ],
)
def test_published_widths_cost_what_the_method_states(
    config: Config, widths: tuple[int, int], compressed: str, trainable: str, trainable_gib: str, pruned_gib: str
) -> None:
    plan = _plan(config, *widths)
    assert f"{plan.parameters / 1e9:.2f}" == compressed
    assert f"{sum(map(trainable_values, plan.weights)) / 1e9:.2f}" == trainable
    assert f"{sum(map(trainable_values, plan.weights)) * FP32_ADAM_BYTES / 2**30:.1f}" == trainable_gib
    assert f"{plan.parameters * FP32_ADAM_BYTES / 2**30:.1f}" == pruned_gib


def test_the_half_of_smollm2_has_71_and_230_million_values() -> None:
    plan = _plan(SMOLLM2, 432, 768)
    assert (round(plan.parameters / 1e6), round(sum(map(trainable_values, plan.weights)) / 1e6)) == (71, 230)


@pytest.mark.parametrize(
    ("config", "widths", "real_base", "percent"),
    [
        (LLAMA_1B, (1344, 5376), LLAMA_1B, "50.9"),
        (LLAMA_1B_UNTIED, (1344, 5376), LLAMA_1B, "64.9"),
        (LLAMA_8B, (1056, 3168), LLAMA_8B, "11.7"),
        (LLAMA_8B, (3072, 9216), LLAMA_8B, "56.2"),
    ],
)
def test_kept_shares_are_counted_against_the_real_base(
    config: Config, widths: tuple[int, int], real_base: Config, percent: str
) -> None:
    plan, real = _plan(config, *widths), _plan(real_base, *widths)
    assert f"{100 * plan.parameters / real.base_parameters:.1f}" == percent
    if config is real_base:
        assert plan.keep_fraction == plan.parameters / real.base_parameters


def test_smollm2_has_the_parameters_of_its_model_card() -> None:
    assert _plan(SMOLLM2, 432, 768).base_parameters == 134_515_008


@pytest.mark.parametrize(
    ("config", "widths"), [(LLAMA_1B, (1344, 5376)), (LLAMA_8B, (3072, 9216)), (SMOLLM2, (432, 768))]
)
def test_real_models_are_counted_as_stock_transformers_counts_them(
    config: Config, widths: tuple[int, int], tmp_path: Path
) -> None:
    plan = _plan(config, *widths)
    with torch.device("meta"):
        base, compressed = stock_model(tmp_path / "base", config), stock_model(tmp_path / "small", plan.config)
    assert plan.base_parameters == base.num_parameters()
    assert plan.parameters == compressed.num_parameters()


def test_trainable_values_are_deltas_aux_norms_and_biases_counted_one_by_one() -> None:
    config = LLAMA_1B | {"attention_bias": True}
    R, F, Q, K, V, layers = 2048, 8192, 32 * 64, 8 * 64, 128256, 16
    r, f = 1344, 5376
    layer = (
        (Q * r + R * r)  # q_proj: aux, D_in
        + 2 * (K * r + R * r)  # k_proj, v_proj
        + (r * Q + r * R)  # o_proj: aux, D_out
        + 2 * (f * r + f * F + R * r)  # gate_proj, up_proj: aux, D_out, D_in
        + (r * f + r * R + F * f)  # down_proj
        + 2 * r  # norms
        + (Q + 2 * K + r)  # biases
    )
    assert sum(map(trainable_values, _plan(config, r, f).weights)) == (V * r + R * r) + layers * layer + r


def _matmul_flops(*shapes: tuple[int, int]) -> int:
    """Operations of a chain of products, left to right, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        result = torch.empty(shapes[0], device="meta")
        for shape in shapes[1:]:
            result = result @ torch.empty(shape, device="meta")
    return counter.get_total_flops()


def _compose_by_hand(planned: PlannedWeight) -> int:
    (O, I), (o, i) = planned.base_shape, planned.shape
    if planned.projects_out and planned.projects_in:
        left = _matmul_flops((o, O), (O, I), (I, i))
        right = _matmul_flops((O, I), (I, i)) + _matmul_flops((o, O), (O, i))
        return min(left, right)
    if planned.projects_out:
        return _matmul_flops((o, O), (O, I))
    return _matmul_flops((O, I), (I, i)) if planned.projects_in else 0


def _pull_back_by_hand(planned: PlannedWeight) -> int:
    """The cheapest of every pair of orders; both gradients may share `W @ p_in`, or nothing at all."""
    (O, I), (o, i) = planned.base_shape, planned.shape
    out_orders = [
        _matmul_flops((O, I), (I, i)) + _matmul_flops((o, i), (i, O)),  # G @ (W @ p_in).T
        _matmul_flops((o, i), (i, I), (I, O)),  # (G @ p_in.T) @ W.T
    ]
    in_orders = [
        _matmul_flops((o, O), (O, I)) + _matmul_flops((I, o), (o, i)),  # (p_out @ W).T @ G
        _matmul_flops((O, o), (o, i)) + _matmul_flops((I, O), (O, i)),  # W.T @ (p_out.T @ G)
    ]
    if planned.projects_out and planned.projects_in:
        return min(first + second for first, second in product(out_orders, in_orders))
    if planned.projects_out:
        return _matmul_flops((o, I), (I, O))
    return _matmul_flops((I, O), (O, i)) if planned.projects_in else 0


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("Llama-3.2-1B", (1344, 5376)),
        ("Llama-3.2-1B", (64, 8192)),
        ("Llama-3.2-1B", (2048, 64)),
        ("Llama-3.1-8B", (1056, 14000)),
        ("SmolLM2-135M", (432, 768)),
    ],
)
def test_compose_and_pull_back_flops_equal_products_counted_one_by_one(name: str, widths: tuple[int, int]) -> None:
    plan = _plan(REAL[name] | {"num_hidden_layers": 2}, *widths)
    for planned in plan.matrices:
        assert compose_flops(*planned.shapes) == _compose_by_hand(planned), planned.name
        assert pull_back_flops(*planned.shapes) == _pull_back_by_hand(planned), planned.name
    assert sweep_flops(plan)[0] == sum(map(_compose_by_hand, plan.matrices))
    assert sweep_flops(plan)[1] == sum(map(_pull_back_by_hand, plan.matrices))


@pytest.mark.parametrize("tied", [True, False])
def test_train_flops_equal_those_of_the_stock_model(tied: bool, tmp_path: Path) -> None:
    sequence_length = 256
    plan = _plan(SMOLLM2 | {"num_hidden_layers": 2, "tie_word_embeddings": tied}, 288, 512)
    with torch.device("meta"):
        (tmp_path / "config.json").write_text(AutoConfig.for_model(**plan.config).to_json_string())
        config = AutoConfig.from_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        tokens_BT = torch.zeros(1, sequence_length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens_BT).logits.sum().backward()
    # Eager attention computes the whole square, of which a causal model needs half.
    attention = plan.train_flops_per_token(sequence_length) - plan.train_flops_per_token(0)
    expected = plan.train_flops_per_token(sequence_length) + attention
    assert counter.get_total_flops() == expected * sequence_length


def test_kept_axes_are_one_residual_and_one_ffn_set_a_layer() -> None:
    plan = _plan(LLAMA_1B | {"num_hidden_layers": 2}, 1344, 5376)
    assert list(plan.kept_axes()) == [("residual", 2048, 1344), ("ffn.0", 8192, 5376), ("ffn.1", 8192, 5376)]
    assert kept_name("residual", 1) == "residual"


def test_a_side_that_keeps_its_size_has_no_projection() -> None:
    plan = _plan(SMOLLM2, 576, 768)
    for planned in plan.weights:
        projected = {"out": planned.projects_out, "in": planned.projects_in}
        leaf = planned.name.split(".")[-2]
        assert projected == {"out": leaf in ("gate_proj", "up_proj"), "in": leaf == "down_proj"}
        if planned.shape == planned.base_shape:
            assert trainable_values(planned) == math.prod(planned.base_shape)
            if planned.is_matrix:
                assert compose_flops(*planned.shapes) == pull_back_flops(*planned.shapes) == 0
