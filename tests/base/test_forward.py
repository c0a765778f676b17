"""The layer-major base against the stock model: same losses, each weight read once, nothing left in memory."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from pcscale.base import forward
from pcscale.base.forward import LayerMajorModel
from pcscale.base.mapped import MappedBase
from tests.projection.parts import CPU, TinyBase, open_base, token_batches
from tests.tiny import CASES, build_base

FLOAT32_TOLERANCE = 1e-5
"""Losses near 6 in float32, whose last bit is 5e-7; the head's log-sum is added up from as many as 300 blocks."""
BFLOAT16_TOLERANCE = 0.03
"""Losses near 6 from bfloat16 logits: 8 bits of each, and roundings that come in another order."""
LABEL = "test"


def stock_base(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def stock_losses(model: PreTrainedModel, batches: list[torch.Tensor]) -> torch.Tensor:
    """Each token's loss `[sequences, T - 1]`, from the stock model's whole logits."""
    losses = []
    for ids_BT in batches:
        logits_BTV = model(ids_BT, use_cache=False).logits.float()
        losses.append(F.cross_entropy(logits_BTV[:, :-1].transpose(1, 2), ids_BT[:, 1:], reduction="none"))
    return torch.cat(losses)


def assert_stock_losses(base: MappedBase, batches: list[torch.Tensor]) -> None:
    losses = LayerMajorModel(base, CPU).losses(batches, LABEL)
    expected = stock_losses(stock_base(base.folder), batches)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=0, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_losses_are_those_of_the_stock_model(family: str, tied: bool, tiny_base: TinyBase) -> None:
    assert_stock_losses(open_base(tiny_base(family, tied)), token_batches(3))


def test_batches_of_several_sizes_are_run(tiny_base: TinyBase) -> None:
    batches = [token_batches(1, batch=size, tokens=17, seed=size)[0] for size in (3, 1, 3, 2)]
    assert_stock_losses(open_base(tiny_base("mistral", False)), batches)


def test_sequences_of_several_lengths_are_run(tiny_base: TinyBase) -> None:
    base = open_base(tiny_base("llama", True))
    batches = [token_batches(1, tokens=tokens, seed=tokens)[0] for tokens in (5, 33, 5)]
    (hidden,) = LayerMajorModel(base, CPU).hidden_states(batches, LABEL)
    stock = stock_base(base.folder).base_model
    for ids_BT, hidden_BTH in zip(batches, hidden, strict=True):
        with torch.no_grad():
            expected = stock(ids_BT, use_cache=False).last_hidden_state
        torch.testing.assert_close(hidden_BTH, expected, rtol=0, atol=FLOAT32_TOLERANCE)


def test_tokens_of_any_integer_dtype_are_read(tiny_base: TinyBase) -> None:
    base, batches = open_base(tiny_base("llama", False)), token_batches(2)
    whole, short = (
        LayerMajorModel(base, CPU).losses([batch.to(dtype) for batch in batches], LABEL)
        for dtype in (torch.int64, torch.int32)
    )
    assert torch.equal(whole, short)


def test_groups_that_fit_the_budget_change_nothing(tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch) -> None:
    base, batches = open_base(tiny_base("llama", False)), token_batches(5)
    batch_bytes = batches[0].numel() * base.config["hidden_size"] * 4
    monkeypatch.setattr(forward, "HIDDEN_BUDGET_BYTES", 2 * batch_bytes)
    groups = [len(group) for group in LayerMajorModel(base, CPU).hidden_states(batches, LABEL)]
    assert groups == [2, 2, 1]
    assert_stock_losses(base, batches)


def test_a_batch_larger_than_the_budget_is_a_group_of_its_own(
    tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, batches = open_base(tiny_base("llama", False)), token_batches(3)
    monkeypatch.setattr(forward, "HIDDEN_BUDGET_BYTES", 1)
    assert [len(group) for group in LayerMajorModel(base, CPU).hidden_states(batches, LABEL)] == [1, 1, 1]
    assert_stock_losses(base, batches)


@pytest.mark.parametrize("rows", [1, 7, 299, 300, 1000])
def test_heads_in_blocks_give_the_losses_of_the_whole(
    rows: int, tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, batches = open_base(tiny_base("qwen2", False)), token_batches(2)
    predicted = batches[0].shape[0] * (batches[0].shape[1] - 1)
    monkeypatch.setattr(forward, "LOGIT_CHUNK_VALUES", rows * predicted)
    largest, original = [0], F.linear

    def linear(input: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        output = original(input, weight, bias)
        largest[0] = max(largest[0], output.numel())
        return output

    model = LayerMajorModel(base, CPU)
    hidden = [hidden for group in model.hidden_states(batches, LABEL) for hidden in group]
    monkeypatch.setattr(F, "linear", linear)
    losses = torch.cat(model._head_losses(hidden, batches))
    monkeypatch.undo()
    assert largest[0] == min(rows, 300) * predicted
    expected = stock_losses(stock_base(base.folder), batches)
    torch.testing.assert_close(losses, expected, rtol=0, atol=FLOAT32_TOLERANCE)


def test_each_weight_is_read_once_a_pass(tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch) -> None:
    base, batches = open_base(tiny_base("qwen3", False)), token_batches(4)
    read: Counter[str] = Counter()
    original = base.tensor

    def tensor(name: str) -> torch.Tensor:
        read[name] += 1
        return original(name)

    monkeypatch.setattr(base, "tensor", tensor)
    LayerMajorModel(base, CPU).losses(batches, LABEL)
    assert read == Counter({weight.name: 1 for weight in base.weights})


def test_outside_a_layer_s_turn_every_weight_is_on_meta(tiny_base: TinyBase) -> None:
    base = open_base(tiny_base("llama", True))
    model = LayerMajorModel(base, CPU)
    held: list[set[str]] = []

    def look(*_: object) -> None:
        held.append({name for name, parameter in model.skeleton.named_parameters() if not parameter.is_meta})

    for layer in model.layers:
        layer.register_forward_hook(look)
    model.module("model.norm").register_forward_hook(look)
    look()
    model.losses(token_batches(1), LABEL)
    look()
    # Each layer is called twice: for its arguments while nothing is loaded, and in its turn.
    assert held == [
        set(),
        set(),
        set(),
        *(set(base.layer_names(layer)) for layer in range(2)),
        {"model.norm.weight"},
        set(),
    ]


def test_a_failure_in_a_layer_leaves_no_weight_behind(tiny_base: TinyBase) -> None:
    model = LayerMajorModel(open_base(tiny_base("llama", True)), CPU)

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    handle = model.module("model.layers.1.mlp").register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        model.losses(token_batches(1), LABEL)
    assert all(parameter.is_meta for parameter in model.skeleton.parameters())
    handle.remove()
    batches = token_batches(1)
    expected = stock_losses(stock_base(model.base.folder), batches)
    torch.testing.assert_close(model.losses(batches, LABEL), expected, rtol=0, atol=FLOAT32_TOLERANCE)


def test_hooks_see_what_they_see_in_the_stock_model(tiny_base: TinyBase) -> None:
    base, batches = open_base(tiny_base("qwen3", False)), token_batches(2)
    model, stock = LayerMajorModel(base, CPU), stock_base(base.folder)
    watched = ["model.layers.0.input_layernorm", "model.layers.1.mlp.down_proj", "model.norm"]
    seen: dict[str, list[list[torch.Tensor]]] = {name: [[], []] for name in watched}
    for name in watched:
        for found, module in zip(seen[name], (model.module(name), stock.get_submodule(name)), strict=True):

            def watch(_: object, inputs: Any, output: torch.Tensor, into: list[torch.Tensor] = found) -> None:
                into.extend((inputs[0].detach(), output.detach()))

            module.register_forward_hook(watch)
    model.losses(batches, LABEL)
    stock_losses(stock, batches)
    for name, (found, expected) in seen.items():
        assert len(found) == len(expected) == 2 * len(batches), name
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=FLOAT32_TOLERANCE)


def test_bfloat16_forward_is_the_stock_model_s_in_bfloat16(tiny_base: TinyBase) -> None:
    base, batches = open_base(tiny_base("llama", False)), token_batches(2)
    losses = LayerMajorModel(base, CPU, torch.bfloat16).losses(batches, LABEL)
    expected = stock_losses(stock_base(base.folder, torch.bfloat16), batches)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=0, atol=BFLOAT16_TOLERANCE)


ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {"rope_parameters": ROPE}), ("mistral", {"sliding_window": 4})]
)
def test_rope_scaling_and_sliding_windows_are_the_stock_model_s(
    family: str, changes: dict[str, Any], tiny_base: TinyBase, tmp_path: Path
) -> None:
    batches = token_batches(2, tokens=64)
    base = open_base(build_base(tmp_path, family, **changes))
    assert_stock_losses(base, batches)
    without = stock_losses(stock_base(tiny_base(family, True)), batches)
    assert (stock_losses(stock_base(base.folder), batches) - without).abs().max() > 100 * FLOAT32_TOLERANCE


def test_old_rope_settings_are_read_as_the_stock_model_reads_them(tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling`, as config.json files before transformers 5 have them."""
    folder = build_base(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {key: value for key, value in ROPE.items() if key != "rope_theta"}
    config |= {"rope_theta": 500.0, "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config))
    assert_stock_losses(open_base(folder), token_batches(2, tokens=64))
