"""Limits of memory cgroups, v1 and v2, from trees that look like /proc and /sys."""

import os
from collections.abc import Callable

import pytest

from pcscale.memory.cgroups import UNLIMITED_BYTES
from pcscale.memory.limits import Limit, host_in_use, host_left, host_limit
from tests.memory.trees import GIB, OTHER_MOUNTS, V1_MOUNT, V1_NONE, V2_MOUNT, Tree, write


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


def test_a_limit_above_what_a_container_sees_is_known_to_v1(tree: Tree) -> None:
    tree.in_v1("/docker/abc", top="/docker/abc")
    tree.v1_group("", V1_NONE, f"total_rss 5\nhierarchical_memory_limit {3 * GIB}\n")
    assert host_limit(tree.root) == Limit(3 * GIB, "cgroup /, hierarchical_memory_limit")


def test_the_topmost_v1_group_s_own_limit_names_itself(tree: Tree) -> None:
    tree.in_v1("/docker/abc", top="/docker")
    tree.v1_group("", 4 * GIB, f"total_rss 7\nhierarchical_memory_limit {4 * GIB}\n")
    tree.v1_group("abc", V1_NONE, f"total_rss 3\nhierarchical_memory_limit {4 * GIB}\n")
    assert host_limit(tree.root) == Limit(4 * GIB, "cgroup /, memory.limit_in_bytes")
    assert host_in_use(tree.root) == 7


def test_a_v2_group_is_slowed_down_at_memory_high(tree: Tree) -> None:
    tree.in_v2("/job")
    tree.v2_group("job", 8 * GIB)
    write(tree.root / "sys/fs/cgroup/job/memory.high", f"{6 * GIB}\n")
    assert host_limit(tree.root) == Limit(6 * GIB, "cgroup /job, memory.high")


@pytest.mark.parametrize("none", [V1_NONE, UNLIMITED_BYTES])
def test_a_v1_group_without_a_limit_sets_none(tree: Tree, none: int) -> None:
    tree.in_v1("/job")
    tree.v1_group("job", none, f"total_rss 1\nhierarchical_memory_limit {none}\n")
    tree.v1_group("", none)
    assert host_limit(tree.root) == Limit(64 * GIB, "physical memory")


def test_a_limit_above_physical_memory_is_none(tree: Tree) -> None:
    tree.in_v2("/job")
    tree.v2_group("job", 65 * GIB)
    assert host_limit(tree.root) == Limit(64 * GIB, "physical memory")


def test_a_container_that_sees_its_own_group_as_the_root_is_limited_by_it(tree: Tree) -> None:
    tree.in_v2("/")
    tree.v2_group("", 2 * GIB, "anon 17\n")
    assert host_limit(tree.root) == Limit(2 * GIB, "cgroup /, memory.max")
    assert host_in_use(tree.root) == 17


def test_mounts_are_found_wherever_they_are_and_with_blanks_in_their_names(tree: Tree) -> None:
    write(tree.root / "proc/self/cgroup", "0::/job\n")
    write(tree.root / "proc/self/mountinfo", "41 31 0:38 / /mnt/my\\040groups rw - cgroup2 none rw\n")
    write(tree.root / "mnt/my groups/job/memory.max", str(GIB))
    assert host_limit(tree.root).num_bytes == GIB


def test_the_mount_that_shows_most_ancestors_is_taken(tree: Tree) -> None:
    tree.in_v2("/a/b")
    inner = "50 31 0:38 /a/b /inner rw - cgroup2 cgroup2 rw\n"
    write(tree.root / "proc/self/mountinfo", inner + V2_MOUNT.format(top="/"))
    tree.v2_group("a", GIB)
    (tree.root / "sys/fs/cgroup/a/b").mkdir()
    assert host_limit(tree.root) == Limit(GIB, "cgroup /a, memory.max")


def test_v2_without_memory_beside_v1_with_it_is_passed_over(tree: Tree) -> None:
    tree.in_v1("/job")
    write(
        tree.root / "proc/self/mountinfo",
        V1_MOUNT.format(top="/") + "42 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
    )
    tree.v1_group("job", GIB)
    tree.v1_group("", V1_NONE)
    assert host_limit(tree.root) == Limit(GIB, "cgroup /job, memory.limit_in_bytes")


Spoil = Callable[[Tree], object]


def _outside(tree: Tree) -> None:
    tree.in_v2("/../elsewhere")
    tree.v2_group("", GIB)


SPOILT: dict[str, tuple[Spoil, int, str]] = {
    "a word for a limit": (lambda tree: tree.v2_group("job", "plenty"), 64 * GIB, r"memory.max holds 'plenty'"),
    "an empty limit": (lambda tree: tree.v2_group("job", ""), 64 * GIB, r"memory.max holds ''"),
    "a negative limit": (lambda tree: tree.v2_group("job", -5), 64 * GIB, r"memory.max holds '-5'"),
    "a folder for a limit": (
        lambda tree: (tree.root / "sys/fs/cgroup/job/memory.max").mkdir(parents=True),
        64 * GIB,
        r"memory.max: Is a directory",
    ),
    "no folder of the group": (lambda tree: tree.v2_group("", "max"), 64 * GIB, r"cgroup/job is not there"),
    "no mount": (
        lambda tree: write(tree.root / "proc/self/mountinfo", OTHER_MOUNTS),
        64 * GIB,
        "no mount shows the memory cgroup /job",
    ),
    "no list of mounts": (
        lambda tree: (tree.root / "proc/self/mountinfo").unlink(),
        64 * GIB,
        "mountinfo: No such file or directory",
    ),
    "a broken list of groups": (
        lambda tree: write(tree.root / "proc/self/cgroup", "memory\n"),
        64 * GIB,
        "holds the line 'memory'",
    ),
    "a group outside of the mount": (_outside, GIB, "cgroup /../elsewhere lies outside of what is mounted"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_cannot_be_read_is_passed_over_and_named_once(case: str, tree: Tree, said: list[str]) -> None:
    spoil, expected, problem = SPOILT[case]
    tree.in_v2("/job")
    spoil(tree)
    found = host_limit(tree.root)
    assert found.num_bytes == expected
    assert problem in found.source
    assert host_limit(tree.root) == found
    about_it = [text for text in said if problem in text]
    assert len(about_it) == 1
    assert about_it[0].startswith("limits of memory: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_limit_that_may_not_be_read_is_named(tree: Tree) -> None:
    tree.in_v2("/job")
    tree.v2_group("job", GIB)
    (tree.root / "sys/fs/cgroup/job/memory.max").chmod(0)
    assert "memory.max: Permission denied" in host_limit(tree.root).source


@pytest.mark.parametrize("stat", [None, "", "anon many\n", "file 3\n", "anon 3\nshmem lots\n"])
def test_without_a_group_s_figures_the_machine_s_are_taken(stat: str | None, tree: Tree, said: list[str]) -> None:
    tree.in_v2("/job")
    tree.v2_group("job", 8 * GIB, stat or "")
    if stat is None:
        (tree.root / "sys/fs/cgroup/job/memory.stat").unlink()
    assert host_limit(tree.root).num_bytes == 8 * GIB
    assert host_in_use(tree.root) == 14 * GIB
    assert len([text for text in said if "memory.stat" in text]) == 1
    assert host_left(tree.root).num_bytes == 50 * GIB, "the group's own is not known"
    assert "memory.stat" in host_left(tree.root).source
