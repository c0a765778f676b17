"""One step: accumulation, clipping, and what a loss that is not finite leaves alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.utils import get_total_norm

from pcscale.calibration.score import random_scores
from pcscale.calibration.select import select
from pcscale.config.schema import RunConfig
from pcscale.jobs.build import build_optimizer
from pcscale.jobs.run import open_run
from pcscale.model.loss import NextTokenLoss
from pcscale.projection.starts import Start
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.training.step import StepResult, training_step

UNCLIPPED = 1e9
Parts = tuple[NextTokenLoss, ProjectedAdamW]


def build_parts(settings: RunConfig) -> Parts:
    run = open_run(settings, resume=False)
    return build_optimizer(run, Start(select(run.plan, random_scores(run.plan, seed=0))))


def take_step(parts: Parts, batches: list[torch.Tensor], clip: float) -> StepResult:
    loss_module, optimizer = parts
    return training_step(loss_module, optimizer, batches, len(batches), clip)


@pytest.fixture(params=["projected", "hard_prune"])
def parts(request: pytest.FixtureRequest, config: Callable[..., RunConfig]) -> Parts:
    return build_parts(config(method=request.param))


def _ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(300, (count, 12), generator=torch.Generator().manual_seed(seed))


def _gradients(parts: Parts, batches: list[torch.Tensor], clip: float) -> tuple[StepResult, dict[str, torch.Tensor]]:
    """What the optimizer gets to see; nothing is updated."""
    loss_module, optimizer = parts
    seen: dict[str, torch.Tensor] = {}

    def look(*_: Any) -> None:
        for name, parameter in loss_module.model.named_parameters():
            assert parameter.grad is not None
            seen[name] = parameter.grad.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "step", look)
        result = take_step(parts, batches, clip)
    return result, seen


def _state(parts: Parts) -> dict[str, bytes]:
    """Weights, records and moments as bytes, so that a NaN equals itself."""
    loss_module, optimizer = parts
    tensors = {f"model {name}": value.detach() for name, value in loss_module.model.named_parameters()}
    for name, record in optimizer.records.items():
        tensors |= {f"{name} {part}": value for part, value in record.tensors().items()}
    for name, trained in optimizer.direct.items():
        tensors |= {f"direct {part}": value for part, value in trained.tensors(name)}
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


def test_two_micro_batches_are_one_batch_of_both(parts: Parts) -> None:
    ids_BT = _ids(4)
    one, whole = _gradients(parts, [ids_BT], UNCLIPPED)
    two, accumulated = _gradients(parts, list(ids_BT.split(2)), UNCLIPPED)
    assert two.loss == pytest.approx(one.loss, rel=1e-6)
    assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-4, atol=1e-6)


def test_loss_and_gradients_are_those_of_the_stock_model(parts: Parts) -> None:
    ids_BT = _ids(2)
    result, gradients = _gradients(parts, [ids_BT], UNCLIPPED)
    model: Any = parts[0].model
    loss = model(input_ids=ids_BT, labels=ids_BT).loss
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(get_total_norm(expected.values()).item(), rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_and_the_norm_is_the_one_before(parts: Parts) -> None:
    ids_BT = _ids(2)
    free, whole = _gradients(parts, [ids_BT], UNCLIPPED)
    result, clipped = _gradients(parts, [ids_BT], 0.5)
    assert result.grad_norm == free.grad_norm > 0.5
    assert get_total_norm(clipped.values()).item() == pytest.approx(0.5, rel=1e-4)
    name = next(iter(whole))
    torch.testing.assert_close(clipped[name], whole[name] * (0.5 / free.grad_norm), rtol=1e-4, atol=1e-7)


def test_a_step_updates_and_leaves_no_gradient(parts: Parts) -> None:
    before = _state(parts)
    result = take_step(parts, [_ids(2)], 1.0)
    assert not result.skipped
    assert parts[1].updates == 1
    after = _state(parts)
    unchanged = {name for name, value in after.items() if before[name] == value}
    assert unchanged == set()
    assert all(parameter.grad is None for parameter in parts[0].parameters())


def _poison_weight(parts: Parts, patch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        next(parts[0].parameters())[0, 0] = torch.nan
        next(parts[0].parameters())[:, 1] = torch.nan


def _poison_loss(value: float) -> Callable[[Parts, pytest.MonkeyPatch], None]:
    def poison(parts: Parts, patch: pytest.MonkeyPatch) -> None:
        forward = parts[0].forward
        patch.setattr(parts[0], "forward", lambda ids_BT: forward(ids_BT) * value)

    return poison


def _poison_gradient(parts: Parts, patch: pytest.MonkeyPatch) -> None:
    """The loss stays finite."""
    parameter = next(parts[0].parameters())
    parameter.register_hook(lambda gradient: gradient * torch.inf)


@pytest.mark.parametrize(
    "poison",
    [
        pytest.param(_poison_weight, id="a weight that is NaN"),
        pytest.param(_poison_loss(float("nan")), id="a loss that is NaN"),
        pytest.param(_poison_loss(float("inf")), id="a loss that is infinite"),
        pytest.param(_poison_gradient, id="a gradient that is infinite"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(
    poison: Callable[[Parts, pytest.MonkeyPatch], None], parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step(parts, [_ids(2, seed=1)], 1.0)  # So that there are moments.
    poison(parts, monkeypatch)
    before = _state(parts)
    result = take_step(parts, [_ids(2)], 1.0)
    assert result.skipped
    assert _state(parts) == before
    assert parts[1].updates == 1
    assert all(parameter.grad is None for parameter in parts[0].parameters())


def test_after_a_skipped_step_training_goes_on_as_if_it_had_not_been(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _poison_loss(float("nan"))(parts, patch)
        take_step(parts, [_ids(2, seed=1)], 1.0)
    result, gradients = _gradients(parts, [_ids(2)], 1.0)
    assert not result.skipped
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())


@pytest.mark.parametrize(
    ("changes", "dtype"), [({}, torch.float32), ({"gradient_dtype": "bfloat16"}, torch.bfloat16)], ids=["whole", "half"]
)
def test_gradients_of_a_bfloat16_model_accumulate_in_float32_or_as_asked(
    changes: dict[str, str], dtype: torch.dtype, config: Callable[..., RunConfig]
) -> None:
    parts = build_parts(config(bf16=True, **changes))
    _, gradients = _gradients(parts, list(_ids(4).split(2)), UNCLIPPED)
    assert {parameter.dtype for parameter in parts[0].parameters()} == {torch.bfloat16}
    assert {gradient.dtype for gradient in gradients.values()} == {dtype}
