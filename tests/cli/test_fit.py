"""What cannot fit is refused before any work, and begun all the same where the user insists."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pcscale.common.errors import RequestError
from pcscale.jobs import fit
from pcscale.jobs.run import open_run
from pcscale.memory.limits import Limit
from tests.runs import World, invoke, run_config, run_values, write_yaml

MIB = 2**20


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "host_limit", lambda: Limit(100 * MIB, "a small machine"))


def test_a_run_beyond_the_memory_is_refused(little_memory: None, refuse: Callable[..., str]) -> None:
    message = refuse(exit_code=3)
    assert "the run does not fit: phase" in message
    assert "of host memory, there is 100.0 MiB (a small machine)" in message
    assert "--force" in message


def test_a_run_beyond_the_disk_is_refused(monkeypatch: pytest.MonkeyPatch, refuse: Callable[..., str]) -> None:
    monkeypatch.setattr(fit, "disk_free", lambda path: Limit(1000, "a full disk"))
    assert "of disk, there is 1000 B (a full disk)" in refuse(exit_code=3)


def test_force_begins_it_with_a_warning(little_memory: None, world: World, run: Path, tmp_path: Path) -> None:
    yaml = write_yaml(tmp_path / "run.yaml", run_values(world, run))
    outcome = invoke("compress", yaml, "--force")
    assert outcome.exit_code == 0, outcome.stderr
    assert "warning: the run does not fit" in outcome.stderr
    assert (run / "merged").is_dir()


def test_a_run_that_others_leave_no_room_for_begins_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, world: World, run: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(fit, "host_left", lambda: Limit(MIB, "a busy machine"))
    monkeypatch.setattr(fit, "anonymous_bytes", lambda: 2 * MIB)
    outcome = invoke("compress", write_yaml(tmp_path / "run.yaml", run_values(world, run)), "--dry-run")
    assert outcome.exit_code == 0
    assert "other processes leave 3.0 MiB of it now (a busy machine)" in " ".join(outcome.stderr.split())


def test_the_plan_is_printed_with_the_limits_it_must_fit(world: World, run: Path, tmp_path: Path) -> None:
    yaml = write_yaml(tmp_path / "run.yaml", run_values(world, run))
    message = invoke("compress", yaml, "--dry-run").stderr
    assert "predicted host memory of " in message
    assert "predicted disk of " in message
    assert "training holds most for: " in message
    assert not run.exists()


def test_a_merge_that_cannot_be_written_is_found_at_step_0(
    monkeypatch: pytest.MonkeyPatch, world: World, run: Path, tmp_path: Path
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pcscale.storage.writer.os.posix_fallocate", full)
    yaml = write_yaml(tmp_path / "run.yaml", run_values(world, run))
    outcome = invoke("compress", yaml)
    assert outcome.exit_code == 1
    assert "the disk is full" in outcome.stderr
    assert not (run / "scores.safetensors").exists()
    assert not (run / "metrics.jsonl").exists()
    assert not list(run.glob(".partial-*"))


def test_a_snapshot_needs_a_gpu(refuse: Callable[..., str]) -> None:
    assert "memory_snapshot records a GPU's allocator, and there is no GPU here" in refuse("memory_snapshot=true")


def test_a_snapshot_is_refused_by_the_torch_that_fails_with_it(
    monkeypatch: pytest.MonkeyPatch, world: World, run: Path
) -> None:
    config = run_config(world, run, memory_snapshot=True)
    opened = replace(open_run(config, resume=False), device=torch.device("cuda"))
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with pytest.raises(RequestError, match=r"torch 2\.11\.0\+cu130 fails in the backward pass"):
        fit.check_requests(opened)
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    fit.check_requests(opened)
