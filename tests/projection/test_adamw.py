"""One AdamW update against torch's own, and in few bits against bitsandbytes' own."""

import math
from dataclasses import replace

import bitsandbytes.functional
import pytest
import torch

from pcscale.common.sizes import QUANTISED_BLOCK as BLOCK
from pcscale.projection import adamw
from pcscale.projection.adamw import AdamW, update
from pcscale.projection.record import Trained
from pcscale.projection.rounding import noise_key
from pcscale.storage.blockwise import Blockwise, dynamic_code

SETTINGS = AdamW(updates=0, rate=1e-2, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1)
STEPS = 6
COUNT = 5 * BLOCK + 40
FLOAT32_TOLERANCE = 1e-6
"""The same formula in another order of float32 operations."""
MOMENTS_TOLERANCE = 0.02
"""Of the movement, as a root mean square, against AdamW in 32 bits: a code is off by up to some hundredths of its
value, and the error of a step fades as its gradient does."""
CODES_TOLERANCE = 4e-3
"""Likewise against bitsandbytes' own 8-bit AdamW: it takes the other one of two codes where a value lies in the middle
of them. Moments may differ by twice as much."""
SIGMAS = 5
"""Of a mean of many roundings. The keys are fixed, so that the test passes always or never."""


def normal(count: int = COUNT, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def gradients(count: int = COUNT) -> list[torch.Tensor]:
    return [normal(count, seed) for seed in range(10, 10 + STEPS)]


def clear_gradients(count: int = COUNT) -> list[torch.Tensor]:
    """None far below the largest: such ones lose their second moment in bitsandbytes' own 8 bits."""
    return [gradient.sign() * (0.2 + gradient.abs()) for gradient in gradients(count)]


def eight_bit(value: torch.Tensor) -> Trained:
    """A value at its start, its moments in 8 bits: all bytes zero."""
    moments = [
        Blockwise(torch.zeros(value.shape, dtype=torch.uint8), torch.zeros(-(-value.numel() // BLOCK)), signed)
        for signed in (True, False)
    ]
    return Trained(value, *moments)


FORMS = {
    "bfloat16": lambda value: Trained(value.bfloat16(), torch.zeros_like(value), torch.zeros_like(value)),
    "8bit": eight_bit,
    "bfloat16 and 8bit": lambda value: eight_bit(value.bfloat16()),
}


def bytes_of(trained: Trained) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in trained.tensors("value")
    }


def run(trained: Trained, all_gradients: list[torch.Tensor], settings: AdamW = SETTINGS, **more: object) -> None:
    for step, gradient in enumerate(all_gradients):
        update(trained, gradient, replace(settings, updates=step), noise_key(0, step, 0, 0), **more)


def by_torch(value: torch.Tensor, all_gradients: list[torch.Tensor], fused: bool = True) -> Trained:
    """The same steps of torch's own optimizer."""
    parameter = torch.nn.Parameter(value.clone())
    optimizer = torch.optim.AdamW(
        [parameter],
        lr=SETTINGS.rate,
        betas=SETTINGS.betas,
        eps=SETTINGS.epsilon,
        weight_decay=SETTINGS.weight_decay,
        fused=fused,
        foreach=False,
    )
    for gradient in all_gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    state = optimizer.state[parameter]
    return Trained(parameter.detach(), state["exp_avg"], state["exp_avg_sq"])


def relative_error(found: torch.Tensor, expected: torch.Tensor, start: torch.Tensor) -> float:
    return ((found - expected).norm() / (expected - start).norm()).item()


def test_in_float32_it_is_torch_s_fused_adamw_bit_for_bit() -> None:
    trained, expected = Trained.starting_at(normal()), by_torch(normal(), gradients())
    run(trained, gradients())
    assert bytes_of(trained) == bytes_of(expected)


def test_in_float32_it_is_torch_s_plain_adamw() -> None:
    trained, expected = Trained.starting_at(normal()), by_torch(normal(), gradients(), fused=False)
    run(trained, gradients())
    for one, other in zip(trained.tensors("value"), expected.tensors("value"), strict=True):
        torch.testing.assert_close(one[1], other[1], rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)


def test_matrices_are_updated_as_their_entries_are() -> None:
    value, shaped = normal(600), normal(600).view(20, 30)
    trained, matrix = Trained.starting_at(value), Trained.starting_at(shaped.clone())
    run(trained, gradients(600))
    run(matrix, [gradient.view(20, 30) for gradient in gradients(600)])
    assert torch.equal(matrix.value.flatten(), trained.value)


@pytest.mark.parametrize("form", ["float32", "8bit"])
def test_a_gradient_in_half_precision_is_taken_as_the_float32_that_it_is(form: str) -> None:
    halves = [gradient.bfloat16() for gradient in gradients()]
    trained, expected = (Trained.starting_at(normal()) if form == "float32" else eight_bit(normal()) for _ in range(2))
    run(trained, halves)
    run(expected, [gradient.float() for gradient in halves])
    assert bytes_of(trained) == bytes_of(expected)


def test_the_gradient_is_left_as_it_was() -> None:
    for make in (Trained.starting_at, *FORMS.values()):
        trained = make(normal())
        gradient = normal(seed=1)
        update(trained, gradient, SETTINGS)
        assert torch.equal(gradient, normal(seed=1))


def test_a_gradient_that_is_a_view_may_lie_in_any_order() -> None:
    trained, expected = eight_bit(normal(600).view(20, 30)), eight_bit(normal(600).view(20, 30))
    gradient = normal(600, seed=1).view(30, 20).T
    assert not gradient.is_contiguous()
    update(trained, gradient, SETTINGS)
    update(expected, gradient.contiguous(), SETTINGS)
    assert bytes_of(trained) == bytes_of(expected)


def test_eight_bit_moments_take_the_steps_of_32_bit_ones() -> None:
    trained, expected = eight_bit(normal()), by_torch(normal(), clear_gradients())
    run(trained, clear_gradients())
    error = relative_error(trained.value, expected.value, normal())
    assert 0 < error <= MOMENTS_TOLERANCE


def test_eight_bit_moments_are_those_of_bitsandbytes() -> None:
    trained = eight_bit(normal())
    run(trained, clear_gradients())
    value, tables = normal(), [dynamic_code(signed) for signed in (True, False)]
    # Its codes of nothing: scales of zero.
    codes = [torch.zeros(COUNT, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros(-(-COUNT // BLOCK)) for _ in range(2)]
    for step, gradient in enumerate(clear_gradients(), start=1):
        bitsandbytes.functional.optimizer_update_8bit_blockwise(
            "adam",
            gradient,
            value,
            codes[0],
            codes[1],
            *SETTINGS.betas,
            0.0,
            0.0,
            SETTINGS.epsilon,
            step,
            SETTINGS.rate,
            tables[0],
            tables[1],
            scales[0],
            scales[1],
            SETTINGS.weight_decay,
        )
    assert relative_error(trained.value, value, normal()) <= CODES_TOLERANCE
    for own, their_codes, their_scales, table in zip(
        (trained.exp_avg, trained.exp_avg_sq), codes, scales, tables, strict=True
    ):
        assert isinstance(own, Blockwise)
        torch.testing.assert_close(own.absmax, their_scales, rtol=CODES_TOLERANCE, atol=0)
        theirs = bitsandbytes.functional.dequantize_blockwise(
            their_codes, absmax=their_scales, code=table, blocksize=BLOCK
        )
        assert (own.decode() - theirs).norm() <= 2 * CODES_TOLERANCE * theirs.norm()


def test_a_gradient_far_below_its_block_s_largest_takes_no_step_beyond_the_rate() -> None:
    """Were its second moment coded as zero, it would be divided by epsilon alone."""
    settings = replace(SETTINGS, weight_decay=0.0)
    trained, gradient = eight_bit(torch.zeros(BLOCK)), torch.full((BLOCK,), 1e-5)
    gradient[0] = 1.0
    for step in range(STEPS):
        before = trained.value.clone()
        update(trained, gradient, replace(settings, updates=step))
        moved = (trained.value - before).abs()
        assert bool((moved[1:] <= 1.01 * settings.rate).all()), step
        assert bool((moved > 0).all())


@pytest.mark.parametrize("chunk", [BLOCK, 2 * BLOCK, 4 * BLOCK])
@pytest.mark.parametrize("with_start", [False, True], ids=["towards zero", "towards a start"])
@pytest.mark.parametrize("form", FORMS)
def test_chunks_change_no_bit(form: str, with_start: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    start = normal(seed=3) if with_start else None
    whole, parts = FORMS[form](normal()), FORMS[form](normal())
    run(whole, gradients(), start=start)
    monkeypatch.setattr(adamw, "CPU_CHUNK_VALUES", chunk)
    run(parts, gradients(), start=start)
    assert bytes_of(parts) == bytes_of(whole)


def test_a_start_that_is_given_is_handled_in_chunks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = Trained.starting_at(normal()), Trained.starting_at(normal())
    run(whole, gradients(), start=normal(seed=3))
    monkeypatch.setattr(adamw, "CPU_CHUNK_VALUES", BLOCK)
    run(parts, gradients(), start=normal(seed=3))
    assert bytes_of(parts) == bytes_of(whole)


@pytest.mark.parametrize("form", ["float32", "8bit"])
def test_without_a_gradient_a_value_decays_towards_its_start(form: str) -> None:
    value, start = normal(), normal(seed=3)
    trained = Trained.starting_at(value.clone()) if form == "float32" else eight_bit(value.clone())
    run(trained, [torch.zeros(COUNT)] * STEPS, start=start)
    left = (1 - SETTINGS.rate * SETTINGS.weight_decay) ** STEPS
    torch.testing.assert_close(
        trained.value, start + left * (value - start), rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE
    )
    assert (trained.value - value).norm() > 1e-3 * (value - start).norm()


def test_decay_towards_a_start_is_adamw_on_the_change_since_then() -> None:
    start = normal(seed=3)
    trained = Trained.starting_at(start.clone())
    run(trained, gradients(), start=start)
    expected = by_torch(torch.zeros(COUNT), gradients())
    torch.testing.assert_close(
        trained.value - start, expected.value, rtol=10 * FLOAT32_TOLERANCE, atol=10 * FLOAT32_TOLERANCE
    )


def test_a_value_that_is_its_start_does_not_decay() -> None:
    start = normal().bfloat16()
    trained = eight_bit(start.clone())
    run(trained, [torch.zeros(COUNT)] * STEPS, replace(SETTINGS, weight_decay=50.0), start=start)
    assert (trained.value.float() - start.float()).abs().max() <= 2**-7 * start.float().abs().max()
    decayed = eight_bit(start.clone())
    run(decayed, [torch.zeros(COUNT)] * STEPS, replace(SETTINGS, weight_decay=50.0))
    assert decayed.value.float().norm() < 0.1 * start.float().norm()


def test_updates_a_hundredth_of_a_bfloat16_step_add_up() -> None:
    """Of 1.5, whose neighbours are 2^-7 apart; rounded to the nearest, it would never move."""
    count, steps, spacing = 4096, 400, 2.0**-7
    settings = replace(SETTINGS, rate=spacing / 100, weight_decay=0.0)
    trained = FORMS["bfloat16"](torch.full((count,), 1.5))
    for step in range(steps):
        update(trained, torch.ones(count), replace(settings, updates=step), noise_key(0, step, 0, 0))
    drift = 1.5 - trained.value.double().mean().item()
    # Each step moves a value by a whole spacing with a probability of a hundredth.
    sigma = spacing * math.sqrt(steps * 0.01 * 0.99 / count)
    assert abs(drift - steps * settings.rate) <= SIGMAS * sigma
    assert len(trained.value.unique()) > 4, "values went their own ways"


def test_a_bfloat16_value_is_rounded_by_its_key_alone() -> None:
    ends = []
    for key in (1, 1, 2):
        trained = eight_bit(normal().bfloat16())
        update(trained, normal(seed=1), SETTINGS, key)
        ends.append(bytes_of(trained))
    assert ends[0] == ends[1]
    assert ends[0]["value"] != ends[2]["value"]
    assert ends[0]["value.exp_avg"] == ends[2]["value.exp_avg"], "moments are not rounded by chance"


def test_a_bfloat16_value_is_the_float32_step_to_within_a_spacing() -> None:
    trained, exact = FORMS["bfloat16"](normal()), Trained.starting_at(normal().bfloat16().float())
    update(trained, normal(seed=1), SETTINGS)
    update(exact, normal(seed=1), SETTINGS)
    away = (trained.value.float() - exact.value).abs()
    assert bool((away <= 2**-7 * exact.value.abs()).all())
    assert not torch.equal(trained.value.float(), exact.value.bfloat16().float()), "it is not the nearest everywhere"
