"""Residencies of records on the device and in host memory, and the protocol of every residency.

A record is one block of bytes (projection/layout.py). A residency gives a visit a buffer to work in and takes it back:
no visit sees bytes that another thread may write.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from pcscale.common.ledger import MOMENTS, RECORD_BUFFERS, RECORDS, ledger, placement_of
from pcscale.common.units import aligned
from pcscale.projection.layout import TensorSpec
from pcscale.projection.record import views_of
from pcscale.storage.host_memory import Arena, HostBytes
from pcscale.storage.index import read_header
from pcscale.storage.reader import TensorReader
from pcscale.storage.writer import write_tensors

Layouts = dict[str, dict[str, TensorSpec]]


@dataclass
class Traffic:
    """Bytes moved between residencies and the device since the beginning. Units: bytes."""

    base_read: int = 0
    records_read: int = 0
    records_written: int = 0

    @property
    def total(self) -> int:
        return self.base_read + self.records_read + self.records_written


class Residency(Protocol):
    """The place where records live. `read` and `write` run on a thread each, one call at a time."""

    def create(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Make a record: these tensors, zeros everywhere else."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Give a buffer on the device with the record's bytes."""
        ...

    def write(self, name: str, buffer: torch.Tensor, changed: bool) -> None:
        """Take the buffer back, and its bytes as the record's where they changed."""
        ...

    def save(self, name: str, path: Path) -> str:
        """Write the record as a safetensors file; returns the file's fingerprint."""
        ...

    def load(self, name: str, path: Path) -> None:
        """Take the record from such a file, whose tensors were found to be those of the layout."""
        ...


class DeviceResidency:
    """Records stay on the device; nothing moves."""

    def __init__(self, layouts: Layouts, device: torch.device) -> None:
        self._layouts = layouts
        enter_records(self, layouts, placement_of(device))
        self._buffers = {
            name: torch.zeros(record_size(layout), dtype=torch.uint8, device=device) for name, layout in layouts.items()
        }

    def create(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        _fill(self._buffers[name], self._layouts[name], tensors)

    def read(self, name: str) -> torch.Tensor:
        return self._buffers[name]

    def write(self, name: str, buffer: torch.Tensor, changed: bool) -> None:
        pass

    def save(self, name: str, path: Path) -> str:
        return write_tensors(path, views_of(self._buffers[name], self._layouts[name]))

    def load(self, name: str, path: Path) -> None:
        _fill_from_file(self._buffers[name], self._layouts[name], path)


class HostResidency:
    """Records live in host memory, pinned where there is a GPU; the device holds those that are worked on."""

    def __init__(self, layouts: Layouts, device: torch.device, device_bytes: int, traffic: Traffic) -> None:
        self._layouts = layouts
        self._memory = HostBytes(sum(aligned(record_size(layout)) for layout in layouts.values()))
        enter_records(self, layouts, self._memory.placement)
        self._memory.bytes.zero_()
        places = Arena(self._memory.bytes)
        self._buffers = {name: places.take(record_size(layout)) for name, layout in layouts.items()}
        self._working = Arena(torch.zeros(device_bytes, dtype=torch.uint8, device=device))
        self._traffic = traffic
        ledger.keep(self, RECORD_BUFFERS, placement_of(device), device_bytes)

    def create(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        _fill(self._buffers[name], self._layouts[name], tensors)

    def read(self, name: str) -> torch.Tensor:
        source = self._buffers[name]
        buffer = self._working.take(len(source))
        copy_bytes(source, buffer)
        self._traffic.records_read += len(source)
        return buffer

    def write(self, name: str, buffer: torch.Tensor, changed: bool) -> None:
        with given_back(self._working, buffer):
            if changed:
                copy_bytes(buffer, self._buffers[name])
                self._traffic.records_written += len(buffer)

    def save(self, name: str, path: Path) -> str:
        return write_tensors(path, views_of(self._buffers[name], self._layouts[name]))

    def load(self, name: str, path: Path) -> None:
        _fill_from_file(self._buffers[name], self._layouts[name], path)


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


copy_bytes = _Copier().copy


@contextmanager
def given_back(arena: Arena, buffer: torch.Tensor) -> Iterator[None]:
    """Give the buffer back after the block, also when it fails: somebody may be waiting for it."""
    try:
        yield
    finally:
        arena.give(buffer)


def record_size(layout: dict[str, TensorSpec]) -> int:
    return sum(spec.num_bytes for spec in layout.values())


def enter_records(owner: Residency, layouts: Layouts, placement: str) -> None:
    """Enter what a residency holds in memory into the ledger."""
    for component, of_moments in ((RECORDS, False), (MOMENTS, True)):
        specs = ((name, spec) for layout in layouts.values() for name, spec in layout.items())
        num_bytes = sum(spec.num_bytes for name, spec in specs if ("." in name) == of_moments)
        ledger.keep(owner, component, placement, num_bytes)


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
