"""Held-out loss of the base, layer by layer, and of a model in memory: the same numbers, by hand as well."""

import math
import re

import pytest
import torch

from pcscale.common.errors import RequestError
from pcscale.common.topology import Alone, Topology
from pcscale.evaluation.perplexity import HeldOut, evaluate_base, evaluate_model, mean_loss
from pcscale.model.compressed import load_stock
from pcscale.model.loss import NextTokenLoss
from pcscale.run.record import ModelResult
from tests.projection.parts import CPU, Compression, TinyBase, open_base, token_batches
from tests.tiny import CASES

LOSS_TOLERANCE = 1e-6
"""Relative: a mean of float32 losses, in another order."""
HELD_OUT = HeldOut(token_batches(1, batch=5, tokens=16)[0], text_bytes=321)
PREDICTED = 5 * 15


def stock_loss(model: torch.nn.Module, ids_MT: torch.Tensor) -> float:
    """The stock model's own loss on all sequences at once."""
    with torch.no_grad():
        return model(ids_MT, labels=ids_MT, use_cache=False).loss.item()


def without_speed(result: ModelResult) -> dict[str, float]:
    return {key: value for key, value in vars(result).items() if key != "tokens_per_second"}


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_the_base_evaluates_alike_on_disk_and_in_memory(family: str, tied: bool, tiny_base: TinyBase) -> None:
    folder = tiny_base(family, tied)
    model = load_stock(folder, CPU, torch.float32)
    in_memory = evaluate_model(model, HELD_OUT, 2, "test")
    on_disk = evaluate_base(open_base(folder), model.num_parameters(), HELD_OUT, 2, CPU, torch.float32)
    assert without_speed(on_disk) == pytest.approx(without_speed(in_memory), rel=10 * LOSS_TOLERANCE)
    assert in_memory.loss == pytest.approx(stock_loss(model, HELD_OUT.ids_MT), rel=LOSS_TOLERANCE)
    assert in_memory.parameters == model.num_parameters()
    assert in_memory.tokens_per_second > 0


def test_figures_follow_from_the_loss_by_hand() -> None:
    result = HELD_OUT.result(2.5, 1234, 3.0)
    assert result == ModelResult(
        loss=2.5,
        perplexity=pytest.approx(12.182493960703473),
        bits_per_byte=pytest.approx(2.5 * 75 / 0.6931471805599453 / 321),
        tokens=75,
        parameters=1234,
        tokens_per_second=pytest.approx(25.0),
    )


def test_a_uniform_guess_over_bytes_takes_eight_bits_a_byte() -> None:
    held_out = HeldOut(torch.zeros(4, 11, dtype=torch.int64), text_bytes=40)
    assert held_out.predicted_tokens == 40
    result = held_out.result(math.log(256), 1, 1.0)
    assert result.bits_per_byte == pytest.approx(8)
    assert result.perplexity == pytest.approx(256)


def test_a_hopeless_model_s_perplexity_is_still_a_number() -> None:
    assert math.isfinite(HELD_OUT.result(1e6, 1, 1.0).perplexity)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(loss: float) -> None:
    message = f"the held-out loss is {loss}: the model's outputs are not finite. Check its weights."
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        HELD_OUT.result(loss, 1, 1.0)


def test_a_model_whose_outputs_are_not_finite_is_refused(tiny_base: TinyBase) -> None:
    model = load_stock(tiny_base("llama", True), CPU, torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(RequestError, match="the held-out loss is nan: the model's outputs are not finite"):
        evaluate_model(model, HELD_OUT, 2, "test")


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_the_batch_size_does_not_change_the_mean(batch_size: int, tiny_base: TinyBase) -> None:
    model = Compression.of(tiny_base("llama", False)).model()
    found = mean_loss(NextTokenLoss(model), HELD_OUT.ids_MT, batch_size, "test", CPU)
    assert found == pytest.approx(stock_loss(model, HELD_OUT.ids_MT), rel=LOSS_TOLERANCE)


class OneOf(Alone):
    """A rank that nobody answers: it gets its own part of every sum."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.topology = Topology(rank, world_size)


@pytest.mark.parametrize(("ranks", "batch_size"), [(2, 1), (2, 3), (3, 2), (7, 2)])
def test_ranks_share_the_sequences_in_equally_many_calls(ranks: int, batch_size: int, tiny_base: TinyBase) -> None:
    loss = NextTokenLoss(Compression.of(tiny_base("llama", False)).model())
    calls: list[int] = []
    loss.register_forward_pre_hook(lambda *_: calls.append(1))
    parts, counts = [], []
    for rank in range(ranks):
        calls.clear()
        parts.append(mean_loss(loss, HELD_OUT.ids_MT, batch_size, "test", CPU, OneOf(rank, ranks)))
        counts.append(len(calls))
    assert sum(parts) == pytest.approx(stock_loss(loss.model, HELD_OUT.ids_MT), rel=LOSS_TOLERANCE)
    assert len(set(counts)) == 1


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_left_as_it_was(training: bool, tiny_base: TinyBase) -> None:
    loss = NextTokenLoss(Compression.of(tiny_base("llama", False)).model()).train(training)
    modes: list[bool] = []
    loss.model.lm_head.register_forward_hook(lambda module, inputs, output: modes.append(loss.model.training))
    mean_loss(loss, HELD_OUT.ids_MT.int(), 3, "test", CPU)
    assert set(modes) == {False}
    assert all(module.training == training for module in loss.modules())
    assert all(parameter.grad is None for parameter in loss.parameters())
