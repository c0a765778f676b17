"""A run that meets losses which are not finite: skipped, counted, and in the end stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pcscale.common.errors import RunError
from pcscale.config.schema import RunConfig
from pcscale.jobs.compress import compress
from pcscale.model.loss import NextTokenLoss
from pcscale.run.manifest import Manifest
from tests.runs import World, curve, metrics, refusal, run_config, run_values, saved_steps, write_yaml

pytestmark = pytest.mark.usefixtures("no_plots")


def _poison(patch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The loss of these steps is NaN; what evaluation sees is not touched."""
    forward, calls = NextTokenLoss.forward, 0

    def poisoned(self: NextTokenLoss, ids_BT: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        loss = forward(self, ids_BT)
        if not self.training:
            return loss
        calls += 1
        return loss * torch.nan if (calls + 1) // 2 in steps else loss  # Two micro batches a step.

    patch.setattr(NextTokenLoss, "forward", poisoned)


def _trainer(run: Path) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / f"step-{saved_steps(run)[-1]:08d}" / "trainer.json").read_text())


def test_a_single_skipped_step_is_counted_and_the_run_goes_on(
    config: Callable[..., RunConfig], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, {3})
    report = compress(config())
    rows = metrics(run)
    assert len(rows) == 10
    assert {key: rows[2][key] for key in ("step", "tokens", "loss", "grad_norm", "skipped")} == {
        "step": 3,
        "tokens": 288,
        "loss": None,
        "grad_norm": None,
        "skipped": True,
    }
    assert all("skipped" not in row and row["loss"] > 0 for row in rows if row["step"] != 3)
    assert report["training"]["skipped_steps"] == 1
    trainer = _trainer(run)
    assert (trainer["step"], trainer["skipped"], trainer["skipped_in_row"]) == (10, 1, 0)
    assert rows[-1]["eval_loss"] < report["evaluation"]["start"]["loss"]


def test_only_skipped_steps_in_a_row_stop_a_run(
    config: Callable[..., RunConfig], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, {2, 3, 5, 6, 8, 9})
    compress(config(max_skipped_steps=3))
    assert [row["step"] for row in metrics(run) if row.get("skipped")] == [2, 3, 5, 6, 8, 9]
    outer = load_file(run / "checkpoints" / "step-00000010" / "outer.safetensors")
    assert int(outer["updates"]) == 4


def test_skipped_steps_in_a_row_are_counted_across_a_resume(
    world: World, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _poison(patch, {3, 4})
        compress(run_config(world, run, max_steps=4))
    assert _trainer(run)["skipped_in_row"] == 2
    _poison(monkeypatch, {1})  # The first one from here on: step 5.
    with pytest.raises(RunError, match=r"not finite in 3 steps in a row, up to step 5\. Last checkpoint: .*00000004"):
        compress(run_config(world, run, max_steps=10, max_skipped_steps=3), resume=True)


def test_a_hopeless_run_stops_with_its_last_checkpoint_whole(
    world: World, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(run_config(world, run.parent / "unharmed"))
    yaml = write_yaml(run.parent / "run.yaml", run_values(world, run, max_skipped_steps=3, save_steps=5))
    with monkeypatch.context() as patch:
        _poison(patch, set(range(6, 11)))
        assert refusal("compress", yaml, exit_code=1) == (
            "loss or gradients were not finite in 3 steps in a row, up to step 8. "
            f"Last checkpoint: {run / 'checkpoints' / 'step-00000005'}. Lower learning_rate, or look at the data."
        )
    assert [row.get("skipped", False) for row in metrics(run)] == [False] * 5 + [True] * 3
    assert saved_steps(run) == [5]
    assert not (run / "merged").exists()
    checkpoint = run / "checkpoints" / "step-00000005"
    manifest = Manifest.read(checkpoint)
    assert all(manifest.file(checkpoint, name).is_file() for name in manifest.files)

    compress(run_config(world, run, max_skipped_steps=3, save_steps=5), resume=True)
    assert curve(run) == curve(run.parent / "unharmed")


def test_a_run_that_is_hopeless_from_the_start_has_no_checkpoint_to_name(
    config: Callable[..., RunConfig], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, set(range(1, 11)))
    with pytest.raises(RunError, match=r"up to step 2\. Last checkpoint: none\."):
        compress(config(max_skipped_steps=2))
    assert saved_steps(run) == []


def test_a_held_out_loss_that_is_not_finite_is_null(
    config: Callable[..., RunConfig], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pcscale.training.loop.evaluate_now", lambda *_: float("inf"))
    compress(config(max_steps=2, eval_steps=1, logging_steps=1))
    assert [row["eval_loss"] for row in metrics(run)] == [None, None]
    assert _trainer(run)["eval_loss"] is None
