"""Scores that need no text, against sums made by hand."""

import pytest
import torch

from pcscale.calibration.score import magnitude_scores, random_scores
from pcscale.calibration.select import select
from tests.projection.parts import Compression, TinyBase
from tests.tiny import CASES

SUM_TOLERANCE = 1e-5
"""Relative: float32 sums of some thousand numbers, in another order."""
SELECTIONS = 400
UNIFORM_TOLERANCE = 0.12
"""More than five standard deviations of a share of 0.75 in 400 draws."""


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_magnitude_is_the_sum_of_absolute_weights_that_touch_a_channel(
    family: str, tied: bool, tiny_base: TinyBase
) -> None:
    compression = Compression.of(tiny_base(family, tied))
    w = {name: weight.double().abs() for name, weight in compression.weights.items()}
    residual = w["model.embed_tokens.weight"].sum(0)
    if not tied:
        residual = residual + w["lm_head.weight"].sum(0)
    expected = {}
    for layer in range(2):
        part = f"model.layers.{layer}."
        for reader in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            residual = residual + w[f"{part}{reader}.weight"].sum(0)
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            residual = residual + w[f"{part}{writer}.weight"].sum(1)
        expected[f"ffn.{layer}"] = (
            w[f"{part}mlp.gate_proj.weight"].sum(1)
            + w[f"{part}mlp.up_proj.weight"].sum(1)
            + w[f"{part}mlp.down_proj.weight"].sum(0)
        )
    expected["residual"] = residual
    found = magnitude_scores(compression.plan, compression.base.tensor)
    assert found.keys() == expected.keys()
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score.float(), rtol=SUM_TOLERANCE, atol=0)


@pytest.fixture
def compression(tiny_base: TinyBase) -> Compression:
    return Compression.of(tiny_base("llama", True))


def test_magnitudes_of_half_precision_are_summed_in_float32(compression: Compression) -> None:
    half = {name: weight.bfloat16() for name, weight in compression.weights.items()}
    found = magnitude_scores(compression.plan, half.__getitem__)
    whole = magnitude_scores(compression.plan, {name: weight.float() for name, weight in half.items()}.__getitem__)
    for name, score in whole.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], score, rtol=SUM_TOLERANCE, atol=0)


def test_a_seed_decides_random_scores_and_leaves_the_global_generator_alone(compression: Compression) -> None:
    state = torch.get_rng_state()
    one, same, other = (random_scores(compression.plan, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: len(score) for name, score in one.items()} == {"residual": 32, "ffn.0": 48, "ffn.1": 48}
    for name, score in one.items():
        assert torch.equal(score, same[name])
        assert not torch.equal(score, other[name])
    assert not torch.equal(one["ffn.0"], one["ffn.1"])


def test_random_scores_are_in_no_order(compression: Compression) -> None:
    for score in random_scores(compression.plan, 0).values():
        rises = (score.diff() > 0).float().mean()
        assert 0.25 < rises < 0.75


def test_over_many_seeds_every_channel_is_kept_alike(compression: Compression) -> None:
    counts = {name: torch.zeros(size) for name, size, _ in compression.plan.kept_axes()}
    for seed in range(SELECTIONS):
        for name, indices in select(compression.plan, random_scores(compression.plan, seed)).items():
            counts[name][indices] += 1
    for name, base_size, size in compression.plan.kept_axes():
        share = counts[name] / SELECTIONS
        assert share.mean().item() == pytest.approx(size / base_size)
        assert (share - size / base_size).abs().max() < UNIFORM_TOLERANCE
