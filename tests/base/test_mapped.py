"""The mapped base: what safetensors reads, checked in passing, and every refusal of a folder that is no base."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pcscale.base.mapped import MappedBase
from pcscale.common.errors import RequestError
from tests.projection.parts import TinyBase, open_base
from tests.tiny import CASES, build_base

UP = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def changed(tiny_base: TinyBase, tmp_path: Path) -> Callable[..., Path]:
    """`changed(edit, tied)`: a tiny Llama whose tensors `edit` has changed in place."""

    def change(edit: Callable[[Tensors], object], tied: bool = False) -> Path:
        source = tiny_base("llama", tied)
        tensors = load_file(source / "model.safetensors")
        edit(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        return tmp_path

    return change


def assert_equal_tensors(base: MappedBase, expected: Tensors) -> None:
    assert {weight.name for weight in base.weights} == expected.keys()
    for name, tensor in expected.items():
        found = base.tensor(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_weights_are_those_that_safetensors_reads(family: str, tied: bool, tiny_base: TinyBase) -> None:
    folder = tiny_base(family, tied)
    assert_equal_tensors(open_base(folder), load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_and_half_precision_are_read_as_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = build_base(tmp_path, dtype=dtype, max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    base = open_base(folder)
    assert_equal_tensors(base, {name: tensor for shard in shards for name, tensor in load_file(shard).items()})
    assert base.dtype(UP) == {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]


def test_names_of_layers_and_of_what_is_outside_make_up_the_whole(tiny_base: TinyBase) -> None:
    base = open_base(tiny_base("qwen3", False))
    assert base.num_layers == 2
    for layer in range(2):
        assert all(name.startswith(f"model.layers.{layer}.") for name in base.layer_names(layer))
    assert base.layer_names(None) == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names = [name for part in (None, 0, 1) for name in base.layer_names(part)]
    assert sorted(names) == sorted(load_file(base.folder / "model.safetensors"))


def test_fingerprints_are_those_of_the_tensors_read_so_far(tiny_base: TinyBase) -> None:
    base = open_base(tiny_base("llama", True))
    assert base.fingerprints == {}
    base.prefetch([UP])
    assert base.fingerprints == {}
    base.tensor(UP)
    assert base.fingerprints.keys() == {UP}
    everything = dict(base.check_all())
    assert everything.keys() == {weight.name for weight in base.weights}
    assert len(set(everything.values())) == len(everything)
    assert open_base(base.folder, expected=everything).check_all() == everything


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_refused(changed: Callable[..., Path], value: float, dtype: torch.dtype) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[UP] = tensors[UP].to(dtype)
        tensors[UP][7, 9] = value

    base = open_base(changed(edit))
    message = f"{base.folder / 'model.safetensors'}: {UP} holds NaN or infinity. Fetch or copy the file again."
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        base.tensor(UP)
    with pytest.raises(RequestError, match="holds NaN or infinity"):
        base.check_all()
    assert torch.isfinite(base.tensor("lm_head.weight")).all()


def test_a_weight_of_another_base_is_refused(changed: Callable[..., Path], tiny_base: TinyBase) -> None:
    expected = open_base(tiny_base("llama", False)).check_all()
    base = open_base(changed(lambda tensors: tensors[UP].mul_(2)), expected=expected)
    found = open_base(base.folder).check_all()[UP]
    message = (
        f"{base.folder / 'model.safetensors'}: {UP} is not the weight this checkpoint was trained on "
        f"(fingerprint {found[:12]}…, expected {expected[UP][:12]}…). Use the same base and revision."
    )
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        base.check_all()


def test_a_missing_tensor_is_refused(changed: Callable[..., Path]) -> None:
    folder = changed(lambda tensors: tensors.pop(UP))
    message = f"{folder}: {UP} is not in the weights, family 'llama' needs it. Check config.json beside the weights."
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        open_base(folder)


def test_an_untied_base_without_a_head_is_refused(changed: Callable[..., Path]) -> None:
    folder = changed(lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(RequestError, match=r"lm_head\.weight is not in the weights, family 'llama' needs it"):
        open_base(folder)


def test_a_tensor_of_another_shape_is_refused_with_the_axes_that_were_expected(changed: Callable[..., Path]) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[UP] = torch.zeros(44, 32)

    folder = changed(edit)
    message = (
        f"{folder / 'model.safetensors'}: {UP} has shape [44, 32], family 'llama' expects [ffn=48, residual=32]. "
        "Check config.json beside the weights."
    )
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        open_base(folder)


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.int32, "I32"), (torch.float64, "F64")])
def test_a_tensor_of_another_dtype_is_refused(changed: Callable[..., Path], dtype: torch.dtype, name: str) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[UP] = tensors[UP].to(dtype)

    folder = changed(edit)
    message = (
        f"{folder / 'model.safetensors'}: {UP} is stored as {name}, expected one of F32, BF16, F16. "
        "Use the checkpoint in its full precision."
    )
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        open_base(folder)


@pytest.mark.parametrize(("count", "more"), [(1, ""), (3, " (and 2 more)")])
def test_an_unknown_tensor_is_refused(changed: Callable[..., Path], count: int, more: str) -> None:
    extra = {f"model.layers.{layer}.extra.weight": torch.zeros(3) for layer in range(count)}
    folder = changed(lambda tensors: tensors.update(extra))
    message = (
        f"{folder}: the weights hold model.layers.0.extra.weight, which family 'llama' does not know{more}. "
        "Check model_type in config.json."
    )
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        open_base(folder)


def test_a_tied_base_may_carry_its_head(changed: Callable[..., Path]) -> None:
    head = {"lm_head.weight": torch.full((300, 32), 7.0)}
    base = open_base(changed(lambda tensors: tensors.update(head), tied=True))
    assert "lm_head.weight" not in {weight.name for weight in base.weights}


def test_rotary_buffers_of_old_checkpoints_are_passed_over(changed: Callable[..., Path]) -> None:
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for layer in range(2)}
    base = open_base(changed(lambda tensors: tensors.update(buffers)))
    assert base.check_all().keys().isdisjoint(buffers)


def test_a_folder_without_config_json_is_refused(changed: Callable[..., Path]) -> None:
    folder = changed(lambda tensors: None)
    (folder / "config.json").unlink()
    message = f"{folder} has no config.json. Name a folder with a Hugging Face checkpoint."
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        open_base(folder)


def test_a_folder_without_weights_is_refused(changed: Callable[..., Path]) -> None:
    folder = changed(lambda tensors: None)
    (folder / "model.safetensors").unlink()
    message = (
        f"{folder} holds neither model.safetensors nor model.safetensors.index.json. Save the model as safetensors."
    )
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        open_base(folder)


def test_an_unsupported_family_is_refused(changed: Callable[..., Path]) -> None:
    folder = changed(lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    message = (
        f"{folder / 'config.json'}: model_type 'gpt2' is not supported. Supported: llama (Llama 2 and 3, SmolLM2, "
        "TinyLlama), mistral (Mistral 7B), qwen2 (Qwen2 and Qwen2.5), qwen3 (Qwen3)."
    )
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        open_base(folder)
