"""Legal widths: the search's steps, explicit widths, and the search for a share of the parameters."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from pcscale.common.errors import RequestError
from pcscale.config.schema import DataConfig, RunConfig
from pcscale.families.plan import Plan
from pcscale.families.registry import FAMILIES
from pcscale.families.spec import Config
from pcscale.families.widths import (
    KERNEL_MULTIPLES,
    MAX_STEP_FRACTION,
    SIZE_TOLERANCE,
    make_plan,
    plan_keep,
    plan_parameters,
    plan_widths,
    search_step,
)
from tests.families.real_models import LLAMA_1B, LLAMA_8B, REAL, SMOLLM2
from tests.family_checks import stock_model
from tests.tiny import SIZES

LLAMA, MISTRAL = FAMILIES["llama"], FAMILIES["mistral"]


@pytest.mark.parametrize(
    ("width", "legal", "step"),
    [
        (2048, 32, 64),  # Llama-3.2-1B
        (4096, 32, 64),
        (8192, 1, 64),
        (576, 9, 18),  # SmolLM2: 36 would be 6.25 %
        (1536, 1, 64),
        (1280, 1, 64),  # exactly 5 %
        (1279, 1, 32),
        (48, 1, 2),
        (19, 1, 1),
        (32, 4, 4),  # no step within 5 %: the legal one
        (576, 5, 20),
        (4096, 40, 160),
    ],
)
def test_a_search_step_is_the_kernel_friendliest_legal_one_within_5_percent(width: int, legal: int, step: int) -> None:
    assert search_step(width, legal) == step


def test_every_search_step_is_legal_and_no_friendlier_one_fits() -> None:
    for width in range(16, 4097, 97):
        for legal in (1, 3, 8, 9, 12, 32):
            step = search_step(width, legal)
            fitting = [
                multiple
                for multiple in KERNEL_MULTIPLES
                if any(s % multiple == 0 for s in range(legal, int(MAX_STEP_FRACTION * width) + 1, legal))
            ]
            assert step % legal == 0
            if fitting:
                assert step % fitting[0] == 0
                assert step <= MAX_STEP_FRACTION * width
            else:
                assert step == legal


@pytest.mark.parametrize(
    ("config", "hidden_size", "intermediate_size"),
    [(LLAMA_1B, 1344, 5376), (LLAMA_1B, 448, 1728), (LLAMA_1B, 2048, 1), (LLAMA_8B, 32, 14336), (SMOLLM2, 441, 769)],
)
def test_explicit_legal_widths_are_taken_as_they_are(config: Config, hidden_size: int, intermediate_size: int) -> None:
    plan = plan_widths(LLAMA, config, hidden_size, intermediate_size)
    assert (plan.config["hidden_size"], plan.config["intermediate_size"]) == (hidden_size, intermediate_size)


def test_mistral_takes_any_width() -> None:
    config = SIZES | {"model_type": "mistral", "hidden_size": 32}
    assert plan_widths(MISTRAL, config, 31, 47).config["hidden_size"] == 31


def test_a_width_that_llama_refuses_is_refused_with_the_nearest_legal_ones(tmp_path: Path) -> None:
    with pytest.raises(
        RequestError,
        match=r"^hidden_size 1350 is not legal: family 'llama' needs a multiple of num_attention_heads = 32\. "
        r"Nearest legal: 1344 and 1376\.$",
    ):
        plan_widths(LLAMA, LLAMA_1B, 1350, 5376)
    # The stock class refuses it as well; without that there would be nothing to refuse.
    with pytest.raises(Exception, match="1350"):
        stock_model(tmp_path, LLAMA_1B | {"num_hidden_layers": 1, "hidden_size": 1350})


def test_nearest_legal_widths_stay_between_one_and_the_base() -> None:
    with pytest.raises(RequestError, match=r"Nearest legal: 9\.$"):
        plan_widths(LLAMA, SMOLLM2, 5, 768)
    odd = SMOLLM2 | {"hidden_size": 580, "head_dim": 64}
    with pytest.raises(RequestError, match=r"Nearest legal: 576\.$"):
        plan_widths(LLAMA, odd, 579, 768)


@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size", "message"),
    [
        (0, 768, "hidden_size 0 is not between 1 and the base's 576. Choose a smaller width."),
        (-9, 768, "hidden_size -9 is not between 1 and the base's 576."),
        (585, 768, "hidden_size 585 is not between 1 and the base's 576."),
        (576, 1537, "intermediate_size 1537 is not between 1 and the base's 1536."),
        (576, 1536, "hidden_size and intermediate_size are the base's own: nothing would be compressed."),
    ],
)
def test_explicit_widths_out_of_range_are_refused(hidden_size: int, intermediate_size: int, message: str) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(message)}"):
        plan_widths(LLAMA, SMOLLM2, hidden_size, intermediate_size)


@pytest.mark.parametrize("name", REAL)
def test_the_search_comes_within_1_percent_of_every_wanted_share(name: str) -> None:
    config = REAL[name]
    for per_mille in range(50, 951, 11):
        keep = per_mille / 1000
        plan = plan_keep(LLAMA, config, keep)
        assert plan.keep_fraction == pytest.approx(keep, rel=SIZE_TOLERANCE), keep
        assert plan.hidden_size % config["num_attention_heads"] == 0
        assert 0 < plan.hidden_size <= config["hidden_size"]
        assert 0 < plan.intermediate_size <= config["intermediate_size"]


def _count_by_hand(config: Config, hidden: int, ffn: int) -> int:
    """Parameters of a Llama without biases, written out."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["hidden_size"] // heads
    attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    layer = attention + 3 * hidden * ffn + 2 * hidden
    tables = 1 if config["tie_word_embeddings"] else 2
    return tables * config["vocab_size"] * hidden + config["num_hidden_layers"] * layer + hidden


@pytest.mark.parametrize("name", REAL)
def test_of_widths_within_1_percent_the_search_takes_those_that_cut_the_ffn_by_the_residual_streams_share_to_the_1_5(
    name: str,
) -> None:
    config = REAL[name]
    base_hidden, base_ffn = config["hidden_size"], config["intermediate_size"]
    hidden_step, ffn_step = search_step(base_hidden, config["num_attention_heads"]), search_step(base_ffn, 1)
    for percent in range(10, 91, 20):
        target = percent / 100 * _count_by_hand(config, base_hidden, base_ffn)
        close = []
        for hidden in range(hidden_step, base_hidden + 1, hidden_step):
            counts = {ffn: _count_by_hand(config, hidden, ffn) for ffn in range(ffn_step, base_ffn + 1, ffn_step)}
            ffn = min(counts, key=lambda ffn: abs(counts[ffn] - target))
            if abs(counts[ffn] - target) <= SIZE_TOLERANCE * target:
                close.append((hidden, ffn))
        nearest = min(
            close, key=lambda widths: abs(math.log((widths[0] / base_hidden) ** 1.5 / (widths[1] / base_ffn)))
        )
        found = plan_keep(LLAMA, config, percent / 100)
        assert (found.hidden_size, found.intermediate_size) == nearest, percent


@pytest.mark.parametrize("name", REAL)
def test_found_widths_are_legal_for_explicit_use_and_give_the_same_plan(name: str) -> None:
    found = plan_keep(LLAMA, REAL[name], 0.5)
    assert plan_widths(LLAMA, REAL[name], found.hidden_size, found.intermediate_size) == found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, plan_keep(LLAMA, SMOLLM2, 0.5)),
        ({"keep": 0.3}, plan_keep(LLAMA, SMOLLM2, 0.3)),
        ({"target_params": 5e7}, plan_parameters(LLAMA, SMOLLM2, 5e7, "")),
        ({"hidden_size": 432, "intermediate_size": 768}, plan_widths(LLAMA, SMOLLM2, 432, 768)),
    ],
)
def test_settings_say_the_size_in_one_of_three_ways_and_mean_half_without(
    settings: dict[str, Any], expected: Plan
) -> None:
    config = RunConfig(base="b", output="o", data=DataConfig(train=["t"]), **settings)
    assert make_plan(LLAMA, SMOLLM2, config) == expected


def test_settings_out_of_reach_are_refused_in_the_words_they_were_set_in() -> None:
    config = RunConfig(base="b", output="o", data=DataConfig(train=["t"]), target_params=2e9)
    with pytest.raises(RequestError, match=r"^target_params 2e\+09 means 2,000,000,000 parameters; legal widths"):
        make_plan(LLAMA, SMOLLM2, config)


def test_a_parameter_target_is_met_like_the_share_it_is() -> None:
    whole = plan_keep(LLAMA, LLAMA_8B, 0.5).base_parameters
    assert plan_parameters(LLAMA, LLAMA_8B, 4.5e9, "target_params 4.5e9") == plan_keep(LLAMA, LLAMA_8B, 4.5e9 / whole)


def test_the_search_works_on_a_tiny_base() -> None:
    for family in FAMILIES.values():
        for tied in (True, False):
            config = SIZES | {"model_type": family.name, "tie_word_embeddings": tied}
            plan = plan_keep(family, config, 0.5)
            assert plan.hidden_size % family.hidden_multiple(config) == 0
            assert plan.keep_fraction == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("keep", [0, 1, 1.5, -0.5, float("nan")])
def test_a_share_that_is_none_is_refused(keep: float) -> None:
    with pytest.raises(
        RequestError, match=f"^keep {keep:g} is not a share between 0 and 1. Write 0.5 to keep half of the parameters"
    ):
        plan_keep(LLAMA, SMOLLM2, keep)


def test_a_share_below_the_narrowest_legal_model_is_refused_with_the_reach() -> None:
    least = plan_widths(LLAMA, SMOLLM2, 18, 64).parameters
    with pytest.raises(
        RequestError,
        match=rf"^keep 0\.001 means 134,515 parameters; legal widths of this base reach from {least:,} "
        rf"\(0\.0135 of it\) to below 134,515,008\. Choose a value between\.$",
    ):
        plan_keep(LLAMA, SMOLLM2, 0.001)


@pytest.mark.parametrize("target", [134_515_008, 2e9, 10.0, -5.0, float("nan")])
def test_a_target_out_of_reach_is_refused(target: float) -> None:
    with pytest.raises(RequestError, match=r"^target_params \S+ means .* parameters; legal widths of this base reach"):
        plan_parameters(LLAMA, SMOLLM2, target, f"target_params {target:g}")


@pytest.mark.parametrize("keep", [0.0136, 0.9999])
def test_the_ends_of_the_reach_still_give_a_narrower_model(keep: float) -> None:
    plan = plan_keep(LLAMA, SMOLLM2, keep)
    assert 0 < plan.parameters < plan.base_parameters
