"""A run that goes on with another length than it was begun with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pcscale.config.schema import RunConfig
from pcscale.training.pipeline import compress
from tests.training.runs import metrics

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
