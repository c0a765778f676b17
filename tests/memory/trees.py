"""Machines as /proc/self/cgroup, /sys/fs/cgroup and psutil show them, and the warnings that are given about them."""

import resource
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pcscale.common.console import console
from pcscale.memory import limits

GIB = 2**30
V1_NONE = 9223372036854771712


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class Tree:
    """A root folder with the files of a machine without a cgroup."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def in_v1(self, path: str) -> None:
        write(self.root / "proc/self/cgroup", f"9:name=systemd:/\n4:memory:{path}\n3:cpu,cpuacct:/\n0::/\n")

    def in_v2(self, path: str) -> None:
        write(self.root / "proc/self/cgroup", f"0::{path}\n")

    def v1_group(self, path: str, limit: object, stat: str = "total_rss 0\n") -> None:
        folder = self.root / "sys/fs/cgroup/memory" / path
        write(folder / "memory.limit_in_bytes", f"{limit}\n")
        write(folder / "memory.stat", stat)

    def v2_group(self, path: str, limit: object, stat: str = "anon 0\n") -> None:
        folder = self.root / "sys/fs/cgroup" / path
        write(folder / "memory.max", f"{limit}\n")
        write(folder / "memory.stat", stat)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of a test."""
    texts: list[str] = []
    monkeypatch.setattr(console, "warn", texts.append)
    return texts


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """A machine of 64 GiB, 14 of them in use, whose process has 7000 bytes of data and 9000 of addresses."""
    no_limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: no_limit)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=50 * GIB))
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(data=7000, vms=9000))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    limits._warn_once.cache_clear()
    return Tree(tmp_path)
