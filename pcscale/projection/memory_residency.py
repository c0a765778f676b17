"""Residencies of records on the device and in host memory."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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


class DeviceResidency:
    """Records stay on the device; nothing moves.

    Every residency has these public methods. It gives a visit a buffer to work in and takes it back, so that no visit
    sees bytes that another thread may write; `read` and `write` run on a thread each, one call at a time.
    """

    def __init__(self, layouts: Layouts, device: torch.device) -> None:
        sizes = {name: record_size(layout) for name, layout in layouts.items()}
        buffers = {name: torch.zeros(size, dtype=torch.uint8, device=device) for name, size in sizes.items()}
        self._hold(layouts, buffers, placement_of(device))

    def _hold(self, layouts: Layouts, buffers: dict[str, torch.Tensor], placement: str) -> None:
        """Keep records in these buffers, and enter them into the ledger."""
        self._buffers = buffers
        self._views = {name: views_of(buffers[name], layout) for name, layout in layouts.items()}
        for component, of_moments in ((RECORDS, False), (MOMENTS, True)):
            parts = (part for views in self._views.values() for part in views.items())
            num_bytes = sum(tensor.nbytes for name, tensor in parts if ("." in name) == of_moments)
            ledger.keep(self, component, placement, num_bytes)

    def create(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Make a record: these tensors, zeros everywhere else."""
        self._buffers[name].zero_()
        for part, view in self._views[name].items():
            if part in tensors:
                view.copy_(tensors[part])

    def read(self, name: str) -> torch.Tensor:
        """Give a buffer on the device with the record's bytes."""
        return self._buffers[name]

    def write(self, name: str, buffer: torch.Tensor, changed: bool) -> None:
        """Take the buffer back, and its bytes as the record's where they changed."""

    def save(self, name: str, path: Path) -> str:
        """Write the record as a safetensors file; returns the file's fingerprint."""
        return write_tensors(path, self._views[name])

    def load(self, name: str, path: Path) -> None:
        """Take the record from such a file, whose tensors were found to be those of the layout."""
        reader = TensorReader(read_header(path)[0])
        for part, view in self._views[name].items():
            view.copy_(reader.tensor(part))


class HostResidency(DeviceResidency):
    """Records live in host memory, pinned where there is a GPU; the device holds those that are worked on."""

    def __init__(self, layouts: Layouts, device: torch.device, device_bytes: int, traffic: Traffic) -> None:
        sizes = {name: record_size(layout) for name, layout in layouts.items()}
        self._memory = HostBytes(sum(map(aligned, sizes.values())))
        self._memory.bytes.zero_()
        places = Arena(self._memory.bytes)
        self._hold(layouts, {name: places.take(size) for name, size in sizes.items()}, self._memory.placement)
        self._working = Arena(torch.zeros(device_bytes, dtype=torch.uint8, device=device))
        self._traffic = traffic
        ledger.keep(self, RECORD_BUFFERS, placement_of(device), device_bytes)

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
