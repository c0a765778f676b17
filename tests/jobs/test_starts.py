"""Whole runs from every start: they train, resume, merge and verify like the published one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pcscale.common.errors import RunError
from pcscale.config.load import check_values
from pcscale.config.schema import RunConfig
from pcscale.jobs.compress import compress
from pcscale.projection.starts import STARTS
from pcscale.training import loop
from tests.runs import World, curve, invoke, merged_weights, run_config, run_values

pytestmark = pytest.mark.usefixtures("no_plots")

OTHERS = [name for name in STARTS if name != "selection"]
SMALL: dict[str, Any] = {
    "base_precision": "int8",
    "record_dtype": "bfloat16",
    "moments": "8bit",
    "residency": "disk",
    "weight_decay": 0.1,
}


def assert_verified(run: Path) -> None:
    outcome = invoke("verify", run)
    assert outcome.exit_code == 0, outcome.stderr


@pytest.mark.parametrize(("start", "importance"), [*((name, "activation") for name in OTHERS), ("pca", "energy")])
def test_a_start_is_that_of_hard_pruning_and_trains_to_a_verified_model(
    start: str, importance: str, config: Callable[..., RunConfig], run: Path, world: World, tmp_path: Path
) -> None:
    projected = compress(config(start=start, importance=importance, max_steps=6))["evaluation"]
    pruned = compress(
        run_config(world, tmp_path / "pruned", start=start, importance=importance, method="hard_prune", max_steps=6)
    )["evaluation"]
    assert projected["start"]["loss"] == pytest.approx(pruned["start"]["loss"], rel=1e-6)
    assert projected["compressed"]["loss"] < projected["start"]["loss"]
    assert_verified(run)
    assert not (run / "rebuilt.safetensors").exists()


@pytest.mark.parametrize("settings", [{}, SMALL, {"projection_rank": 4}], ids=["float32", "4 bytes", "low rank"])
@pytest.mark.parametrize("start", ["least_squares", "pca_least_squares"])
def test_a_run_that_stops_goes_on_bit_for_bit(
    start: str, settings: dict[str, Any], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = (run_config(world, tmp_path / name, start=start, **settings) for name in ("whole", "stopped"))
    compress(whole)
    take_step = loop._take_step

    def failing(training: loop.Training) -> dict[str, Any]:
        if training.state.step == 6:
            raise RunError("the power went off")
        return take_step(training)

    monkeypatch.setattr(loop, "_take_step", failing)
    with pytest.raises(RunError, match="the power went off"):
        compress(stopped)
    monkeypatch.setattr(loop, "_take_step", take_step)
    compress(stopped, resume=True)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    assert merged_weights(tmp_path / "stopped") == merged_weights(tmp_path / "whole")
    assert_verified(tmp_path / "stopped")


def test_the_default_start_is_rotated_and_rebuilt(world: World, run: Path) -> None:
    values = run_values(world, run)
    del values["start"], values["importance"]
    config = check_values(values, "test")
    assert (config.start, config.importance) == ("pca_least_squares", "energy")
    found = compress(config)["evaluation"]
    assert found["compressed"]["loss"] < found["start"]["loss"]
    assert_verified(run)
