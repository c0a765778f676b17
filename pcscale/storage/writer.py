"""Safetensors files whose header is written first and whose tensors are filled in place, in any order and in pieces."""

import json
import math
import mmap
import os
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from pcscale.common.files import publish, readable_os_errors, temporary_beside
from pcscale.storage.hashing import fingerprint
from pcscale.storage.reader import DTYPE_NAMES

TensorShape = tuple[torch.dtype, tuple[int, ...]]


def header_bytes(tensors: dict[str, TensorShape], metadata: dict[str, str] | None = None) -> bytes:
    """The header of a safetensors file whose tensors follow without gaps, in this order."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """A safetensors file being written; its name appears when the block ends well.

    The space is reserved before the first byte, so a full disk is an error at the start, never a crash in the middle.
    Tensors are written by copying into `writer[name]`, a view of the mapped file: none of it is anonymous memory.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorShape], metadata: dict[str, str] | None = None) -> None:
        self.path = path
        self._temporary = temporary_beside(path)
        self._tensors = tensors
        self._header = header_bytes(tensors, metadata)
        sizes = (dtype.itemsize * math.prod(shape) for dtype, shape in tensors.values())
        *starts, self.num_bytes = accumulate(sizes, initial=len(self._header))
        self._starts = dict(zip(tensors, starts, strict=True))

    def __enter__(self) -> "ShardWriter":
        with readable_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                os.posix_fallocate(self._handle, 0, self.num_bytes)
                self._map = mmap.mmap(self._handle, self.num_bytes)
            except BaseException as error:
                self.__exit__(error)
                raise
        self._map[: len(self._header)] = self._header
        return self

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor as a view of the file, to be written into."""
        dtype, shape = self._tensors[name]
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._starts[name]).view(shape)

    def data(self) -> memoryview:
        """All bytes of the file."""
        return memoryview(self._map)

    def __exit__(self, raised: Any, *_: object) -> None:
        try:
            if raised is None:
                with readable_os_errors(self.path):
                    os.fsync(self._handle)
                    publish(self._temporary, self.path)
        finally:
            os.close(self._handle)
            self._temporary.unlink(missing_ok=True)  # It is gone where it was published.


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write whole tensors to one safetensors file, atomically; returns the file's fingerprint."""
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with ShardWriter(path, shapes, metadata) as writer:
        for name, tensor in tensors.items():
            writer[name].copy_(tensor)
        return fingerprint(writer.data())
