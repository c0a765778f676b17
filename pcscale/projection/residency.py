"""Where records live between the sweep's visits, and how they get to the device and back.

A record is one block of bytes (projection/layout.py). A home keeps them: on the device, in host memory, or as files.
While one matrix is worked on, a thread fetches the next one and another puts the one before back; on a GPU each has a
stream of its own, so that copies run beside the products.

Each home gives a visit a buffer to work in and takes it back: no visit sees bytes that another thread may write.
"""

import contextlib
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import numpy as np
import torch

from pcscale.common.errors import BudgetError, RunError
from pcscale.common.files import TEMPORARY_PREFIX, link_or_copy, said_plainly, sync_to_disk, temporary_beside
from pcscale.common.units import aligned, format_bytes
from pcscale.projection.layout import TensorSpec, overlap_bytes
from pcscale.projection.record import views_of
from pcscale.storage.hashing import fingerprint_file
from pcscale.storage.host_memory import Arena, HostBytes, bytes_of
from pcscale.storage.index import read_header
from pcscale.storage.reader import TORCH_DTYPES, TensorReader
from pcscale.storage.writer import TensorShape, header_bytes, write_tensors


@dataclass(frozen=True)
class Residency:
    """Where records and moments live.

    Attributes:
        home: `device`, `cpu` or `disk`.
        folder: of the files; with `disk` alone.
        pinned_bytes: cap on the pinned host memory that this takes; None: what lets motion overlap with compute.
    """

    home: Literal["device", "cpu", "disk"] = "device"
    folder: Path | None = None
    pinned_bytes: int | None = None


ON_DEVICE = Residency()


@dataclass
class Traffic:
    """Bytes moved between homes and the device since the beginning. Units: bytes."""

    base_read: int = 0
    records_read: int = 0
    records_written: int = 0

    @property
    def total(self) -> int:
        return self.base_read + self.records_read + self.records_written


class Home(Protocol):
    """What the three homes have in common. `fetch` and `put` run on a thread each, one call at a time."""

    def create(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Make a record: these tensors, zeros everywhere else."""
        ...

    def fetch(self, name: str) -> torch.Tensor:
        """A buffer on the device with the record's bytes."""
        ...

    def put(self, name: str, buffer: torch.Tensor, changed: bool) -> None:
        """Take the buffer back, and its bytes as the record's where they changed."""
        ...

    def save(self, name: str, path: Path) -> str:
        """Write the record as a safetensors file; returns the file's fingerprint."""
        ...

    def load(self, name: str, path: Path) -> None:
        """Take the record from such a file, whose tensors were found to be those of the layout."""
        ...


Layouts = dict[str, dict[str, TensorSpec]]


def open_home(residency: Residency, layouts: Layouts, device: torch.device, traffic: Traffic) -> Home:
    """The home of the records with these layouts; each is made with `create`.

    Raises:
        BudgetError: `pinned_bytes` is less than what this residency needs.
        RunError: the folder's disk has no room for the records.
        RequestError: the folder cannot be written.
    """
    sizes = [_size(layout) for layout in layouts.values()]
    check_budget(residency, sizes)
    if residency.home == "device":
        return DeviceHome(layouts, device)
    overlap = overlap_bytes(sizes)
    if residency.home == "cpu":
        return HostHome(layouts, device, overlap, traffic)
    assert residency.folder is not None, "residency disk is given a folder"
    staging = overlap if residency.pinned_bytes is None else min(overlap, residency.pinned_bytes)
    return DiskHome(layouts, device, residency.folder, overlap, staging, traffic)


def check_budget(residency: Residency, sizes: list[int]) -> None:
    """Refuse a budget that records of these sizes cannot keep.

    Raises:
        BudgetError: with the least that would do.
    """
    if residency.home == "device" or residency.pinned_bytes is None:
        return
    least = sum(map(aligned, sizes)) if residency.home == "cpu" else max(sizes, default=0)
    if residency.pinned_bytes < least:
        what = "all records take" if residency.home == "cpu" else "the largest record takes"
        raise BudgetError(
            f"pinned_memory {format_bytes(residency.pinned_bytes)} is too small for residency {residency.home}: "
            f"{what} {format_bytes(least)}. Give at least {least} bytes."
        )


def check_disk(folder: Path, sizes: list[int]) -> None:
    """Refuse a folder, there already or not, whose disk has no room for records of these sizes.

    Raises:
        RunError: with what is missing.
    """
    while not folder.exists():
        folder = folder.parent
    # Beside the records there is a spare file of each size.
    needed, free = sum(sizes) + sum(set(sizes)), shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{folder}: the disk has {format_bytes(free)} free, residency disk takes {format_bytes(needed)}. "
            f"Free at least {needed - free} bytes more, or choose another output."
        )


class DeviceHome:
    """Records stay on the device; nothing moves."""

    def __init__(self, layouts: Layouts, device: torch.device) -> None:
        self._layouts = layouts
        self._buffers = {
            name: torch.zeros(_size(layout), dtype=torch.uint8, device=device) for name, layout in layouts.items()
        }

    def create(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        _fill(self._buffers[name], self._layouts[name], tensors)

    def fetch(self, name: str) -> torch.Tensor:
        return self._buffers[name]

    def put(self, name: str, buffer: torch.Tensor, changed: bool) -> None:
        pass

    def save(self, name: str, path: Path) -> str:
        return write_tensors(path, views_of(self._buffers[name], self._layouts[name]))

    def load(self, name: str, path: Path) -> None:
        _fill_from_file(self._buffers[name], self._layouts[name], path)


class HostHome:
    """Records live in host memory, pinned where there is a GPU; the device holds those that are worked on."""

    def __init__(self, layouts: Layouts, device: torch.device, device_bytes: int, traffic: Traffic) -> None:
        self._layouts = layouts
        self._memory = HostBytes(sum(aligned(_size(layout)) for layout in layouts.values()))
        self._memory.bytes.zero_()
        places = Arena(self._memory.bytes)
        self._buffers = {name: places.take(_size(layout)) for name, layout in layouts.items()}
        self._working = Arena(torch.empty(device_bytes, dtype=torch.uint8, device=device))
        self._traffic = traffic

    def create(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        _fill(self._buffers[name], self._layouts[name], tensors)

    def fetch(self, name: str) -> torch.Tensor:
        source = self._buffers[name]
        buffer = self._working.take(len(source))
        _copy(source, buffer)
        self._traffic.records_read += len(source)
        return buffer

    def put(self, name: str, buffer: torch.Tensor, changed: bool) -> None:
        with _given_back(self._working, buffer):
            if changed:
                _copy(buffer, self._buffers[name])
                self._traffic.records_written += len(buffer)

    def save(self, name: str, path: Path) -> str:
        return write_tensors(path, views_of(self._buffers[name], self._layouts[name]))

    def load(self, name: str, path: Path) -> None:
        _fill_from_file(self._buffers[name], self._layouts[name], path)


class DiskHome:
    """Records live in files; memory holds those that are on their way, the device those that are worked on.

    A record is written into another file than the one it was read from, and a file that a checkpoint shares is never
    written again, so that a checkpoint can hold a file by a link to it. A step's files are not synced: after a crash a
    run goes on from its last checkpoint, whose files are.

    Args:
        device_bytes, staging_bytes: what the device, and pinned memory beside a GPU, hold of records at a time.
    """

    def __init__(
        self,
        layouts: Layouts,
        device: torch.device,
        folder: Path,
        device_bytes: int,
        staging_bytes: int,
        traffic: Traffic,
    ) -> None:
        self._layouts = layouts
        self._headers = {name: header_bytes(_torch_shapes(layout)) for name, layout in layouts.items()}
        self._folder = folder
        self._traffic = traffic
        self._spares: dict[int, Path] = {}
        """Files of former records by their length: at most one of each, since only one record is written at a time."""
        with said_plainly(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
                leftover.unlink()
        check_disk(folder, [_size(layout) for layout in layouts.values()])
        self._staging = self._memory = None
        if device.type != "cpu":
            # Between a file and the device.
            self._memory = HostBytes(staging_bytes)
            self._staging = Arena(self._memory.bytes)
        self._working = Arena(
            torch.empty(staging_bytes if device.type == "cpu" else device_bytes, dtype=torch.uint8, device=device)
        )

    def create(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        header = self._headers[name]
        with self._new_file(name) as file:
            file.truncate(0)
            file.write(header)
            file.truncate(self._file_bytes(name))  # What is never written reads as zeros.
            start = len(header)
            for part, spec in self._layouts[name].items():
                if part in tensors:
                    file.seek(start)
                    file.write(bytes_of(tensors[part].to(TORCH_DTYPES[spec.dtype]).contiguous()))
                start += spec.num_bytes

    def fetch(self, name: str) -> torch.Tensor:
        buffer = self._working.take(_size(self._layouts[name]))
        try:
            # The device's buffer comes first: whoever holds a staging buffer needs nothing more to finish.
            if self._staging is None:
                self._read(name, buffer)
            else:
                with self._staged(len(buffer)) as staging:
                    self._read(name, staging)
                    _copy(staging, buffer)
        except BaseException:
            self._working.give(buffer)
            raise
        return buffer

    def put(self, name: str, buffer: torch.Tensor, changed: bool) -> None:
        with _given_back(self._working, buffer):
            if not changed:
                return
            if self._staging is None:
                self._write(name, buffer)
            else:
                with self._staged(len(buffer)) as staging:
                    _copy(buffer, staging)
                    self._write(name, staging)

    def save(self, name: str, path: Path) -> str:
        source = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        sync_to_disk(source)
        link_or_copy(source, path)
        return fingerprint_file(path)

    def load(self, name: str, path: Path) -> None:
        header = self._headers[name]
        with path.open("rb") as file:
            alike = file.read(len(header)) == header
        if alike:
            link_or_copy(path, self._path(name))
        else:
            reader = TensorReader(read_header(path)[0])
            self.create(name, {part: reader.tensor(part) for part in self._layouts[name]})

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    @contextmanager
    def _staged(self, num_bytes: int) -> Iterator[torch.Tensor]:
        assert self._staging is not None
        staging = self._staging.take(num_bytes)
        with _given_back(self._staging, staging):
            yield staging

    @contextmanager
    def _new_file(self, name: str) -> Iterator[BinaryIO]:
        """A file, in the place of a spare one of the same length where there is one, that becomes the record."""
        path = self._path(name)
        temporary, spare = temporary_beside(path), self._spares.pop(self._file_bytes(name), None)
        with said_plainly(path):
            try:
                if spare is not None:
                    spare.rename(temporary)
                with temporary.open("wb" if spare is None else "r+b") as file:
                    yield file
                self._replace(name, temporary)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def _replace(self, name: str, temporary: Path) -> None:
        """Make a written file the record. The old one is a spare from now on, unless a checkpoint shares it.

        Written over, it costs no new pages of memory and no new blocks of the disk.
        """
        path, num_bytes = self._path(name), self._file_bytes(name)
        if path.exists() and path.stat().st_nlink == 1:
            spare = path.with_name(f"{TEMPORARY_PREFIX}spare-{num_bytes}")
            with contextlib.suppress(OSError):  # A file system without links has no spares.
                spare.hardlink_to(path)
                self._spares[num_bytes] = spare
        temporary.replace(path)

    def _file_bytes(self, name: str) -> int:
        return len(self._headers[name]) + _size(self._layouts[name])

    def _write(self, name: str, buffer: torch.Tensor) -> None:
        with self._new_file(name) as file:
            file.write(self._headers[name])
            file.write(bytes_of(buffer))
        self._traffic.records_written += len(buffer)

    def _read(self, name: str, buffer: torch.Tensor) -> None:
        path = self._path(name)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(len(self._headers[name]))
                rest = bytes_of(buffer)
                while rest and (count := file.readinto(rest)):
                    rest = rest[count:]
        except OSError as error:
            raise RunError(f"{path} cannot be read ({error}). {_RESUME}") from error
        if rest:
            raise RunError(f"{path} is {len(rest)} bytes too short. {_RESUME}")
        self._traffic.records_read += len(buffer)


_RESUME = "Check the disk; the last checkpoint is whole: go on from it with --resume."


class _Copier(threading.local):
    """A thread's own stream, so that its copies run beside the products."""

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if source.device.type == target.device.type == "cpu":
            # Not torch's copy: its own threads would fight with those of the products.
            np.copyto(target.numpy(), source.numpy())
            return
        self.stream = self.stream or torch.cuda.Stream()
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        self.stream.synchronize()


_copy = _Copier().copy


@contextmanager
def _given_back(arena: Arena, buffer: torch.Tensor) -> Iterator[None]:
    """Give the buffer back after the block, also when it fails: somebody may be waiting for it."""
    try:
        yield
    finally:
        arena.give(buffer)


def _size(layout: dict[str, TensorSpec]) -> int:
    return sum(spec.num_bytes for spec in layout.values())


def _torch_shapes(layout: dict[str, TensorSpec]) -> dict[str, TensorShape]:
    return {name: (TORCH_DTYPES[spec.dtype], spec.shape) for name, spec in layout.items()}


def _fill(buffer: torch.Tensor, layout: dict[str, TensorSpec], tensors: dict[str, torch.Tensor]) -> None:
    """Zeros, and these tensors."""
    buffer.zero_()
    for name, view in views_of(buffer, layout).items():
        if name in tensors:
            view.copy_(tensors[name])


def _fill_from_file(buffer: torch.Tensor, layout: dict[str, TensorSpec], path: Path) -> None:
    reader = TensorReader(read_header(path)[0])
    for name, view in views_of(buffer, layout).items():
        view.copy_(reader.tensor(name))
