"""Outputs that must not be written, and what the other subcommands refuse: in a line or two, and nothing is harmed."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs import (
    World,
    curve,
    invoke,
    leftovers,
    merged_weights,
    refusal,
    run_values,
    saved_steps,
    snapshot,
    write_yaml,
)
from tests.tiny import build_base

pytestmark = pytest.mark.usefixtures("no_plots")

SHARD = "model.safetensors"
NORM = "model.norm.weight"


def _change_config(base: Path, **changes: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_output_folder_that_holds_something_else(world: World, run: Path, tmp_path: Path) -> None:
    run.mkdir()
    (run / "thesis.txt").write_text("years of work")
    yaml = write_yaml(tmp_path / "run.yaml", run_values(world, run))
    for flags in ([], ["--resume"], ["--dry-run"]):
        assert refusal("compress", yaml, *flags) == (
            f"{run} holds thesis.txt and is no run folder. Name a new folder as output."
        )
    assert snapshot(run).keys() == {"thesis.txt"}


def test_an_output_that_is_a_file(world: World, run: Path, tmp_path: Path) -> None:
    run.write_text("years of work")
    yaml = write_yaml(tmp_path / "run.yaml", run_values(world, run))
    assert refusal("compress", yaml) == f"{run} is a file. Name a new folder as output."
    assert run.read_text() == "years of work"


def _no_permission(*_: Any, **__: Any) -> Any:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_an_output_that_may_not_be_written(
    refuse: Callable[..., str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda self, *a, **k: _no_permission() if self == run else make(self, *a, **k))
    assert refuse() == f"{run}: no permission to write here. Choose another folder or change it."


def test_a_disk_that_fills_up_in_a_checkpoint_leaves_the_earlier_one_and_the_run_goes_on(
    world: World, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "plain"
    assert invoke("compress", write_yaml(tmp_path / "p.yaml", run_values(world, plain))).exit_code == 0
    yaml = write_yaml(tmp_path / "run.yaml", run_values(world, run))
    reserve, calls = os.posix_fallocate, 0

    def full(*arguments: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 22:  # Tokens, scores, the first checkpoint's 16 files and a few of the second's.
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        said = refusal("compress", yaml, exit_code=1)
    assert str(run / "checkpoints") in said
    assert said.endswith("the disk is full. Nothing was replaced; free space and run again.")
    assert saved_steps(run) == [4]
    assert leftovers(run) == []
    assert invoke("compress", yaml, "--resume").exit_code == 0
    assert curve(run) == curve(plain)
    assert merged_weights(run) == merged_weights(plain)


def test_a_disk_that_fills_up_in_the_metrics_is_said(
    world: World, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = write_yaml(tmp_path / "run.yaml", run_values(world, run))

    def full(training: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pcscale.training.loop._take_step", full)
    said = refusal("compress", yaml, exit_code=1)
    assert said == f"{run / 'metrics.jsonl'}: the disk is full. Nothing was replaced; free space and run again."


# Merge, evaluate, verify, report, calibrate


def test_merge_with_a_checkpoint_of_another_base(finished: Path, tmp_path: Path) -> None:
    other = build_base(tmp_path / "other", tokenizer=True, seed=5)
    output = tmp_path / "merged"
    said = refusal("merge", finished, "--base", other, "--output", output)
    assert said.startswith(f"{other / SHARD}: model.")
    assert " is not the weight this checkpoint was trained on (fingerprint " in said
    assert said.endswith("Use the same base and revision.")
    assert not output.exists()


def test_merge_with_a_base_of_another_config(finished: Path, base: Path, world: World, tmp_path: Path) -> None:
    _change_config(base, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert refusal("merge", finished, "--base", base, "--output", tmp_path / "merged") == (
        f"{base / 'config.json'} is not the config this checkpoint was trained on. Use the base {world.base}."
    )
    assert not (tmp_path / "merged").exists()


def test_merge_into_a_folder_that_holds_something(finished: Path, world: World, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    assert refusal("merge", finished, "--base", world.base, "--output", output) == (
        f"{output} already holds thesis.txt. Name a new folder or empty it."
    )
    assert snapshot(output).keys() == {"thesis.txt"}


def test_merge_onto_a_file(finished: Path, world: World, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    output.write_text("years of work")
    said = refusal("merge", finished, "--base", world.base, "--output", output)
    assert said == f"{output} is a file. Name a new folder."
    assert output.read_text() == "years of work"


def test_merge_under_a_cap_that_is_too_small(finished: Path, world: World, tmp_path: Path) -> None:
    arguments = ["merge", finished, "--base", world.base, "--output", tmp_path / "merged", "--max-memory", "1kB"]
    said = refusal(*arguments, exit_code=3)
    assert said.startswith("max_memory 1000 B is too small: one block of the largest matrix takes ")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--max-shard-size", "huge", "'huge' is not a size. Write it like 5GB, 5GiB or 5000000000."),
        ("--max-memory", "-1", "'-1' is not a size. Write it like 5GB, 5GiB or 5000000000."),
        ("--dtype", "int4", "dtype int4 is not known. Use one of float32, bfloat16, float16."),
    ],
)
def test_merge_with_a_value_that_is_wrong(
    flag: str, value: str, message: str, finished: Path, world: World, tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    assert refusal("merge", finished, "--base", world.base, "--output", output, flag, value) == message
    assert not output.exists()


def test_merge_of_what_is_no_checkpoint(world: World, tmp_path: Path) -> None:
    assert refusal("merge", tmp_path, "--base", world.base, "--output", tmp_path / "merged") == (
        f"{tmp_path} is not a checkpoint: it has no manifest.json. Name a step-… folder of a run."
    )


@pytest.mark.parametrize("subcommand", ["verify", "report"])
def test_what_is_no_run_folder(subcommand: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    said = refusal(subcommand, tmp_path)
    assert said.startswith(f"{tmp_path} is ")
    assert "run folder" in said
    assert snapshot(tmp_path).keys() == {"thesis.txt"}


def test_verify_of_a_checkpoint_with_a_flipped_bit(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    path = run / "checkpoints" / "step-00000010" / "outer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    said = refusal("verify", run)
    assert said == f"{path} is not what was written (its fingerprint differs). Use another checkpoint."


def test_verify_of_a_run_without_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    assert refusal("verify", run) == f"{run} has no checkpoint yet. Train first."


def test_evaluate_of_what_is_no_model(world: World, tmp_path: Path) -> None:
    said = refusal("evaluate", tmp_path, "--data", world.text)
    assert said == f"{tmp_path} has no config.json. Name a folder with a Hugging Face checkpoint."


def test_evaluate_of_a_model_that_stock_transformers_cannot_load(world: World, base: Path) -> None:
    os.truncate(base / SHARD, 5000)
    said = refusal("evaluate", base, "--data", world.text, "--sequence-length", "24")
    assert said.startswith(f"{base}: stock transformers cannot load it: ")


def test_evaluate_beside_a_base_of_another_vocabulary(world: World, finished: Path, tmp_path: Path) -> None:
    other = build_base(tmp_path / "other", tokenizer=True, vocab_size=310)
    assert refusal("evaluate", finished / "merged", "--base", other, "--data", world.text) == (
        f"{finished / 'merged'} has a vocabulary of 300, {other} one of 310. Name its own base."
    )


def test_evaluate_of_a_model_whose_weights_are_not_finite(world: World, base: Path) -> None:
    weights = load_file(base / SHARD)
    weights[NORM] = torch.full_like(weights[NORM], torch.nan)
    save_file(weights, base / SHARD, {"format": "pt"})
    said = refusal("evaluate", base, "--data", world.text, "--sequence-length", "24")
    assert said == "the held-out loss is nan: the model's outputs are not finite. Check its weights."


def test_calibrate_on_text_that_is_missing(world: World, tmp_path: Path) -> None:
    output = tmp_path / "scores.safetensors"
    said = refusal("calibrate", world.base, "--data", tmp_path / "none.txt", "--output", output)
    assert said.startswith(f"{tmp_path / 'none.txt'} does not exist.")
    assert not output.exists()


def test_calibrate_with_an_importance_that_does_not_exist(world: World, tmp_path: Path) -> None:
    arguments = ["calibrate", world.base, "--data", world.text, "--output", tmp_path / "s", "--importance", "magic"]
    assert refusal(*arguments) == (
        "calibrate: importance is 'magic': this version takes only 'activation', 'energy', 'magnitude' or 'random'."
    )
