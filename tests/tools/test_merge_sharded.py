"""The merger as a script: the command line's own arguments, results and exit codes."""

import json
from pathlib import Path

import pytest

from pcscale.memory.working import merge_need_bytes
from tests.merging.trained import (
    TrainedRun,
    assert_same_tensors,
    file_bytes,
    merge_run,
    merged_tensors,
    run_python,
    train_and_save,
)
from tests.tiny import build_base

SCRIPT = "tools/merge_sharded.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    folder = tmp_path_factory.mktemp("run")
    return train_and_save(build_base(folder / "base"), folder / "step-00000003")


def test_it_writes_what_the_library_writes_and_prints_one_document(run: TrainedRun, tmp_path: Path) -> None:
    settings = ("--max-shard-size", "30KB", "--max-memory", "64MiB", "--dtype", "bfloat16", "--json")
    found = run_python(SCRIPT, run.checkpoint, "--base", run.base_folder, "--output", tmp_path / "script", *settings)
    assert found.returncode == 0, found.stderr
    result = merge_run(run, tmp_path / "library", max_shard_bytes=30_000, max_memory_bytes=64 * 2**20, dtype="bfloat16")
    printed = json.loads(found.stdout)
    assert printed.keys() == {
        "output",
        "tensors",
        "bytes_written",
        "shards",
        "seconds",
        "peak_anonymous_bytes",
        "max_memory_bytes",
    }
    assert printed["output"] == str(tmp_path / "script")
    assert printed["max_memory_bytes"] == 64 * 2**20
    same = ("tensors", "bytes_written", "shards")
    assert [printed[key] for key in same] == [getattr(result, key) for key in same]
    assert result.shards > 1
    assert file_bytes(tmp_path / "script") == file_bytes(tmp_path / "library")
    assert_same_tensors(
        merged_tensors(tmp_path / "script"), {name: weight.bfloat16() for name, weight in run.weights.items()}
    )


def test_a_cap_that_is_too_small_exits_with_3_and_names_the_least(run: TrainedRun, tmp_path: Path) -> None:
    arguments = ("--base", run.base_folder, "--output", tmp_path / "merged", "--max-memory", "1KiB")
    found = run_python(SCRIPT, run.checkpoint, *arguments)
    assert found.returncode == 3
    assert f"Give at least {merge_need_bytes(run.plan)} bytes." in found.stderr
    assert "Traceback" not in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_request_exits_with_2(run: TrainedRun, tmp_path: Path) -> None:
    found = run_python(SCRIPT, tmp_path, "--base", run.base_folder, "--output", tmp_path / "merged")
    assert found.returncode == 2
    assert found.stderr.startswith(f"pcscale: {tmp_path} is not a checkpoint: it has no manifest.json.")
    assert list(tmp_path.iterdir()) == []
