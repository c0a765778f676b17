"""The tensors inside a foreign object: DeepSpeed keeps its copies in many attributes."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

_DEEPEST = 6


def stored_bytes(holder: Any, seen: set[int]) -> dict[str, int]:
    """Bytes of the tensors that are reached, by placement; `seen` has, and gets, the addresses of counted storages."""
    found: dict[str, int] = {}
    for tensor in held_tensors(holder):
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            placement = "device" if tensor.is_cuda else "pinned" if tensor.is_pinned() else "host"
            found[placement] = found.get(placement, 0) + storage.nbytes()
    return found


def held_tensors(value: Any, depth: int = _DEEPEST, visited: set[int] | None = None) -> Iterator[torch.Tensor]:
    """The tensors that are reached through attributes, lists and mappings, `depth` of them inside each other."""
    visited = set() if visited is None else visited
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and id(value) not in visited and not isinstance(value, torch.nn.Module):
        visited.add(id(value))
        if type(value).__module__.startswith("deepspeed") and not isinstance(value, Mapping | list | tuple | set):
            value = getattr(value, "__dict__", {})
        if isinstance(value, Mapping):
            value = list(value.values())
        for child in list(value) if isinstance(value, list | tuple | set) else ():
            yield from held_tensors(child, depth - 1, visited)
