"""Records in files, written so that no checkpoint that links to them ever changes and a full disk loses none."""

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from pcscale.common.errors import RunError
from pcscale.common.files import TEMPORARY_PREFIX, link_or_copy, readable_os_errors, sync_to_disk, temporary_beside
from pcscale.common.ledger import PINNED_BUFFERS, RECORD_BUFFERS, ledger, placement_of
from pcscale.common.units import format_bytes
from pcscale.projection.memory_residency import Layouts, Traffic, copy_bytes, given_back, record_size
from pcscale.storage.hashing import fingerprint_file
from pcscale.storage.host_memory import Arena, HostBytes, bytes_of
from pcscale.storage.index import read_header
from pcscale.storage.reader import TORCH_DTYPES, TensorReader
from pcscale.storage.writer import header_bytes


def check_disk(folder: Path, sizes: list[int]) -> None:
    """Refuse a folder, there already or not, whose disk has no room for records of these sizes."""
    while not folder.exists():
        folder = folder.parent
    # Beside the records there is a spare file of each size.
    needed, free = sum(sizes) + sum(set(sizes)), shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{folder}: the disk has {format_bytes(free)} free, residency disk takes {format_bytes(needed)}. "
            f"Free at least {needed - free} bytes more, or choose another output."
        )


class DiskResidency:
    """Records live in files; memory holds those that are on their way, the device those that are worked on.

    A record is written into another file than the one it was read from, and a file that a checkpoint shares is never
    written again, so that a checkpoint can hold a file by a link to it. A step's files are not synced: after a crash a
    run goes on from its last checkpoint, whose files are.

    At a time the device holds `device_bytes` of records, pinned memory beside a GPU `staging_bytes`.
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
        self._headers = {
            name: header_bytes({part: (TORCH_DTYPES[spec.dtype], spec.shape) for part, spec in layout.items()})
            for name, layout in layouts.items()
        }
        self._folder = folder
        self._traffic = traffic
        self._spares: dict[int, Path] = {}
        """Files of former records by their length: at most one of each, since only one record is written at a time."""
        with readable_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
                leftover.unlink()
        check_disk(folder, [record_size(layout) for layout in layouts.values()])
        self._staging = self._memory = None
        if device.type != "cpu":
            # Between a file and the device.
            self._memory = HostBytes(staging_bytes)
            self._staging = Arena(self._memory.bytes)
            ledger.keep(self, PINNED_BUFFERS, self._memory.placement, staging_bytes)
        self._working = Arena(
            torch.zeros(staging_bytes if device.type == "cpu" else device_bytes, dtype=torch.uint8, device=device)
        )
        ledger.keep(self, RECORD_BUFFERS, placement_of(device), self._working.num_bytes)

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

    def read(self, name: str) -> torch.Tensor:
        buffer = self._working.take(record_size(self._layouts[name]))
        try:
            # The device's buffer comes first: whoever holds a staging buffer needs nothing more to finish.
            with self._staged(buffer) as staging:
                self._read(name, staging)
                if staging is not buffer:
                    copy_bytes(staging, buffer)
        except BaseException:
            self._working.give(buffer)
            raise
        return buffer

    def write(self, name: str, buffer: torch.Tensor, changed: bool) -> None:
        with given_back(self._working, buffer):
            if not changed:
                return
            with self._staged(buffer) as staging:
                if staging is not buffer:
                    copy_bytes(buffer, staging)
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
    def _staged(self, buffer: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield host memory for the buffer's bytes: itself without a GPU."""
        if self._staging is None:
            yield buffer
            return
        staging = self._staging.take(len(buffer))
        with given_back(self._staging, staging):
            yield staging

    @contextmanager
    def _new_file(self, name: str) -> Iterator[BinaryIO]:
        """A file, in the place of a spare one of the same length where there is one, that becomes the record.

        The former file is a spare from now on, unless a checkpoint shares it: written over, it costs no new pages of
        memory and no new blocks of the disk.
        """
        path, num_bytes = self._path(name), self._file_bytes(name)
        temporary, spare = temporary_beside(path), self._spares.pop(num_bytes, None)
        with readable_os_errors(path):
            try:
                if spare is not None:
                    spare.rename(temporary)
                with temporary.open("wb" if spare is None else "r+b") as file:
                    yield file
                if path.exists() and path.stat().st_nlink == 1:
                    spare = path.with_name(f"{TEMPORARY_PREFIX}spare-{num_bytes}")
                    with contextlib.suppress(OSError):  # A file system without links has no spares.
                        spare.hardlink_to(path)
                        self._spares[num_bytes] = spare
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def _file_bytes(self, name: str) -> int:
        return len(self._headers[name]) + record_size(self._layouts[name])

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
