"""Every supported family, and the config variants that change its weights, against stock transformers."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import CONFIG_MAPPING, PreTrainedModel

from pcscale.common.errors import RequestError
from pcscale.families.hf_config import read_config
from pcscale.families.registry import FAMILIES, family_of
from pcscale.families.widths import plan_widths
from tests.family_checks import NARROW, FamilyChecks, parameter_shapes, stock_model
from tests.tiny import FAMILIES as TINY_FAMILIES
from tests.tiny import build_base


class TestLlama(FamilyChecks):
    family = "llama"


class TestLlamaWithAttentionBiases(FamilyChecks):
    family = "llama"
    changes: ClassVar = {"attention_bias": True}


class TestLlamaWithMlpBiases(FamilyChecks):
    family = "llama"
    changes: ClassVar = {"mlp_bias": True}


class TestLlamaWithWideHeads(FamilyChecks):
    family = "llama"
    changes: ClassVar = {"head_dim": 12}


class TestMistral(FamilyChecks):
    family = "mistral"


class TestMistralWithWideHeads(FamilyChecks):
    family = "mistral"
    changes: ClassVar = {"head_dim": 12}


class TestQwen2(FamilyChecks):
    family = "qwen2"


class TestQwen3(FamilyChecks):
    family = "qwen3"


class TestQwen3WithAttentionBiases(FamilyChecks):
    family = "qwen3"
    changes: ClassVar = {"attention_bias": True}


class TestQwen3WithWideHeads(FamilyChecks):
    family = "qwen3"
    changes: ClassVar = {"head_dim": 12}


def test_every_registered_family_has_a_tiny_base() -> None:
    assert set(FAMILIES) == set(TINY_FAMILIES)


def _without(folder: Path, *keys: str, **changes: Any) -> dict[str, Any]:
    config = read_config(folder)
    for key in keys:
        del config[key]
    return config | changes


def _planned_and_stock(config: dict[str, Any], folder: Path) -> tuple[dict, dict, dict, PreTrainedModel]:
    plan = plan_widths(family_of(config, "base"), config, **NARROW)
    planned = {planned.name: planned.base_shape for planned in plan.weights}
    compressed = {planned.name: planned.shape for planned in plan.weights}
    return planned, compressed, plan.config, stock_model(folder, config)


@pytest.mark.parametrize(
    ("family", "missing", "changes"),
    [
        ("llama", ["num_key_value_heads"], {}),  # Llama 1 and 2 as first published
        ("llama", [], {"num_key_value_heads": None}),
        ("llama", ["head_dim", "num_key_value_heads"], {}),
        ("llama", ["tie_word_embeddings"], {}),
        ("llama", ["attention_bias", "mlp_bias"], {}),
        ("mistral", ["head_dim"], {}),
        ("mistral", [], {"head_dim": None}),
        ("mistral", ["tie_word_embeddings"], {}),
        ("qwen2", ["head_dim"], {}),
        ("qwen2", ["tie_word_embeddings"], {}),
        ("qwen3", ["attention_bias", "tie_word_embeddings"], {}),
    ],
)
def test_absent_keys_mean_what_stock_transformers_takes_them_for(
    family: str, missing: list[str], changes: dict[str, Any], tmp_path: Path
) -> None:
    config = _without(build_base(tmp_path / "base", family), *missing, **changes)
    planned, compressed, small_config, model = _planned_and_stock(config, tmp_path / "again")
    assert planned == parameter_shapes(model)
    assert compressed == parameter_shapes(stock_model(tmp_path / "small", small_config))


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("mistral", "num_key_value_heads"),
        ("qwen2", "num_key_value_heads"),
        ("qwen3", "num_key_value_heads"),
        ("qwen3", "head_dim"),
    ],
)
def test_a_size_that_the_config_class_would_make_up_must_be_stated(family: str, key: str, tmp_path: Path) -> None:
    config = _without(build_base(tmp_path, family, hidden_size=24), key)
    derived = {"num_key_value_heads": config["num_attention_heads"], "head_dim": 24 // 4}
    assert getattr(CONFIG_MAPPING[family](), key) != derived[key]
    with pytest.raises(RequestError, match=f"^base: {key} is None, expected a positive whole number"):
        family_of(config, "base")
