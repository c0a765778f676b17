"""Gradients that accumulate in host memory: the same steps, and nothing of them stays with the parameters."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from pcscale.common.ledger import DIRECT, GRADIENTS, MOMENTS, RECORDS, WEIGHTS
from pcscale.model.compressed import build_compressed
from pcscale.model.loss import NextTokenLoss
from pcscale.projection.engine import LocalEngine
from pcscale.projection.residency import State
from pcscale.projection.starts import Start, start_tensors
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.training.step import training_step
from tests.entered import Entered
from tests.projection.parts import CPU, Compression, TinyBase, copies, token_batches
from tests.reference import Weights

NORM_TOLERANCE = 1e-6
"""The order of a sum over some twenty tensors, in float32."""
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
    "bfloat16 gradients": (torch.bfloat16, torch.bfloat16),
}
"""Of the model, and of what accumulates."""
STEPS = 4
NO_CLIPPING = 1e9
CLIPPING = 0.5
"""Below the norm of every step here."""


@pytest.fixture
def compression(tiny_base: TinyBase) -> Compression:
    return Compression.of(tiny_base("llama", True))


def optimizer_over(
    compression: Compression, home: str, dtype: torch.dtype, gradient_dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, ProjectedAdamW]:
    start = start_tensors(compression.plan, Start(compression.kept), compression.base.tensor)
    model = build_compressed(compression.plan, start, CPU, dtype, gradient_dtype)
    return model, compression.optimizer(model, state=State(gradient_home=home))


def backward(model: nn.Module, count: int = 1, seed: int = 5) -> None:
    for ids_BT in token_batches(count, seed=seed):
        NextTokenLoss(model)(ids_BT).backward()


def gradients_of(optimizer: ProjectedAdamW) -> Weights:
    """Copies of what the sweep would fetch."""
    return {name: optimizer.engine.gradient(name).clone() for name in optimizer.engine.reached()}


def everything(optimizer: ProjectedAdamW, model: nn.Module) -> Weights:
    records = {
        f"{name}: {part}": tensor
        for name in optimizer.records
        for part, tensor in optimizer.records[name].tensors().items()
    }
    direct = {part: tensor.clone() for name, own in optimizer.direct.items() for part, tensor in own.tensors(name)}
    return records | direct | {f"model: {name}": weight for name, weight in copies(model).items()}


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("max_norm", [NO_CLIPPING, CLIPPING], ids=["unclipped", "clipped"])
@pytest.mark.parametrize(("tied", "accumulation"), [(True, 1), (False, 3)])
def test_steps_are_the_same_to_the_last_bit_wherever_gradients_accumulate(
    tied: bool, accumulation: int, max_norm: float, dtypes: str, tiny_base: TinyBase
) -> None:
    compression = Compression.of(tiny_base("llama", tied))
    ends, norms = [], []
    for home in ("device", "cpu"):
        model, optimizer = optimizer_over(compression, home, *DTYPES[dtypes])
        loss, batches = NextTokenLoss(model), token_batches(STEPS * accumulation)
        results = [
            training_step(loss, optimizer, batches[first : first + accumulation], accumulation, max_norm)
            for first in range(0, len(batches), accumulation)
        ]
        norms.append([result.grad_norm for result in results])
        ends.append(everything(optimizer, model))
    assert (min(norms[0]) > max_norm) == (max_norm == CLIPPING)
    assert ends[0].keys() == ends[1].keys()
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []
    assert norms[0] == norms[1]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_what_accumulates_is_what_torch_accumulates(dtypes: str, count: int, compression: Compression) -> None:
    found = []
    for home in ("device", "cpu"):
        model, optimizer = optimizer_over(compression, home, *DTYPES[dtypes])
        backward(model, count)
        found.append(gradients_of(optimizer))
    assert found[0].keys() == found[1].keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert {gradient.dtype for gradient in found[1].values()} == {DTYPES[dtypes][1]}


def test_nothing_stays_with_the_parameters(compression: Compression) -> None:
    model, optimizer = optimizer_over(compression, "cpu", torch.float32)
    for seed in (1, 2):
        backward(model, seed=seed)
        assert all(parameter.grad is None for parameter in model.parameters())
    assert set(optimizer.engine.reached()) == dict(model.named_parameters()).keys()
    optimizer.step()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_norm_is_that_of_torch(compression: Compression) -> None:
    model, optimizer = optimizer_over(compression, "cpu", torch.float32)
    control = compression.model()
    for one in (model, control):
        backward(one, 2)
    expected = torch.nn.utils.clip_grad_norm_(control.parameters(), CLIPPING)
    found = optimizer.clip_grad_norm_(CLIPPING)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.item() == pytest.approx(expected.item(), rel=NORM_TOLERANCE)
    clipped = gradients_of(optimizer)
    for name, parameter in control.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(clipped[name], parameter.grad, rtol=NORM_TOLERANCE, atol=0)
    whole = torch.cat([gradient.flatten() for gradient in clipped.values()])
    assert whole.norm().item() == pytest.approx(CLIPPING, rel=10 * NORM_TOLERANCE)


def test_gradients_below_the_norm_are_left_as_they_are(compression: Compression) -> None:
    model, optimizer = optimizer_over(compression, "cpu", torch.float32)
    backward(model)
    before = gradients_of(optimizer)
    optimizer.clip_grad_norm_(NO_CLIPPING)
    after = gradients_of(optimizer)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_norm_of_no_gradients_is_zero(compression: Compression) -> None:
    _, optimizer = optimizer_over(compression, "cpu", torch.float32)
    assert optimizer.clip_grad_norm_(CLIPPING).item() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(value: float) -> None:
    parameter = nn.Parameter(torch.ones(3))
    engine = LocalEngine({"w": parameter}, "cpu")
    (parameter * torch.tensor([1.0, value, 1.0])).sum().backward()
    assert not torch.isfinite(engine.clip_norm(CLIPPING))


def test_zero_grad_forgets_gradients_and_clipping(compression: Compression) -> None:
    model, optimizer = optimizer_over(compression, "cpu", torch.float32)
    backward(model, seed=6)
    expected = gradients_of(optimizer)
    optimizer.zero_grad()
    assert gradients_of(optimizer) == {}
    backward(model, 3)
    optimizer.clip_grad_norm_(CLIPPING)
    optimizer.zero_grad()
    backward(model, seed=6)
    found = gradients_of(optimizer)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_step_without_gradients_changes_nothing(compression: Compression) -> None:
    model, optimizer = optimizer_over(compression, "cpu", torch.float32)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    before = everything(optimizer, model)
    optimizer.step()
    after = everything(optimizer, model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_tied_weight_has_one_gradient_from_both_its_uses(compression: Compression) -> None:
    model, optimizer = optimizer_over(compression, "cpu", torch.float32)
    control = copy.deepcopy(compression.model())
    for one in (model, control):
        backward(one)
    embedding = model.get_input_embeddings().weight
    assert embedding is model.get_output_embeddings().weight
    expected = control.get_input_embeddings().weight.grad
    (name,) = (name for name, parameter in model.named_parameters() if parameter is embedding)
    found = optimizer.engine.gradient(name)
    assert torch.equal(found, expected)
    # Looking up gives a gradient to the tokens that occurred alone, the head to every token.
    assert found.any(dim=1).all()


def test_rows_are_those_of_the_gradient() -> None:
    parameter = nn.Parameter(torch.zeros(6, 2))
    engine = LocalEngine({"w": parameter}, "cpu")
    (parameter * torch.arange(12.0).view(6, 2)).sum().backward()
    assert engine.gradient("w")[2:4].tolist() == [[4, 5], [6, 7]]


def test_a_gradient_is_kept_apart_from_the_next_backward_pass() -> None:
    """What was taken from `parameter.grad` is nobody else's memory."""
    parameter = nn.Parameter(torch.ones(4))
    engine = LocalEngine({"w": parameter}, "cpu")
    handed = torch.full((4,), 3.0)
    for _ in range(2):
        parameter.backward(handed)
    assert torch.equal(handed, torch.full((4,), 3.0)), "the caller's tensor is left alone"
    assert engine.gradient("w").tolist() == [6.0] * 4


@pytest.mark.parametrize("dtypes", DTYPES)
def test_gradients_that_are_held_are_zeros_in_the_dtype_that_accumulates(dtypes: str, compression: Compression) -> None:
    model, optimizer = optimizer_over(compression, "device", *DTYPES[dtypes])
    assert optimizer.engine.reached() == []
    optimizer.engine.hold_gradients()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.dtype == DTYPES[dtypes][1]
        assert not parameter.grad.any()
    assert set(optimizer.engine.reached()) == dict(model.named_parameters()).keys()


def test_a_gradient_that_is_there_is_held_as_it_is(compression: Compression) -> None:
    model, optimizer = optimizer_over(compression, "device", torch.float32)
    backward(model)
    before = gradients_of(optimizer)
    optimizer.engine.hold_gradients()
    after = gradients_of(optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_in_host_memory_nothing_is_held_on_the_device(compression: Compression) -> None:
    model, optimizer = optimizer_over(compression, "cpu", torch.float32)
    optimizer.engine.hold_gradients()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert optimizer.engine.reached() == []


@pytest.mark.parametrize("dtypes", DTYPES)
def test_steps_are_the_same_to_the_last_bit_whether_gradients_are_held_or_born(
    dtypes: str, compression: Compression, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two micro batches a step holds them before, and zeros stay for the next step."""
    ends, accumulation = [], 2
    for held in (True, False):
        model, optimizer = optimizer_over(compression, "device", *DTYPES[dtypes])
        loss, batches = NextTokenLoss(model), token_batches(STEPS * accumulation)
        if not held:
            monkeypatch.setattr(optimizer.engine, "hold_gradients", lambda: None)
        for first in range(0, len(batches), accumulation):
            if not held:
                for parameter in model.parameters():
                    parameter.grad = None
            training_step(loss, optimizer, batches[first : first + accumulation], accumulation, CLIPPING)
            assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
        ends.append(everything(optimizer, model))
    assert ends[0].keys() == ends[1].keys()
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []


def test_with_one_micro_batch_no_gradient_outlives_its_step(compression: Compression) -> None:
    model, optimizer = optimizer_over(compression, "device", torch.float32)
    training_step(NextTokenLoss(model), optimizer, token_batches(1), 1, CLIPPING)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("home", ["device", "cpu"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_gradients_are_entered_while_they_are_there(home: str, dtypes: str, compression: Compression) -> None:
    model, optimizer = optimizer_over(compression, home, *DTYPES[dtypes])
    size = sum(parameter.numel() for parameter in model.parameters()) * DTYPES[dtypes][1].itemsize
    entered = Entered()
    for _ in range(2):
        backward(model, 2)
        assert entered.now() == {("host", GRADIENTS): size}
        optimizer.step()
        optimizer.zero_grad()
        assert entered.now() == {}


def test_gradients_that_are_held_are_entered_once(compression: Compression) -> None:
    model, optimizer = optimizer_over(compression, "device", torch.float32)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    entered = Entered()
    optimizer.engine.hold_gradients()
    assert entered.now() == {("host", GRADIENTS): size}
    backward(model, 2)
    optimizer.zero_grad(set_to_none=False)
    assert entered.now() == {("host", GRADIENTS): size}, "zeros take as much"
    optimizer.zero_grad()
    assert entered.now() == {}


@pytest.mark.parametrize("home", ["device", "cpu"])
def test_nothing_is_entered_any_more_when_the_optimizer_is_gone(home: str, compression: Compression) -> None:
    entered = Entered()
    model, optimizer = optimizer_over(compression, home, torch.float32)
    training_step(NextTokenLoss(model), optimizer, token_batches(2), 2, CLIPPING)
    backward(model)
    of_all = {component for _, component in entered.now()}
    assert of_all == {WEIGHTS, GRADIENTS, RECORDS, MOMENTS, DIRECT}
    del optimizer
    assert {component for _, component in entered.now()} == {WEIGHTS}
    del model
    assert entered.now() == {}


@pytest.mark.parametrize("home", ["device", "cpu"])
def test_a_model_is_collected_when_its_optimizer_is_gone(home: str, compression: Compression) -> None:
    """Hooks on its parameters, which torch holds, do not keep it."""
    model, optimizer = optimizer_over(compression, home, torch.float32)
    backward(model)
    gone = [weakref.ref(model), weakref.ref(optimizer), *map(weakref.ref, model.parameters())]
    del optimizer, model
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)


@pytest.mark.parametrize("home", ["device", "cpu"])
def test_a_model_trains_on_after_its_optimizer_is_gone(home: str, compression: Compression) -> None:
    model, optimizer = optimizer_over(compression, home, torch.float32)
    del optimizer
    gc.collect()
    backward(model)
    assert all(parameter.grad is not None for parameter in model.parameters())
