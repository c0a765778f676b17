"""The compressed model as an ordinary one, and loading any stock checkpoint."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pcscale.common.errors import RequestError
from pcscale.model.compressed import build_compressed, load_stock
from tests.projection.parts import CPU, Compression, TinyBase, token_batches
from tests.reference import hard_pruned
from tests.tiny import CASES, build_base


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_a_compressed_model_is_a_stock_model_in_training_mode(family: str, tied: bool, tiny_base: TinyBase) -> None:
    compression = Compression.of(tiny_base(family, tied))
    model = compression.model()
    stock_config = AutoConfig.from_pretrained(compression.base.folder)
    assert type(model) is type(AutoModelForCausalLM.from_config(stock_config))
    assert model.training
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model.num_parameters() == compression.plan.parameters


def test_the_weights_are_copies_of_what_was_given(tiny_base: TinyBase) -> None:
    compression = Compression.of(tiny_base("llama", False))
    given = {name: weight.clone() for name, weight in hard_pruned(compression.weights, compression.kept).items()}
    model = build_compressed(compression.plan, given, CPU, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(tensor.abs().max() > 0 for tensor in given.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_the_dtype_asked_for_and_rotary_buffers_stay_float32(
    dtype: torch.dtype, tiny_base: TinyBase
) -> None:
    model = Compression.of(tiny_base("llama", False)).model(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_a_compressed_model_is_saved_and_loaded_by_stock_transformers(tiny_base: TinyBase, tmp_path: Path) -> None:
    model = Compression.of(tiny_base("qwen3", True)).model().eval()
    model.save_pretrained(tmp_path)
    ids_BT = token_batches(1)[0]
    loaded = load_stock(tmp_path, CPU, torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(ids_BT).logits, model(ids_BT).logits)


def test_a_stock_model_is_loaded_in_the_dtype_asked_for_and_in_evaluation_mode(tmp_path: Path) -> None:
    build_base(tmp_path, dtype=torch.bfloat16)
    model = load_stock(tmp_path, CPU, torch.float32)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("spoil", ["empty", "config", "weights", "absent"])
def test_garbage_is_refused_in_one_line_that_names_the_folder(spoil: str, tmp_path: Path) -> None:
    if spoil != "empty":
        build_base(tmp_path)
    if spoil == "config":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "no such type"}))
    elif spoil == "weights":
        (tmp_path / "model.safetensors").write_bytes(b"not a tensor in here")
    elif spoil == "absent":
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        RequestError, match=f"^{re.escape(str(tmp_path))}: stock transformers cannot load it: "
    ) as caught:
        load_stock(tmp_path, CPU, torch.float32)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) + 400
