"""`pcscale calibrate`: every kind of scores that a run can have."""

import json
from pathlib import Path

import pytest
import torch

from pcscale.calibration.collect import collect_scores, read_scores
from pcscale.calibration.statistics import SECOND_MOMENT
from pcscale.families.plan import Plan
from tests.projection.parts import CPU, open_base
from tests.runs import World, invoke


def calibrate(world: World, output: Path, *arguments: str) -> dict[str, object]:
    size = ("--tokens", "480", "--sequence-length", "24")
    outcome = invoke("calibrate", world.base, "--data", world.text, "--output", output, *size, *arguments, "--json")
    assert outcome.exit_code == 0, outcome.stderr
    return json.loads(outcome.stdout)


@pytest.mark.parametrize("importance", ["energy", "activation"])
def test_activations_are_taken_on_the_text(importance: str, world: World, tmp_path: Path) -> None:
    document = calibrate(world, tmp_path / "scores.safetensors", "--importance", importance)
    assert (document["importance"], document["tokens"]) == (importance, 480)
    scores = read_scores(tmp_path / "scores.safetensors")
    assert scores[SECOND_MOMENT].trace().item() == pytest.approx(32, rel=1e-4)
    for name in ("residual", "ffn.0", "ffn.1"):
        assert scores[name].isfinite().all()
        assert (scores[name] > 0).all()


@pytest.mark.parametrize("importance", ["magnitude", "random"])
def test_scores_that_need_no_text_are_those_of_the_weights_or_the_seed(
    importance: str, world: World, tmp_path: Path
) -> None:
    document = calibrate(world, tmp_path / "scores.safetensors", "--importance", importance, "--seed", "3")
    assert (document["importance"], document["tokens"]) == (importance, 0)
    base = open_base(world.base)
    plan = Plan(base.family, base.config, 32, 48)
    expected = collect_scores(plan, base, importance, [], 3, CPU, torch.float32)
    found = read_scores(tmp_path / "scores.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_compress_scores_by_is_the_default(world: World, tmp_path: Path) -> None:
    assert calibrate(world, tmp_path / "scores.safetensors")["importance"] == "energy"
