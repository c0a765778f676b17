"""Tensors as views of memory-mapped files: nothing is copied, and pages that are read stay file-backed memory."""

import math
import mmap
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from pcscale.storage.index import TensorEntry, read_header

# The views are read-only by contract; torch warns of that once per process, wherever the first one is made.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_ADVISED_BYTES = 2**20
_advisor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")


def read_ahead(file: Path, start: int, num_bytes: int) -> None:
    """Have a part of a file read into the page cache while the caller goes on.

    Linux serves only the first megabytes of one large request. A thread therefore asks for one megabyte at a time.
    Memory: file-backed only.
    """

    def advise() -> None:
        with file.open("rb") as handle:
            for offset in range(start, start + num_bytes, _ADVISED_BYTES):
                os.posix_fadvise(handle.fileno(), offset, _ADVISED_BYTES, os.POSIX_FADV_WILLNEED)

    if hasattr(os, "posix_fadvise"):
        _advisor.submit(advise)


class TensorReader:
    """Reads the tensors of a set of safetensors files, each file mapped once and shared by all processes."""

    def __init__(self, entries: dict[str, TensorEntry]) -> None:
        self.entries = entries
        self._maps: dict[Path, mmap.mmap] = {}

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as handle:
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]

    def tensor(self, name: str) -> torch.Tensor:
        """A read-only view on the host, in the stored dtype and shape. Memory: file-backed, none of it anonymous."""
        entry = self.entries[name]
        dtype, count = TORCH_DTYPES[entry.dtype], math.prod(entry.shape)
        if not count:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(self._map(entry.file), dtype=dtype, count=count, offset=entry.start).view(entry.shape)

    def data(self, name: str) -> memoryview:
        """The tensor's bytes, as they lie in the file."""
        entry = self.entries[name]
        return memoryview(self._map(entry.file))[entry.start : entry.start + entry.num_bytes]

    def prefetch(self, names: Iterable[str]) -> None:
        """Have these tensors read into the page cache soon; returns at once."""
        for name in names:
            entry = self.entries[name]
            read_ahead(entry.file, entry.start, entry.num_bytes)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Every tensor of one safetensors file, as views that keep it mapped."""
    reader = TensorReader(read_header(file)[0])
    return {name: reader.tensor(name) for name in reader.entries}
