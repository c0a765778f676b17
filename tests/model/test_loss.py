"""The chunked loss against the stock model's own."""

import pytest
import torch
from transformers import PreTrainedModel

from pcscale.common import sizes
from pcscale.common.sizes import LOGIT_CHUNK_VALUES, chunk_tokens
from pcscale.model.loss import NextTokenLoss
from tests.projection.parts import Compression, TinyBase, copies, token_batches
from tests.tiny import CASES, SIZES

LOSS_TOLERANCE = 1e-6
"""Relative, in bfloat16 too: a mean of some losses that are taken in float32 from the very same logits."""
FLOAT32_TOLERANCE = 1e-5
"""Relative to the largest gradient of a weight: float32 sums in chunks."""
BFLOAT16_TOLERANCE = 0.03
"""The same in bfloat16: 8 bits of every term, added up in another order."""
VOCAB = SIZES["vocab_size"]
IDS_BT = token_batches(1, batch=3, tokens=9)[0]
PREDICTED = 3 * 8


@pytest.fixture
def compression(tiny_base: TinyBase) -> Compression:
    return Compression.of(tiny_base("llama", False))


def set_chunk(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Room for the logits of that many tokens, and not quite one more."""
    monkeypatch.setattr(sizes, "LOGIT_CHUNK_VALUES", tokens * VOCAB + VOCAB - 1)


def assert_stock_loss(model: PreTrainedModel, tolerance: float) -> None:
    expected_loss = model(IDS_BT, labels=IDS_BT, use_cache=False).loss
    expected_loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    loss = NextTokenLoss(model)(IDS_BT)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected_loss.item(), rel=LOSS_TOLERANCE)
    for name, parameter in model.named_parameters():
        scale = expected[name].abs().max()
        assert scale > 0
        assert (parameter.grad - expected[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize(("family", "tied"), CASES)
@pytest.mark.parametrize("chunk", [5, PREDICTED])
def test_loss_and_gradients_are_those_of_the_stock_model(
    family: str, tied: bool, chunk: int, tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_chunk(monkeypatch, chunk)
    assert_stock_loss(Compression.of(tiny_base(family, tied)).model(), FLOAT32_TOLERANCE)


@pytest.mark.parametrize("chunk", [5, PREDICTED])
def test_in_bfloat16_loss_and_gradients_are_close_to_the_stock_model_s(
    compression: Compression, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_chunk(monkeypatch, chunk)
    assert_stock_loss(compression.model(torch.bfloat16), BFLOAT16_TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 5, PREDICTED, 100])
def test_whole_logits_never_exist(compression: Compression, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk(monkeypatch, chunk)
    model = compression.model()
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: sizes.append(logits.numel()))
    NextTokenLoss(model)(IDS_BT).backward()
    assert max(sizes) == min(chunk, PREDICTED) * VOCAB
    assert sum(sizes) == 2 * PREDICTED * VOCAB, "once forward, once more backward"


def test_without_gradients_nothing_is_computed_twice(compression: Compression, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk(monkeypatch, 5)
    model = compression.model()
    expected = model(IDS_BT, labels=IDS_BT, use_cache=False).loss.item()
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: sizes.append(logits.numel()))
    with torch.no_grad():
        loss = NextTokenLoss(model)(IDS_BT)
    assert loss.item() == pytest.approx(expected, rel=LOSS_TOLERANCE)
    assert not loss.requires_grad
    assert sum(sizes) == PREDICTED * VOCAB


def test_a_chunk_holds_at_least_one_token() -> None:
    assert chunk_tokens(LOGIT_CHUNK_VALUES + 1) == 1
    assert chunk_tokens(2**20) == 8


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_have_the_plan_s_names_and_no_second_one(tied: bool, tiny_base: TinyBase) -> None:
    compression = Compression.of(tiny_base("llama", tied))
    loss = NextTokenLoss(compression.model())
    names = [planned.name for planned in compression.plan.weights]
    assert sorted(dict(loss.model.named_parameters())) == sorted(names)
    assert sorted(dict(loss.named_parameters())) == sorted(f"model.{name}" for name in names)
    assert all(name.removeprefix("model.") in {*names, "lm_head.weight"} for name in loss.state_dict())


def test_the_loss_leaves_the_weights_alone(compression: Compression) -> None:
    model = compression.model()
    before = copies(model)
    NextTokenLoss(model)(IDS_BT).backward()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
