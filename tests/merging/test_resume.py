"""An interrupted merge leaves nothing visible, and going on from it gives the bytes of an uninterrupted one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pcscale.common.errors import RunError
from pcscale.merging import merge as merging
from tests.merging.trained import (
    REPOSITORY,
    Train,
    TrainedRun,
    assert_same_tensors,
    file_bytes,
    merge_run,
    merged_tensors,
    visible,
)

SHARDS = 40_000
"""Three files."""
CUT_ELSEWHERE = 46_000
"""Three files of the same names that hold other tensors."""
FIRST, SECOND, THIRD = (f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3))
DEADLINE_SECONDS = 60

KILLED_MERGE = """
import sys, time
from pathlib import Path
from pcscale.merging import merge as merging
from tests.merging.trained import open_base

write_shard = merging._write_shard

def stuck_in_the_second(source, path, shard, advance):
    stuck = lambda *_: time.sleep(600)
    write_shard(source, path, shard, stuck if "00002" in path.name else advance)

merging._write_shard = stuck_in_the_second
checkpoint, base, output, size = sys.argv[1:]
merging.merge(Path(checkpoint), open_base(Path(base)), Path(output), int(size), 2**31)
"""


@pytest.fixture(scope="module")
def uninterrupted(run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of a merge that nothing interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "merged"
    merge_run(run, folder, max_shard_bytes=SHARDS)
    files = file_bytes(folder)
    assert {FIRST, SECOND, THIRD} < files.keys()
    return files


class _PowerCut(BaseException):
    """Nothing in the program catches this."""


def _interrupt(run: TrainedRun, output: Path, at: str = SECOND, **changes: Any) -> Path:
    """Merge until `at` is half written; returns the staging folder."""
    write_shard = merging._write_shard

    def cut(source: Any, path: Path, shard: Any, advance: Any) -> None:
        def fail(*_: object) -> None:
            raise _PowerCut

        write_shard(source, path, shard, fail if path.name == at else advance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "_write_shard", cut)
        with pytest.raises(_PowerCut):
            merge_run(run, output, **{"max_shard_bytes": SHARDS, **changes})
    return output.with_name(f".partial-{output.name}")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that a merge writes."""
    names: list[str] = []
    write_shard = merging._write_shard

    def note(source: Any, path: Path, *others: Any) -> None:
        names.append(path.name)
        write_shard(source, path, *others)

    monkeypatch.setattr(merging, "_write_shard", note)
    return names


def _identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_an_interrupted_merge_leaves_nothing_visible(run: TrainedRun, tmp_path: Path) -> None:
    staging = _interrupt(run, tmp_path / "merged")
    assert visible(tmp_path) == []
    assert sorted(path.name for path in staging.glob("model-*")) == [FIRST]
    assert not (staging / "config.json").exists()
    assert not (staging / "model.safetensors.index.json").exists()


def test_resuming_keeps_finished_shards_and_ends_with_the_same_bytes(
    run: TrainedRun, tmp_path: Path, uninterrupted: dict[str, bytes], written: list[str]
) -> None:
    kept = _identity(_interrupt(run, tmp_path / "merged", at=THIRD) / FIRST)
    written.clear()
    result = merge_run(run, tmp_path / "merged", max_shard_bytes=SHARDS, resume=True)
    assert written == [THIRD]
    assert _identity(tmp_path / "merged" / FIRST) == kept
    assert file_bytes(tmp_path / "merged") == uninterrupted
    assert result.bytes_written == sum(len(uninterrupted[name]) for name in (FIRST, SECOND, THIRD))
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_merge_may_be_interrupted_again_and_again(
    run: TrainedRun, tmp_path: Path, uninterrupted: dict[str, bytes], written: list[str]
) -> None:
    for shard, expected in ((FIRST, [FIRST]), (SECOND, [FIRST, SECOND]), (THIRD, [SECOND, THIRD])):
        written.clear()
        _interrupt(run, tmp_path / "merged", at=shard, resume=True)
        assert written == expected
    written.clear()
    merge_run(run, tmp_path / "merged", max_shard_bytes=SHARDS, resume=True)
    assert written == [THIRD]
    assert file_bytes(tmp_path / "merged") == uninterrupted


def test_a_merge_that_was_interrupted_after_its_last_shard_writes_none_again(
    run: TrainedRun,
    tmp_path: Path,
    uninterrupted: dict[str, bytes],
    written: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(merging, "write_card", full)
        with pytest.raises(RunError, match="merged: the disk is full"):
            merge_run(run, tmp_path / "merged", max_shard_bytes=SHARDS)
    assert visible(tmp_path) == []
    assert written == [FIRST, SECOND, THIRD]
    merge_run(run, tmp_path / "merged", max_shard_bytes=SHARDS, resume=True)
    assert written == [FIRST, SECOND, THIRD]
    assert file_bytes(tmp_path / "merged") == uninterrupted


@pytest.mark.parametrize("damage", ["flipped byte", "cut short", "missing"])
def test_a_damaged_finished_shard_is_written_anew(
    damage: str, run: TrainedRun, tmp_path: Path, uninterrupted: dict[str, bytes], written: list[str]
) -> None:
    shard = _interrupt(run, tmp_path / "merged", at=THIRD) / FIRST
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content if damage == "flipped byte" else content[:-1])
    if damage == "missing":
        shard.unlink()
    written.clear()
    merge_run(run, tmp_path / "merged", max_shard_bytes=SHARDS, resume=True)
    assert written == [FIRST, THIRD]
    assert file_bytes(tmp_path / "merged") == uninterrupted


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"key": 1}'])
def test_a_progress_file_that_cannot_be_used_starts_over(
    content: bytes, run: TrainedRun, tmp_path: Path, uninterrupted: dict[str, bytes], written: list[str]
) -> None:
    (_interrupt(run, tmp_path / "merged") / "merge_progress.json").write_bytes(content)
    written.clear()
    merge_run(run, tmp_path / "merged", max_shard_bytes=SHARDS, resume=True)
    assert written == [FIRST, SECOND, THIRD]
    assert file_bytes(tmp_path / "merged") == uninterrupted


def test_without_resume_everything_is_written_again(
    run: TrainedRun, tmp_path: Path, uninterrupted: dict[str, bytes], written: list[str]
) -> None:
    _interrupt(run, tmp_path / "merged", at=THIRD)
    written.clear()
    merge_run(run, tmp_path / "merged", max_shard_bytes=SHARDS)
    assert written == [FIRST, SECOND, THIRD]
    assert file_bytes(tmp_path / "merged") == uninterrupted


def test_resuming_what_never_began_merges_from_the_start(
    run: TrainedRun, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    merge_run(run, tmp_path / "merged", max_shard_bytes=SHARDS, resume=True)
    assert file_bytes(tmp_path / "merged") == uninterrupted


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "bfloat16"}, {"max_shard_bytes": 30_000}, {"max_shard_bytes": 2_000}, {"max_shard_bytes": 10**9}],
    ids=str,
)
def test_what_was_merged_otherwise_is_not_mixed_in(
    changes: dict[str, Any], run: TrainedRun, tmp_path: Path, written: list[str]
) -> None:
    merge_run(run, tmp_path / "expected", **{"max_shard_bytes": SHARDS, **changes})
    _interrupt(run, tmp_path / "merged", at=THIRD)
    written.clear()
    result = merge_run(run, tmp_path / "merged", resume=True, **{"max_shard_bytes": SHARDS, **changes})
    assert len(written) == result.shards
    assert file_bytes(tmp_path / "merged") == file_bytes(tmp_path / "expected")


def test_a_shard_size_that_cuts_elsewhere_into_as_many_files_starts_over(
    run: TrainedRun, tmp_path: Path, uninterrupted: dict[str, bytes], written: list[str]
) -> None:
    merge_run(run, tmp_path / "expected", max_shard_bytes=CUT_ELSEWHERE)
    expected = file_bytes(tmp_path / "expected")
    assert expected.keys() == uninterrupted.keys()
    assert len(expected[FIRST]) != len(uninterrupted[FIRST])
    _interrupt(run, tmp_path / "merged", at=THIRD)
    written.clear()
    merge_run(run, tmp_path / "merged", max_shard_bytes=CUT_ELSEWHERE, resume=True)
    assert written == [FIRST, SECOND, THIRD]
    assert file_bytes(tmp_path / "merged") == expected


def test_another_checkpoints_shards_are_not_mixed_in(
    run: TrainedRun, trained: Train, tmp_path: Path, written: list[str]
) -> None:
    _interrupt(trained("llama", False, "hard_prune"), tmp_path / "merged", at=THIRD)
    written.clear()
    merge_run(run, tmp_path / "merged", max_shard_bytes=SHARDS, resume=True)
    assert written == [FIRST, SECOND, THIRD]
    assert_same_tensors(merged_tensors(tmp_path / "merged"), run.weights)


def test_a_killed_process_leaves_nothing_visible_and_its_merge_goes_on(
    run: TrainedRun, tmp_path: Path, uninterrupted: dict[str, bytes], written: list[str]
) -> None:
    output, staging = tmp_path / "merged", tmp_path / ".partial-merged"
    arguments = [run.checkpoint, run.base_folder, output, SHARDS]
    process = subprocess.Popen([sys.executable, "-c", KILLED_MERGE, *map(str, arguments)], cwd=REPOSITORY)
    try:
        half_written = staging / f".partial-{SECOND}"
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not half_written.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert visible(tmp_path) == []
    kept = _identity(staging / FIRST)
    merge_run(run, output, max_shard_bytes=SHARDS, resume=True)
    assert written == [SECOND, THIRD]
    assert _identity(output / FIRST) == kept
    assert file_bytes(output) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
