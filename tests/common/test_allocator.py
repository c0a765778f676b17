"""Freed memory is given back to the system."""

import pytest
import torch

from pcscale.common.allocator import release_between_stages, release_freed
from pcscale.memory.process import anonymous_bytes


def test_between_stages_freed_memory_is_given_back() -> None:
    release_freed()  # What earlier tests have freed would be given back with it.
    blocks = [torch.ones(30_000) for _ in range(1000)]
    held = anonymous_bytes()
    size = sum(block.nbytes for block in blocks)
    last = blocks.pop()  # Above all others, so that the allocator keeps those.
    del blocks
    assert held - anonymous_bytes() < size / 4
    release_between_stages(torch.device("cpu"))
    assert held - anonymous_bytes() == pytest.approx(size, abs=size / 4)
    assert last.nbytes == 120_000
