"""A run that goes on with another length than it was begun with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pcscale.common.errors import RequestError, RunError
from pcscale.config.schema import RunConfig
from pcscale.jobs.compress import compress
from pcscale.reporting.compare import compare_runs
from tests.runs import metrics

pytestmark = pytest.mark.usefixtures("no_plots")


def test_a_run_without_a_checkpoint_takes_as_much_text_as_its_new_length_needs(
    config: Callable[..., RunConfig], run: Path
) -> None:
    compress(config(max_steps=1, eval_steps=1, calibration_tokens=1))
    few = len(load_file(run / "tokens.safetensors")["train"])
    shutil.rmtree(run / "checkpoints")  # as when it is killed before its first one
    compress(config(max_steps=4, eval_steps=4, calibration_tokens=1), resume=True)
    assert len(load_file(run / "tokens.safetensors")["train"]) > few


def test_a_run_cut_short_to_its_checkpoint_forgets_the_steps_after_it(
    config: Callable[..., RunConfig], run: Path
) -> None:
    compress(config(max_steps=4, eval_steps=4, calibration_tokens=1))
    rows = metrics(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(rows[-1] | {"step": 5}) + "\n")  # as when it is killed after step 5 of a longer run
    report = compress(config(max_steps=4, eval_steps=4, calibration_tokens=1), resume=True)
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    assert report["training"]["steps"] == 4


def test_a_longer_run_that_stops_before_its_merge_is_evaluated_is_not_compared_by_its_earlier_one(
    config: Callable[..., RunConfig], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise RunError("stopped")

    few, many = ({"max_steps": steps, "eval_steps": steps, "calibration_tokens": 1} for steps in (2, 4))
    earlier = compress(config(**few))["evaluation"]
    with monkeypatch.context() as patch:
        patch.setattr("pcscale.jobs.compress.evaluate_model", stopped)
        with pytest.raises(RunError, match="stopped"):
            compress(config(**many), resume=True)
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    finished = shutil.copytree(run, run.parent / "finished")
    with pytest.raises(RequestError, match=r"is not finished: evaluation\.json has no 'compressed'\. Go on with: pcs"):
        compare_runs([run, finished])
    found = compress(config(**many), resume=True)["evaluation"]
    assert found.pop("compressed") != earlier.pop("compressed")
    assert found == earlier
    assert json.loads((run / "evaluation.json").read_text()).keys() == {"base", "start", "compressed", "sample"}
