"""Which configs are accepted, what the others are told, and what becomes of a config.json."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pcscale.common.errors import RequestError
from pcscale.families.hf_config import compressed_config, read_config, stored_dtype
from pcscale.families.registry import FAMILIES, family_of
from tests.families.real_models import LLAMA_1B, SMOLLM2


@pytest.mark.parametrize("model_type", ["gpt2", "LLAMA", None, "llama4"])
def test_an_unsupported_model_type_is_refused_with_the_supported_names(model_type: str | None) -> None:
    with pytest.raises(
        RequestError, match=rf"^some/model: model_type {model_type!r} is not supported\. Supported: "
    ) as error:
        family_of(SMOLLM2 | {"model_type": model_type}, "some/model")
    assert all(f"{name} (" in str(error.value) for name in FAMILIES)


def test_a_config_without_model_type_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^base: model_type None is not supported"):
        family_of({"hidden_size": 3}, "base")


def test_a_quantised_checkpoint_is_refused() -> None:
    config = SMOLLM2 | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(
        RequestError, match=r"^base: the weights are quantised\. Use the checkpoint in its full precision"
    ):
        family_of(config, "base")


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
@pytest.mark.parametrize("value", [None, 0, -1, 2.5, "576", True, [1]])
def test_a_size_that_is_no_positive_whole_number_is_refused(key: str, value: Any) -> None:
    message = f"base: {key} is {value!r}, expected a positive whole number. Restore config.json."
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        family_of(SMOLLM2 | {key: value}, "base")


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "3", False])
def test_an_optional_size_is_checked_where_it_stands(key: str, value: Any) -> None:
    with pytest.raises(
        RequestError, match=rf"^base: {key} is {re.escape(repr(value))}, expected a positive whole number"
    ):
        family_of(SMOLLM2 | {key: value}, "base")


def test_a_hidden_size_that_heads_do_not_divide_needs_a_head_dim() -> None:
    config = SMOLLM2 | {"hidden_size": 580}
    with pytest.raises(
        RequestError,
        match=r"^base: hidden_size 580 is not divisible by num_attention_heads 9 and there is no head_dim\.",
    ):
        family_of(config, "base")
    assert family_of(config | {"head_dim": 64}, "base") is FAMILIES["llama"]


def test_heads_that_cannot_share_key_value_heads_are_refused() -> None:
    with pytest.raises(RequestError, match=r"^base: 9 attention heads cannot share 4 key-value heads\. Restore config"):
        family_of(SMOLLM2 | {"num_key_value_heads": 4}, "base")


def test_the_compressed_config_keeps_rope_scaling_and_leaves_the_base_config_alone() -> None:
    scaling = {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}
    base = LLAMA_1B | {"rope_scaling": scaling, "_name_or_path": "somewhere", "rms_norm_eps": 1e-5}
    before = copy.deepcopy(base)
    config = compressed_config(base, 1344, 5376)
    assert config["rope_scaling"] == scaling
    assert config["rms_norm_eps"] == 1e-5
    assert "_name_or_path" not in config
    config["rope_scaling"]["factor"] = 1.0
    assert base == before


def test_the_compressed_config_states_the_head_dim_that_the_base_only_implied() -> None:
    assert "head_dim" not in SMOLLM2
    assert compressed_config(SMOLLM2, 432, 768)["head_dim"] == 576 // 9
    assert compressed_config(SMOLLM2 | {"head_dim": 48}, 432, 768)["head_dim"] == 48


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({"dtype": None, "torch_dtype": None}, "float32"),
    ],
)
def test_the_stored_dtype_is_read_from_new_and_old_files(changes: dict[str, Any], dtype: str) -> None:
    assert stored_dtype(SMOLLM2 | changes) == dtype


def test_a_config_is_read_as_json_reads_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    assert read_config(tmp_path) == SMOLLM2


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"absent is not a folder\. Name a checkpoint folder or a Hub id"):
        read_config(tmp_path / "absent")


def test_a_folder_without_config_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"has no config\.json\. Name a folder with a Hugging Face checkpoint"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": ', r"config\.json is not JSON \(.*\)\. Restore the file"),
        (b"", r"config\.json is not JSON"),
        (b"\xff\xfe\x00", r"config\.json is not JSON"),
        (b"[1, 2]", r"config\.json holds no JSON object\. Restore the file"),
    ],
)
def test_a_broken_config_json_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_config(tmp_path)
