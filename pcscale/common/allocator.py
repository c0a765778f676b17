"""The return of freed memory to the system: the C library's allocator keeps gigabytes of tensors."""

import ctypes
import gc
from typing import Any

from pcscale.common.ledger import ledger


def trim_heap() -> None:
    """Give the memory that is free inside the C library's allocator back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def release_freed() -> None:
    """Collect garbage, and give the freed memory back to the system."""
    gc.collect()
    trim_heap()


def release_between_stages(device: Any) -> None:
    """Give back freed memory between two stages of a run on a torch device, when nothing temporary is held.

    Where the host computes, activations that the allocator keeps would otherwise lie beside the next stage's memory.
    """
    if device.type == "cpu":
        trim_heap()
    ledger.mark_idle()
