"""How much memory and disk there is: the machine's, or the least that a cgroup or a resource limit leaves of it.

Nothing here guesses. What cannot be read is passed over, said once on the console, and named in the `source` of the
limit that was found without it.

Source: the kernel's Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst and filesystems/proc.rst.
"""

import os
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from pcscale.common.console import console
from pcscale.memory.cgroups import UNLIMITED_BYTES, MemoryGroup, memory_groups, read_text

_ROOT = Path("/")
_GPU_FILES = ("proc/driver/nvidia/version", "dev/nvidiactl", "dev/kfd")


@dataclass(frozen=True)
class Limit:
    """What there is of something.

    Attributes:
        num_bytes: None: there is no such limit, or it cannot be known. Units: bytes.
        source: who sets it, and what could not be read.
    """

    num_bytes: int | None
    source: str


@dataclass(frozen=True)
class _Bound:
    """One limit on host memory, and how to see what counts against it now (None: it cannot be read)."""

    num_bytes: int
    source: str
    in_use: Callable[[], int | None]


def host_limit(root: Path = _ROOT) -> Limit:
    """The smallest of physical memory, every cgroup limit on this process, and its own resource limits.

    Args:
        root: where /proc and /sys are.
    """
    bound, problems = _smallest(root)
    return Limit(bound and bound.num_bytes, _sourced(bound.source if bound else "unknown", problems))


def host_in_use(root: Path = _ROOT) -> int:
    """What counts now against the limit that `host_limit` names, page cache aside, whichever processes hold it.

    Where that cannot be read: what the machine has in use; without that either, the most that this process has held.
    """
    bound, problems = _smallest(root)
    used = None if bound is None else bound.in_use()
    used = _machine_in_use(root, problems) if used is None else used
    _warn(problems)
    return _own_peak() if used is None else used


def host_left(root: Path = _ROOT) -> Limit:
    """The least that any limit on host memory leaves now: not always the smallest one, which others may not share."""
    problems: list[str] = []
    left = [
        Limit(max(0, bound.num_bytes - used), bound.source)
        for bound in _bounds(root, problems)
        if (used := bound.in_use()) is not None
    ]
    least = min(left, key=lambda limit: limit.num_bytes or 0, default=Limit(None, "unknown"))
    return Limit(least.num_bytes, _sourced(least.source, problems))


def disk_free(path: Path) -> Limit:
    """What an ordinary user may still write under a path, there already or not. A user's quota is not known."""
    folder = path.absolute()
    while True:
        try:
            return Limit(shutil.disk_usage(folder).free, f"disk of {folder}")
        except (FileNotFoundError, NotADirectoryError):
            folder = folder.parent
        except OSError as error:
            return Limit(None, _sourced("unknown", [f"{folder}: {error.strerror}"]))


def device_limit(root: Path = _ROOT) -> Limit:
    """The memory of this process's GPU. torch is imported only where it is already, or where there is a GPU."""
    if "torch" not in sys.modules and not any((root / name).exists() for name in _GPU_FILES):
        return Limit(None, "no GPU")
    import torch

    if not torch.cuda.is_available():
        return Limit(None, "no GPU")
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Limit(device.total_memory, device.name)


def device_in_use() -> int:
    """What all processes hold of this process's GPU; 0 where there is none."""
    if device_limit().num_bytes is None:
        return 0
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


def _smallest(root: Path) -> tuple[_Bound | None, list[str]]:
    problems: list[str] = []
    bounds = list(_bounds(root, problems))
    return min(bounds, key=lambda bound: bound.num_bytes, default=None), problems


def _bounds(root: Path, problems: list[str]) -> Iterator[_Bound]:
    physical = _physical(root, problems)
    if physical is not None:
        yield _Bound(physical, "physical memory", partial(_machine_in_use, root, problems))
    for group in memory_groups(root, problems):
        for name, num_bytes in group.limits(problems):
            yield _Bound(num_bytes, f"{group.label}, {name}", partial(MemoryGroup.in_use, group, problems))
    for kind, name, counter in (
        (resource.RLIMIT_DATA, "RLIMIT_DATA", "VmData"),
        (resource.RLIMIT_AS, "RLIMIT_AS, which mapped files count against as well", "VmSize"),
    ):
        soft = resource.getrlimit(kind)[0]
        if 0 <= soft < UNLIMITED_BYTES:
            yield _Bound(soft, name, partial(_kib, root / "proc/self/status", counter, problems))


def _physical(root: Path, problems: list[str]) -> int | None:
    """From /proc/meminfo; where there is none, what the system calls tell."""
    linux = sys.platform == "linux" or root != _ROOT
    total = _kib(root / "proc/meminfo", "MemTotal", problems) if linux else None
    if total:
        return total
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        problems.append("the system does not tell its physical memory")
        return None


def _machine_in_use(root: Path, problems: list[str]) -> int | None:
    if sys.platform != "linux" and root == _ROOT:
        import psutil

        memory = psutil.virtual_memory()
        return memory.total - memory.available
    total, available = (_kib(root / "proc/meminfo", name, problems) for name in ("MemTotal", "MemAvailable"))
    return None if total is None or available is None else total - available


def _own_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _kib(path: Path, name: str, problems: list[str]) -> int | None:
    """A line such as `MemTotal:  24684096 kB`. Units: bytes."""
    text = read_text(path, problems)
    if text is None:
        return None
    match = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    if match is None:
        problems.append(f"{path} states no {name}")
        return None
    return int(match[1]) * 1024


def _sourced(source: str, problems: list[str]) -> str:
    """The source, with what it was found without."""
    _warn(problems)
    return f"{source} (not read: {'; '.join(dict.fromkeys(problems))})" if problems else source


def _warn(problems: list[str]) -> None:
    for problem in problems:
        _warn_once(problem)


@cache
def _warn_once(problem: str) -> None:
    console.warn(f"limits of memory: {problem}. What it would have told is not known.")
