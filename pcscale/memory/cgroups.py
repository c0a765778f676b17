"""The memory cgroups that this process is in, v1 or v2: their limits, and what they hold.

A group is found where the kernel says that it is: the process's path in /proc/self/cgroup below the mount that
/proc/self/mountinfo names. Its ancestors' limits hold as well.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

UNLIMITED_BYTES = 2**60
"""A limit from here on is none: v1 says so with the largest multiple of a page."""
_OCTAL = re.compile(r"\\(\d{3})")
_PARENT = ".."


@dataclass(frozen=True)
class _Version:
    """How one version of cgroups calls things.

    Attributes:
        limits: files that hold a limit; `memory.high` is one that a process is slowed down at instead of stopped.
        held: entries of memory.stat that count and that the kernel cannot reclaim; the first one is always there.
    """

    limits: tuple[str, ...]
    held: tuple[str, ...]


_V1 = _Version(("memory.limit_in_bytes",), ("total_rss", "total_shmem"))
_V2 = _Version(
    ("memory.max", "memory.high"),
    ("anon", "shmem", "kernel_stack", "pagetables", "slab_unreclaimable", "percpu", "sock"),
)
_OUT_OF_SIGHT = "hierarchical_memory_limit"
"""In memory.stat of v1: the least of all limits above, also of groups that a container does not see."""


@dataclass(frozen=True)
class MemoryGroup:
    """One group, the process's own or an ancestor of it.

    Attributes:
        topmost: of those that can be seen.
    """

    folder: Path
    label: str
    version: _Version
    topmost: bool

    def limits(self, problems: list[str]) -> Iterator[tuple[str, int]]:
        """What it sets, by the file that says so. Units: bytes."""
        for name in self.version.limits:
            # The topmost group has no such file, nor has one whose memory nobody controls.
            text = read_text(self.folder / name, problems, needed=False)
            if text is None or text.strip() == "max":
                continue
            if not text.strip().isdecimal():
                problems.append(f"{self.folder / name} holds {text.strip()[:40]!r}")
            elif int(text) < UNLIMITED_BYTES:
                yield name, int(text)
        if self.topmost and self.version is _V1:
            limit = (self._stat(problems) or {}).get(_OUT_OF_SIGHT, UNLIMITED_BYTES)
            if limit < UNLIMITED_BYTES:
                yield _OUT_OF_SIGHT, limit

    def in_use(self, problems: list[str]) -> int | None:
        """Bytes that count against its limit now, page cache aside; None: they cannot be read."""
        stat = self._stat(problems)
        if stat is None:
            return None
        if self.version.held[0] not in stat:
            problems.append(f"{self.folder / 'memory.stat'} states no {self.version.held[0]}")
            return None
        return sum(stat.get(name, 0) for name in self.version.held)

    def _stat(self, problems: list[str]) -> dict[str, int] | None:
        text = read_text(self.folder / "memory.stat", problems)
        if text is None:
            return None
        pairs = [line.split() for line in text.splitlines()]
        if not all(len(pair) == 2 and pair[1].isdecimal() for pair in pairs):
            problems.append(f"{self.folder / 'memory.stat'} holds something else than names with numbers")
            return None
        return {name: int(number) for name, number in pairs}


def memory_groups(root: Path, problems: list[str]) -> list[MemoryGroup]:
    """The process's memory group and the ancestors that can be seen, itself first; none where there are no cgroups.

    Args:
        root: where /proc and /sys are.
        problems: gets what cannot be read.
    """
    found = _own_path(read_text(root / "proc/self/cgroup", problems, needed=False), problems)
    if found is None:
        return []
    path, version = found
    mount = _mount_of(root, version, path, problems)
    if mount is None:
        problems.append(f"no mount shows the memory cgroup {path}")
        return []
    place, below = mount
    groups = []
    for part in (below, *below.parents):
        folder = root / str(place).lstrip("/") / part
        if folder.is_dir():
            topmost = part == PurePosixPath()
            groups.append(MemoryGroup(folder, f"cgroup {PurePosixPath('/') / part}", version, topmost))
        else:
            problems.append(f"{folder} is not there")
    return groups


def _own_path(text: str | None, problems: list[str]) -> tuple[PurePosixPath, _Version] | None:
    """The process's path among the groups that control memory. v1 is asked first: it has memory, or v2 has."""
    if text is None:
        return None
    paths: dict[_Version, PurePosixPath] = {}
    for line in text.splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            problems.append(f"/proc/self/cgroup holds the line {line[:40]!r}")
            continue
        number, controllers, path = parts
        if "memory" in controllers.split(","):
            paths[_V1] = PurePosixPath(path)
        elif number == "0" and not controllers:
            paths[_V2] = PurePosixPath(path)
    return next(((paths[version], version) for version in (_V1, _V2) if version in paths), None)


def _mount_of(
    root: Path, version: _Version, path: PurePosixPath, problems: list[str]
) -> tuple[PurePosixPath, PurePosixPath] | None:
    """Where the hierarchy is mounted, and the group's path below that; the mount that shows most of its ancestors.

    A mount that does not show the group at all still shows an ancestor of it, or its very group under another name.
    """
    shown: list[tuple[int, PurePosixPath, PurePosixPath]] = []
    mounts = list(_mounts(read_text(root / "proc/self/mountinfo", problems), version))
    for top, place in mounts:
        if path.is_relative_to(top) and _PARENT not in path.parts:
            shown.append((len(top.parts), place, path.relative_to(top)))
    if shown:
        _, place, below = min(shown)
        return place, below
    if mounts:
        problems.append(f"cgroup {path} lies outside of what is mounted")
        return mounts[0][1], PurePosixPath()
    return None


def _mounts(text: str | None, version: _Version) -> Iterator[tuple[PurePosixPath, PurePosixPath]]:
    """Of every mount of the hierarchy: the group at its top, and where it is."""
    for line in (text or "").splitlines():
        fields, _, rest = line.partition(" - ")
        columns, (kind, *options) = fields.split(), rest.split() or [""]
        if len(columns) < 5:
            continue
        controls = version is _V2 if kind == "cgroup2" else kind == "cgroup" and "memory" in options[-1].split(",")
        if controls and (kind == "cgroup2") == (version is _V2):
            yield PurePosixPath(_plain(columns[3])), PurePosixPath(_plain(columns[4]))


def _plain(text: str) -> str:
    """A path as it is: the kernel writes blanks in octal."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)


def read_text(path: Path, problems: list[str], needed: bool = True) -> str | None:
    """A small file of the kernel's; None: it cannot be read, which is a problem unless it is absent and not needed."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        if needed or not isinstance(error, FileNotFoundError):
            problems.append(f"{path}: {error.strerror}")
        return None
