"""Limits on memory and disk: the machine's, or the least that a cgroup or a resource limit leaves of it.

Nothing here guesses. What cannot be read is passed over, warned of once, and named in the `source` of the limit that
was found without it.

Source: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil

from pcscale.common.console import console

_ROOT = Path("/")
_GPU_FILES = ("proc/driver/nvidia/version", "dev/nvidiactl", "dev/kfd")
_UNLIMITED_BYTES = 2**60
"""A limit from here on is none: in cgroups v1 that is the largest multiple of a page."""
_V1 = ("sys/fs/cgroup/memory", ("memory.limit_in_bytes",), ("total_rss", "total_shmem"))
_V2 = (
    "sys/fs/cgroup",
    ("memory.max", "memory.high"),
    ("anon", "shmem", "kernel_stack", "pagetables", "slab_unreclaimable", "percpu", "sock"),
)
"""Where cgroups of a version are, the files that hold a limit (a process is slowed down at memory.high), and the
entries of memory.stat that the kernel cannot reclaim; the first one is always there."""


@dataclass(frozen=True)
class Limit:
    """A limit on something, and who sets it.

    Attributes:
        num_bytes: None: there is no such limit, or it cannot be known. Units: bytes.
        source: who sets it, and what could not be read.
    """

    num_bytes: int | None
    source: str


class _Bound(NamedTuple):
    """One limit on host memory, and how to see what counts against it now (None: it cannot be read)."""

    num_bytes: int
    source: str
    in_use: Callable[[], int | None]


def host_limit(root: Path = _ROOT) -> Limit:
    """The smallest of physical memory, every cgroup limit on this process, and its own resource limits.

    Args:
        root: where /proc and /sys are.
    """
    problems: list[str] = []
    bound = _smallest(root, problems)
    return Limit(bound.num_bytes, _sourced(bound.source, problems))


def host_in_use(root: Path = _ROOT) -> int:
    """Memory that counts now against the limit that `host_limit` names, page cache aside, whichever processes hold it;
    where that cannot be read, all that the machine has in use."""
    used = _smallest(root, []).in_use()
    return _machine_in_use() if used is None else used


def host_left(root: Path = _ROOT) -> Limit:
    """The least that any limit on host memory leaves now: not always the smallest one, which others may not share."""
    problems: list[str] = []
    bounds = _bounds(root, problems)
    left = [(max(0, bound.num_bytes - used), bound.source) for bound in bounds if (used := bound.in_use()) is not None]
    num_bytes, source = min(left)
    return Limit(num_bytes, _sourced(source, problems))


def disk_free(path: Path) -> Limit:
    """Disk that an ordinary user may still fill under a path, there already or not. A user's quota is not known."""
    folder = path.absolute()
    while True:
        try:
            return Limit(shutil.disk_usage(folder).free, f"disk of {folder}")
        except (FileNotFoundError, NotADirectoryError):
            folder = folder.parent
        except OSError as error:
            problem = f"{folder}: {error.strerror}"
            _warn_once(problem)
            return Limit(None, _sourced("unknown", [problem]))


def device_limit(root: Path = _ROOT) -> Limit:
    """The memory of this process's GPU. torch is imported only where it is already, or where there is a GPU."""
    if "torch" in sys.modules or any((root / name).exists() for name in _GPU_FILES):
        import torch

        if torch.cuda.is_available():
            device = torch.cuda.get_device_properties(torch.cuda.current_device())
            return Limit(device.total_memory, device.name)
    return Limit(None, "no GPU")


def device_in_use() -> int:
    """Memory of this process's GPU, which there must be, that all processes hold."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


def _smallest(root: Path, problems: list[str]) -> _Bound:
    return min(_bounds(root, problems), key=lambda bound: bound.num_bytes)


def _bounds(root: Path, problems: list[str]) -> Iterator[_Bound]:
    yield _Bound(psutil.virtual_memory().total, "physical memory", _machine_in_use)
    yield from _cgroup_bounds(root, problems)
    for kind, name, counter in (
        (resource.RLIMIT_DATA, "RLIMIT_DATA", "data"),
        (resource.RLIMIT_AS, "RLIMIT_AS, which mapped files count against as well", "vms"),
    ):
        soft = resource.getrlimit(kind)[0]
        if 0 <= soft < _UNLIMITED_BYTES:
            yield _Bound(soft, name, lambda counter=counter: getattr(psutil.Process().memory_info(), counter, None))


def _cgroup_bounds(root: Path, problems: list[str]) -> Iterator[_Bound]:
    """The limits of the process's memory cgroup and of its ancestors, as far as a container sees them."""
    lines = [line.split(":", 2) for line in (_read(root / "proc/self/cgroup", problems, False) or "").splitlines()]
    paths = {parts[1]: parts[2] for parts in lines if len(parts) == 3}
    v1 = next((controllers for controllers in paths if "memory" in controllers.split(",")), None)
    path = paths.get(v1 or "")
    if path is None:
        return
    mount, names, held = _V2 if v1 is None else _V1
    # A path that leads out of what a container sees: its root is the process's own group.
    below = PurePosixPath("" if ".." in path else path.lstrip("/"))
    for part in (below, *below.parents):
        folder = root / mount / part
        for name in names:
            # The topmost group has no such file, nor has one whose memory nobody controls.
            text = (_read(folder / name, problems, needed=False) or "max").strip()
            if text != "max" and not text.isdecimal():
                _note(f"{folder / name} holds {text[:40]!r}", problems)
            elif text != "max" and int(text) < _UNLIMITED_BYTES:
                label = f"cgroup {PurePosixPath('/') / part}, {name}"
                yield _Bound(int(text), label, partial(_held, folder, held, problems))


def _held(folder: Path, names: tuple[str, ...], problems: list[str]) -> int | None:
    """Bytes that count against a cgroup's limit now, page cache aside; None: they cannot be read."""
    text = _read(folder / "memory.stat", problems)
    pairs = [line.split() for line in (text or "").splitlines()]
    stat = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
    if text is not None and names[0] not in stat:
        _note(f"{folder / 'memory.stat'} states no {names[0]}", problems)
    return sum(stat.get(name, 0) for name in names) if names[0] in stat else None


def _machine_in_use() -> int:
    memory = psutil.virtual_memory()
    return memory.total - memory.available


def _read(path: Path, problems: list[str], needed: bool = True) -> str | None:
    """A small file of the kernel's; None: it cannot be read, which is a problem unless it is absent and not needed."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        if needed or not isinstance(error, FileNotFoundError | NotADirectoryError):
            _note(f"{path}: {error.strerror}", problems)
        return None


def _sourced(source: str, problems: list[str]) -> str:
    """The source, with what it was found without."""
    return f"{source} (not read: {'; '.join(dict.fromkeys(problems))})" if problems else source


def _note(problem: str, problems: list[str]) -> None:
    problems.append(problem)
    _warn_once(problem)


@cache
def _warn_once(problem: str) -> None:
    console.warn(f"limits of memory: {problem}. What it would have told is not known.")
