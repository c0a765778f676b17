"""Blocks of host memory that a GPU can copy from and to while it computes."""

import threading
import weakref
from typing import Any

import torch

from pcscale.common.errors import RunError
from pcscale.common.units import aligned, format_bytes


class HostBytes:
    """A block of host memory, pinned where there is a GPU. Memory: `num_bytes`, anonymous, once it is written to."""

    def __init__(self, num_bytes: int) -> None:
        self.bytes = torch.empty(num_bytes, dtype=torch.uint8)
        self.placement = "pinned" if torch.cuda.is_available() else "host"
        if self.placement == "pinned" and num_bytes:
            # torch's own pin_memory rounds every block up to a power of two.
            runtime: Any = torch.cuda.cudart()
            status = runtime.cudaHostRegister(self.bytes.data_ptr(), num_bytes, 0)
            if int(status) != 0:
                raise RunError(
                    f"the system does not pin {format_bytes(num_bytes)} of host memory (CUDA error {int(status)}). "
                    "Lower pinned_memory, raise the limit of locked memory, or use residency disk."
                )
            # The finalizer holds the block, so that it is not freed while it is registered.
            weakref.finalize(self, lambda block: runtime.cudaHostUnregister(block.data_ptr()), self.bytes)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host, shared with it."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


class Arena:
    """One block of bytes, flat uint8 on any device, from which several threads take buffers and give them back.

    The block is used again and again: fresh memory costs more than writing into it.
    """

    def __init__(self, block: torch.Tensor) -> None:
        self._block = block
        self._taken: dict[int, int] = {}
        """The end of each buffer that is out, by its address."""
        self._changed = threading.Condition()

    @property
    def num_bytes(self) -> int:
        return len(self._block)

    def take(self, num_bytes: int) -> torch.Tensor:
        """A buffer of that size, uninitialised; waits until there is room."""
        assert num_bytes <= len(self._block)
        with self._changed:
            start = self._gap(num_bytes)
            while start is None:
                self._changed.wait()
                start = self._gap(num_bytes)
            buffer = self._block[start : start + num_bytes]
            self._taken[buffer.data_ptr()] = start + num_bytes
        return buffer

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back; nobody may use it any more."""
        with self._changed:
            del self._taken[buffer.data_ptr()]
            self._changed.notify_all()

    def _gap(self, num_bytes: int) -> int | None:
        """The start of the first gap that is large enough; None: there is none."""
        start, base = 0, self._block.data_ptr()
        for address, end in sorted(self._taken.items()):
            if address - base - start >= num_bytes:
                return start
            start = aligned(end)
        return start if start + num_bytes <= len(self._block) else None
