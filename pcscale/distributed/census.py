"""The tensors inside a foreign object: DeepSpeed keeps its copies in many attributes."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

_DEEPEST = 6


def stored_bytes(holder: Any, seen: set[int]) -> dict[str, int]:
    """Bytes of the tensors that are reached through attributes, lists and mappings, by placement.

    Args:
        seen: addresses of the storages counted so far, which this call adds to.
    """
    found: dict[str, int] = {}
    for tensor in held_tensors(holder):
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            placement = "device" if tensor.is_cuda else "pinned" if tensor.is_pinned() else "host"
            found[placement] = found.get(placement, 0) + storage.nbytes()
    return found


def held_tensors(holder: Any) -> Iterator[torch.Tensor]:
    """The tensors that are reached through attributes, lists and mappings."""
    return _walk(holder, set(), _DEEPEST)


def _walk(value: Any, visited: set[int], depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        return
    if depth == 0 or id(value) in visited or isinstance(value, str | bytes | int | float | torch.nn.Module):
        return
    visited.add(id(value))
    if isinstance(value, Mapping):
        children = list(value.values())
    elif isinstance(value, list | tuple | set):
        children = list(value)
    elif type(value).__module__.startswith("deepspeed"):
        children = list(vars(value).values()) if hasattr(value, "__dict__") else []
    else:
        return
    for child in children:
        yield from _walk(child, visited, depth - 1)
