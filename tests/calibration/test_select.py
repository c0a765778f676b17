"""Scores into kept indices."""

import re

import pytest
import torch

from pcscale.calibration.score import Scores, random_scores
from pcscale.calibration.select import select
from pcscale.common.errors import RequestError
from tests.projection.parts import Compression, TinyBase


@pytest.fixture
def compression(tiny_base: TinyBase) -> Compression:
    return Compression.of(tiny_base("llama", True))


@pytest.fixture
def scores(compression: Compression) -> Scores:
    return random_scores(compression.plan, 8)


def test_the_highest_scores_are_kept_in_ascending_order(compression: Compression, scores: Scores) -> None:
    kept = select(compression.plan, scores)
    assert {name: len(indices) for name, indices in kept.items()} == {"residual": 24, "ffn.0": 40, "ffn.1": 40}
    for name, indices in kept.items():
        ranked = sorted(range(len(scores[name])), key=lambda index: -scores[name][index].item())
        assert indices.dtype == torch.int64
        assert indices.tolist() == sorted(ranked[: len(indices)])


def test_of_equal_scores_the_lower_index_is_kept(compression: Compression, scores: Scores) -> None:
    scores["residual"] = torch.ones(32)
    scores["ffn.0"] = torch.tensor([1.0, 2.0] * 24)
    kept = select(compression.plan, scores)
    assert kept["residual"].tolist() == list(range(24))
    assert kept["ffn.0"].tolist() == sorted([*range(1, 48, 2), *range(0, 32, 2)])


def test_negative_scores_are_ranked_by_value(compression: Compression, scores: Scores) -> None:
    scores["residual"] = -torch.arange(32.0)
    assert select(compression.plan, scores)["residual"].tolist() == list(range(24))


def test_more_scores_than_needed_do_no_harm(compression: Compression, scores: Scores) -> None:
    more = scores | {"second_moment.residual": torch.full((32, 32), torch.nan)}
    kept = select(compression.plan, more)
    assert kept.keys() == scores.keys()


def test_absent_scores_are_refused(compression: Compression, scores: Scores) -> None:
    del scores["ffn.1"]
    message = "scores 'ffn.1' are absent, this base needs [48]. Calibrate on this base."
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        select(compression.plan, scores)


@pytest.mark.parametrize("shape", [[31], [33], [32, 1], []])
def test_scores_of_another_shape_are_refused(compression: Compression, scores: Scores, shape: list[int]) -> None:
    scores["residual"] = torch.ones(shape)
    message = f"scores 'residual' are of shape {shape}, this base needs [32]. Calibrate on this base."
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        select(compression.plan, scores)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(compression: Compression, scores: Scores, value: float) -> None:
    scores["ffn.0"][3] = value
    with pytest.raises(RequestError, match=r"^scores 'ffn\.0' are not finite\. Calibrate again\.$"):
        select(compression.plan, scores)
