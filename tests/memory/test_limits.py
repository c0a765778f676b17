"""Limits on memory and disk, from trees that look like /proc and /sys."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pcscale.memory.limits import (
    Limit,
    device_in_use,
    device_limit,
    disk_free,
    host_in_use,
    host_left,
    host_limit,
)
from tests.memory.trees import GIB, Tree, write


def test_without_cgroups_the_machine_is_the_limit(tree: Tree, said: list[str]) -> None:
    assert host_limit(tree.root) == Limit(64 * GIB, "physical memory")
    assert host_in_use(tree.root) == 14 * GIB
    assert host_left(tree.root) == Limit(50 * GIB, "physical memory")
    assert not said


@pytest.mark.parametrize("meminfo", [None, "", "MemTotal: lots kB\n"])
def test_without_the_machine_s_figures_the_system_calls_tell(meminfo: str | None, tree: Tree, said: list[str]) -> None:
    write(tree.root / "proc/meminfo", meminfo or "")
    if meminfo is None:
        (tree.root / "proc/meminfo").unlink()
    found = host_limit(tree.root)
    assert found.num_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert "meminfo" in found.source
    assert host_in_use(tree.root) == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert len([text for text in said if ("MemTotal" if meminfo is not None else "No such file") in text]) == 1


@pytest.mark.parametrize(("kind", "in_use"), [("RLIMIT_DATA", 7000), ("RLIMIT_AS", 9000)])
def test_a_resource_limit_counts_this_process_alone(
    kind: str, in_use: int, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def getrlimit(asked: int) -> tuple[int, int]:
        soft = 4 * GIB if asked == getattr(resource, kind) else resource.RLIM_INFINITY
        return soft, resource.RLIM_INFINITY

    monkeypatch.setattr(resource, "getrlimit", getrlimit)
    found = host_limit(tree.root)
    assert found.num_bytes == 4 * GIB
    assert found.source.startswith(kind)
    assert host_in_use(tree.root) == in_use * 1024
    assert host_left(tree.root).num_bytes == 4 * GIB - in_use * 1024


def test_this_machine_s_limit_is_at_most_its_memory() -> None:
    found = host_limit()
    assert found.num_bytes is not None
    assert found.num_bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < host_in_use() <= found.num_bytes
    assert host_left().num_bytes is not None


def test_the_disk_of_a_folder_to_be_is_that_of_its_nearest_parent(tmp_path: Path) -> None:
    found = disk_free(tmp_path / "run" / "checkpoints")
    assert found.source == f"disk of {tmp_path}"
    assert found.num_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
    write(tmp_path / "file", "")
    assert disk_free(tmp_path / "file" / "below").num_bytes is not None


def test_a_disk_that_cannot_be_asked_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "disk_usage", refuse)
    assert disk_free(tmp_path) == Limit(None, f"unknown (not read: {tmp_path}: Permission denied)")


def test_limits_are_found_without_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from pcscale.memory.limits import *; "
        "host_limit(), host_in_use(), disk_free(Path('.')), device_limit(Path('/nowhere')); "
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_a_gpu_there_is_no_device_limit() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert device_limit() == Limit(None, "no GPU")
    assert device_in_use() == 0
