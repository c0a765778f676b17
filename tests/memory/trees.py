"""Folders that look like the /proc and /sys of a machine, and the warnings that are given about them."""

import resource
from pathlib import Path

import pytest

from pcscale.common.console import console
from pcscale.memory import limits

GIB = 2**30
PHYSICAL_KIB, AVAILABLE_KIB = 64 * 2**20, 50 * 2**20
V1_NONE = 9223372036854771712
V1_MOUNT = "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V2_MOUNT = "41 31 0:38 {top} /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
OTHER_MOUNTS = (
    "22 27 0:21 / /proc rw,relatime - proc proc rw\n33 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class Tree:
    """A root folder with the files of a machine of 64 GiB, 14 of them in use, and no cgroup."""

    def __init__(self, root: Path) -> None:
        self.root = root
        write(root / "proc/meminfo", f"MemTotal:  {PHYSICAL_KIB} kB\nMemAvailable:   {AVAILABLE_KIB} kB\n")
        write(root / "proc/self/status", "Name:\tpython\nVmSize:\t 9000 kB\nVmData:\t  7000 kB\n")
        write(root / "proc/self/mountinfo", OTHER_MOUNTS)

    def in_v1(self, path: str, top: str = "/") -> None:
        write(self.root / "proc/self/cgroup", f"9:name=systemd:/\n4:memory:{path}\n3:cpu,cpuacct:/\n0::/\n")
        write(self.root / "proc/self/mountinfo", OTHER_MOUNTS + V1_MOUNT.format(top=top))

    def in_v2(self, path: str, top: str = "/") -> None:
        write(self.root / "proc/self/cgroup", f"0::{path}\n")
        write(self.root / "proc/self/mountinfo", OTHER_MOUNTS + V2_MOUNT.format(top=top))

    def v1_group(self, path: str, limit: object, stat: str = "total_rss 0\n") -> None:
        folder = self.root / "sys/fs/cgroup/memory" / path
        write(folder / "memory.limit_in_bytes", f"{limit}\n")
        write(folder / "memory.stat", stat)

    def v2_group(self, path: str, limit: object, stat: str = "anon 0\n") -> None:
        folder = self.root / "sys/fs/cgroup" / path
        write(folder / "memory.max", f"{limit}\n")
        write(folder / "memory.stat", stat)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of a test."""
    texts: list[str] = []
    monkeypatch.setattr(console, "warn", texts.append)
    return texts


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    no_limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: no_limit)
    limits._warn_once.cache_clear()
    return Tree(tmp_path)
