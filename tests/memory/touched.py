"""A tensor that takes memory, for tests that measure it."""

import time
from collections.abc import Callable

import torch

SIZE = 64 * 2**20
SLACK = 8 * 2**20
"""What the interpreter, its threads and the allocator take or give back meanwhile."""
PATIENCE_SECONDS = 20.0
"""How long the sampling thread may be kept waiting by a busy machine."""


def touched() -> torch.Tensor:
    """A tensor of SIZE bytes, all of them written."""
    return torch.ones(SIZE // 4)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert true()
