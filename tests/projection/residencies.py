"""What tests of residency share: small layouts, homes over them, a disk that fills up, and waits that end."""

import errno
import io
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pcscale.common.files import TEMPORARY_PREFIX
from pcscale.projection.layout import TensorSpec
from pcscale.projection.memory_residency import Layouts, Traffic
from pcscale.projection.record import views_of
from pcscale.projection.residency import Residency, State, open_residency
from tests.projection.parts import CPU

HOMES = ("device", "cpu", "disk")
MOVING = ("cpu", "disk")
"""Homes whose records a visit works on a copy of."""
WAIT_SECONDS = 5
"""Far longer than anything here takes on a busy machine."""


class ImpatientCondition(threading.Condition):
    """A wait that would never end is an error."""

    def wait(self, timeout: float | None = None) -> bool:
        if not super().wait(WAIT_SECONDS if timeout is None else timeout):
            raise AssertionError("no buffer was given back: this would wait for ever")
        return True


@pytest.fixture(autouse=True)
def no_endless_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module imports it. Without it a thread that hangs would keep the whole test run from ending."""
    monkeypatch.setattr("pcscale.storage.host_memory.threading", SimpleNamespace(Condition=ImpatientCondition))


LAYOUTS: Layouts = {
    "small.weight": {"aux": TensorSpec("F32", (3, 5)), "aux.exp_avg": TensorSpec("F32", (3, 5))},
    "large.weight": {
        "delta_in": TensorSpec("F32", (40, 24)),
        "aux": TensorSpec("BF16", (24, 30)),
        "aux.exp_avg": TensorSpec("U8", (24, 30)),
    },
    "middle.weight": {"aux": TensorSpec("BF16", (64, 4)), "aux.exp_avg": TensorSpec("U8", (64, 4))},
}
"""Every dtype that records have, and sizes that are no multiples of each other."""
SIZES = {name: sum(spec.num_bytes for spec in layout.values()) for name, layout in LAYOUTS.items()}
LARGEST = max(SIZES.values())


def a_home(
    home: Any,
    folder: Path,
    pinned_bytes: int | None = None,
    *,
    traffic: Traffic | None = None,
    layouts: Layouts = LAYOUTS,
    made: bool = True,
) -> Residency:
    """A home with every record made, all zero; with `made=False` as it is opened."""
    records = open_residency(State(home, folder, pinned_bytes), layouts, CPU, traffic or Traffic())
    for name in layouts if made else ():
        records.create(name, {})
    return records


def some_bytes(name: str, seed: int = 0) -> torch.Tensor:
    """What a record may be: bytes that are finite values in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    record = torch.zeros(SIZES[name], dtype=torch.uint8)
    for tensor in views_of(record, LAYOUTS[name]).values():
        values = torch.rand(tensor.shape, generator=generator)
        tensor.copy_(values * 255 if tensor.dtype == torch.uint8 else values - 0.5)
    return record


def put(home: Residency, name: str, record: torch.Tensor) -> None:
    """What a visit does that changes everything."""
    home.write(name, home.read(name).copy_(record), changed=True)


def held(home: Residency, name: str) -> torch.Tensor:
    """A copy of what a home holds."""
    buffer = home.read(name)
    record = buffer.clone()
    home.write(name, buffer, changed=False)
    return record


def filled(home: Residency) -> dict[str, torch.Tensor]:
    """Put something into every record; returns what."""
    records = {name: some_bytes(name, seed) for seed, name in enumerate(LAYOUTS)}
    for name, record in records.items():
        put(home, name, record)
    return records


class _FullFile(io.FileIO):
    """A file that has room for a hundred bytes."""

    def write(self, data: Any) -> int:
        super().write(memoryview(data).cast("B")[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk:
    """A disk on which the file of one record, or of any, cannot be written whole."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self.record: str | None = None
        path_open = Path.open

        def opened(path: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            hit = self.record is None or path.name == f"{TEMPORARY_PREFIX}{self.record}.safetensors"
            if self.full and hit and mode in ("wb", "r+b"):
                return _FullFile(path, mode.removesuffix("b"))
            return path_open(path, mode, *arguments, **named)

        monkeypatch.setattr(Path, "open", opened)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    """Set `full` where it is to fail."""
    return FullDisk(monkeypatch)


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def record_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def assert_holds(home: Residency, records: dict[str, torch.Tensor]) -> None:
    for name, record in records.items():
        assert torch.equal(held(home, name), record), name


def as_bytes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }
