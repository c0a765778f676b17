"""The material that other tests rest on is what they take it for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import CASES, FAMILIES, SIZES, build_base, write_text

FAR_FROM_TRIVIAL = 0.01
"""Norms are at least so far from 1 and biases from 0, on average."""


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_a_base_loads_in_stock_transformers_and_predicts(
    family: str, tied: bool, tiny_base: Callable[[str, bool], Path]
) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(tiny_base(family, tied), output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.model_type == family
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    logits_BTV = model(torch.arange(8).view(1, 8)).logits
    assert logits_BTV.shape == (1, 8, SIZES["vocab_size"])
    assert logits_BTV.std() > FAR_FROM_TRIVIAL


def test_a_session_builds_a_base_once(tiny_base: Callable[[str, bool], Path]) -> None:
    assert tiny_base("llama", True) == tiny_base("llama", True) != tiny_base("llama", False)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_biases_are_not_trivial(family: str, tmp_path: Path) -> None:
    biases = {"attention_bias": True} if family in ("llama", "qwen3") else {}
    tensors = load_file(build_base(tmp_path, family, **biases) / "model.safetensors")
    vectors = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 1}
    assert vectors
    for name, tensor in vectors.items():
        trivial = 0 if name.endswith(".bias") else 1
        assert (tensor - trivial).abs().mean() > FAR_FROM_TRIVIAL, name


def test_a_seed_decides_every_value_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    one, same, other = (
        load_file(build_base(tmp_path / name, seed=seed) / "model.safetensors")
        for name, seed in (("one", 4), ("same", 4), ("other", 5))
    )
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in one.items():
        assert torch.equal(tensor, same[name])
        assert not torch.equal(tensor, other[name])


def test_shards_hold_what_one_file_holds_in_the_dtype_asked_for(tmp_path: Path) -> None:
    whole = load_file(build_base(tmp_path / "whole", dtype=torch.bfloat16) / "model.safetensors")
    folder = build_base(tmp_path / "sharded", dtype=torch.bfloat16, max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    assert whole.keys() == index.keys()
    for name, shard in index.items():
        tensor = load_file(folder / shard)[name]
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, whole[name])


def test_a_base_with_a_tokenizer_reads_and_writes_text(tmp_path: Path) -> None:
    folder = build_base(tmp_path, tokenizer=True)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), json.loads((folder / "config.json").read_text())
    tokens = tokenizer("The miller painted the map.")["input_ids"]
    assert tokenizer.decode(tokens) == "The miller painted the map."
    assert max(tokens) < len(tokenizer) <= config["vocab_size"] == SIZES["vocab_size"]
    assert config["eos_token_id"] == tokenizer.eos_token_id is not None


def test_made_up_text_has_the_words_asked_for_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    one, same, other = (
        write_text(tmp_path / name / "text.txt", 500, seed=seed).read_text()
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    assert len(one.split()) == len(other.split()) == 500
    assert one == same != other
    assert one.count("\n\n") > 10
    assert one.count(".") > 50
