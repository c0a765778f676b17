"""Tensors as views of memory-mapped files: nothing is copied, and what is touched stays file-backed memory."""

import mmap
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from pcscale.storage.index import TensorEntry

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
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class TensorReader:
    """Reads the tensors of a set of safetensors files, each file mapped once and shared by all processes."""

    def __init__(self, entries: dict[str, TensorEntry]) -> None:
        self.entries = entries
        self._maps: dict[Path, mmap.mmap] = {}
        self._handles: dict[Path, int] = {}

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            self._handles[file] = os.open(file, os.O_RDONLY)
            self._maps[file] = mmap.mmap(self._handles[file], 0, access=mmap.ACCESS_READ)
        return self._maps[file]

    def tensor(self, name: str) -> torch.Tensor:
        """A read-only view on the host, in the stored dtype and shape. Memory: file-backed, none of it anonymous."""
        entry = self.entries[name]
        if not entry.num_bytes:
            return torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        dtype = TORCH_DTYPES[entry.dtype]
        flat = torch.frombuffer(
            self._map(entry.file), dtype=dtype, count=entry.num_bytes // dtype.itemsize, offset=entry.start
        )
        return flat.view(entry.shape)

    def data(self, name: str) -> memoryview:
        """The tensor's bytes, as they lie in the file."""
        entry = self.entries[name]
        return memoryview(self._map(entry.file))[entry.start : entry.start + entry.num_bytes]

    def prefetch(self, names: Iterable[str]) -> None:
        """Ask the operating system to read these tensors soon; returns at once."""
        for name in names:
            entry = self.entries[name]
            self._map(entry.file)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._handles[entry.file], entry.start, entry.num_bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Let the files go. Views that are still alive keep their mapping."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()
        self._maps.clear()
