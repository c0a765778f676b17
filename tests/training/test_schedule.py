"""The learning rate as a function of the step."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from pcscale.training.schedule import rate_factor


@pytest.mark.parametrize(("warmup", "steps"), [(40, 1000), (2, 10), (1, 3)])
def test_the_rate_begins_at_a_tenth_peaks_after_warm_up_and_ends_at_a_tenth(warmup: int, steps: int) -> None:
    rates = [rate_factor(step, warmup, steps) for step in range(1, steps + 1)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[warmup] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert max(rates) == rates[warmup]
    assert rates == sorted(rates[:warmup]) + sorted(rates[warmup:], reverse=True)


def test_the_rate_is_that_of_torchs_own_schedulers() -> None:
    warmup, steps = 8, 50
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rates = []
    linear = LinearLR(optimizer, start_factor=0.1, total_iters=warmup)
    for _ in range(warmup):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        linear.step()
    cosine = CosineAnnealingLR(optimizer, T_max=steps - 1 - warmup, eta_min=0.1)
    for _ in range(warmup, steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert [rate_factor(step, warmup, steps) for step in range(1, steps + 1)] == pytest.approx(rates)


def test_a_warm_up_longer_than_the_run_is_cut_off_with_it() -> None:
    cut = [rate_factor(step, 40, 10) for step in range(1, 11)]
    assert cut == [rate_factor(step, 40, 1000) for step in range(1, 11)]
    assert cut[-1] == pytest.approx(0.1 + 0.9 * 9 / 40)


def test_without_a_warm_up_the_first_step_has_the_whole_rate() -> None:
    assert rate_factor(1, 0, 10) == 1.0
    assert rate_factor(10, 0, 10) == pytest.approx(0.1)


@pytest.mark.parametrize(("warmup", "expected"), [(0, 1.0), (1, 0.1), (40, 0.1)])
def test_a_run_of_one_step_has_a_rate(warmup: int, expected: float) -> None:
    assert rate_factor(1, warmup, 1) == pytest.approx(expected)
