"""Limits on memory and disk: a machine's, a process's, and those of cgroups v1 and v2."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pcscale.memory.limits import (
    Limit,
    device_limit,
    disk_free,
    host_in_use,
    host_left,
    host_limit,
)
from tests.memory.trees import GIB, V1_NONE, Tree, write


def test_without_cgroups_the_machine_is_the_limit(tree: Tree, warnings: list[str]) -> None:
    assert host_limit(tree.root) == Limit(64 * GIB, "physical memory")
    assert host_in_use(tree.root) == 14 * GIB
    assert host_left(tree.root) == Limit(50 * GIB, "physical memory")
    assert not warnings


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
    assert host_in_use(tree.root) == in_use
    assert host_left(tree.root).num_bytes == 4 * GIB - in_use


def test_this_machine_s_limit_is_at_most_its_memory() -> None:
    found = host_limit()
    assert found.num_bytes is not None
    assert found.num_bytes <= psutil.virtual_memory().total
    assert 0 < host_in_use() <= found.num_bytes
    assert host_left().num_bytes is not None


# Cgroups


def test_a_v1_limit_counts_what_the_group_cannot_give_back(tree: Tree) -> None:
    tree.in_v1("/job/step")
    tree.v1_group("", V1_NONE)
    tree.v1_group("job", V1_NONE)
    tree.v1_group("job/step", 8 * GIB, f"cache {5 * GIB}\ntotal_rss {2 * GIB}\ntotal_shmem {GIB}\n")
    assert host_limit(tree.root) == Limit(8 * GIB, "cgroup /job/step, memory.limit_in_bytes")
    assert host_in_use(tree.root) == 3 * GIB
    assert host_left(tree.root) == Limit(5 * GIB, "cgroup /job/step, memory.limit_in_bytes")


def test_a_v2_limit_counts_what_the_group_cannot_give_back(tree: Tree) -> None:
    tree.in_v2("/user.slice/job")
    tree.v2_group("user.slice", "max")
    tree.v2_group("user.slice/job", 8 * GIB, f"anon {2 * GIB}\nfile {5 * GIB}\nshmem {GIB}\npagetables 4096\n")
    assert host_limit(tree.root) == Limit(8 * GIB, "cgroup /user.slice/job, memory.max")
    assert host_in_use(tree.root) == 3 * GIB + 4096


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_limit_of_an_ancestor_holds_with_what_all_below_it_use(tree: Tree, version: str) -> None:
    group = tree.v1_group if version == "v1" else tree.v2_group
    (tree.in_v1 if version == "v1" else tree.in_v2)("/a/b/c")
    key = "total_rss" if version == "v1" else "anon"
    group("a", 20 * GIB, f"{key} {19 * GIB}\n")
    group("a/b", 6 * GIB, f"{key} {GIB}\n")
    group("a/b/c", 12 * GIB, f"{key} 0\n")
    found = host_limit(tree.root)
    assert found.num_bytes == 6 * GIB
    assert found.source.startswith("cgroup /a/b, ")
    assert host_in_use(tree.root) == GIB
    left = host_left(tree.root)
    assert left.num_bytes == GIB
    assert left.source.startswith("cgroup /a, ")


def test_a_v2_group_is_slowed_down_at_memory_high(tree: Tree) -> None:
    tree.in_v2("/job")
    tree.v2_group("job", 8 * GIB)
    write(tree.root / "sys/fs/cgroup/job/memory.high", f"{6 * GIB}\n")
    assert host_limit(tree.root) == Limit(6 * GIB, "cgroup /job, memory.high")


@pytest.mark.parametrize("none", [V1_NONE, 2**60])
def test_a_v1_group_without_a_limit_sets_none(tree: Tree, none: int) -> None:
    tree.in_v1("/job")
    tree.v1_group("job", none)
    assert host_limit(tree.root) == Limit(64 * GIB, "physical memory")


def test_a_limit_above_physical_memory_is_none(tree: Tree) -> None:
    tree.in_v2("/job")
    tree.v2_group("job", 65 * GIB)
    assert host_limit(tree.root) == Limit(64 * GIB, "physical memory")


@pytest.mark.parametrize("path", ["/", "/docker/abc", "/../elsewhere"])
def test_a_container_that_sees_its_own_group_as_the_root_is_limited_by_it(path: str, tree: Tree) -> None:
    tree.in_v2(path)
    tree.v2_group("", 2 * GIB, "anon 17\n")
    assert host_limit(tree.root) == Limit(2 * GIB, "cgroup /, memory.max")
    assert host_in_use(tree.root) == 17


def test_v2_without_memory_beside_v1_with_it_is_passed_over(tree: Tree) -> None:
    tree.in_v1("/job")
    tree.v1_group("job", GIB)
    tree.v2_group("", GIB // 2)
    assert host_limit(tree.root) == Limit(GIB, "cgroup /job, memory.limit_in_bytes")


SPOILT: dict[str, tuple[Callable[[Tree], object], str]] = {
    "a word for a limit": (lambda tree: tree.v2_group("job", "plenty"), r"memory.max holds 'plenty'"),
    "a negative limit": (lambda tree: tree.v2_group("job", -5), r"memory.max holds '-5'"),
    "a folder for a limit": (
        lambda tree: (tree.root / "sys/fs/cgroup/job/memory.max").mkdir(parents=True),
        r"memory.max: Is a directory",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_cannot_be_read_is_passed_over_and_named_once(case: str, tree: Tree, warnings: list[str]) -> None:
    spoil, problem = SPOILT[case]
    tree.in_v2("/job")
    spoil(tree)
    found = host_limit(tree.root)
    assert found.num_bytes == 64 * GIB
    assert problem in found.source
    assert host_limit(tree.root) == found
    about_it = [text for text in warnings if problem in text]
    assert len(about_it) == 1
    assert about_it[0].startswith("limits of memory: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_limit_that_may_not_be_read_is_named(tree: Tree) -> None:
    tree.in_v2("/job")
    tree.v2_group("job", GIB)
    (tree.root / "sys/fs/cgroup/job/memory.max").chmod(0)
    assert "memory.max: Permission denied" in host_limit(tree.root).source


@pytest.mark.parametrize("stat", [None, "", "anon many\n", "file 3\n"])
def test_without_a_group_s_figures_the_machine_s_are_taken(stat: str | None, tree: Tree, warnings: list[str]) -> None:
    tree.in_v2("/job")
    tree.v2_group("job", 8 * GIB, stat or "")
    if stat is None:
        (tree.root / "sys/fs/cgroup/job/memory.stat").unlink()
    assert host_limit(tree.root).num_bytes == 8 * GIB
    assert host_in_use(tree.root) == 14 * GIB
    assert len([text for text in warnings if "memory.stat" in text]) == 1
    assert host_left(tree.root).num_bytes == 50 * GIB, "the group's own is not known"
    assert "memory.stat" in host_left(tree.root).source


# Disk and device


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
