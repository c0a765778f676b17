"""What tensors an object of somebody else's holds, for the ledger: DeepSpeed keeps its copies in many attributes."""

from collections.abc import Mapping
from typing import Any

import torch

_DEEPEST = 6


def stored_bytes(holder: Any, seen: set[int]) -> dict[str, int]:
    """Bytes of the tensors that are reached through attributes, lists and mappings, by home.

    Args:
        seen: addresses of storages that were counted already; added to.
    """
    found: dict[str, int] = {}
    _walk(holder, seen, set(), found, _DEEPEST)
    return found


def _walk(value: Any, seen: set[int], visited: set[int], found: dict[str, int], depth: int) -> None:
    if isinstance(value, torch.Tensor):
        _count(value, seen, found)
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
        _walk(child, seen, visited, found, depth - 1)


def _count(tensor: torch.Tensor, seen: set[int], found: dict[str, int]) -> None:
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen or storage.nbytes() == 0:
        return
    seen.add(storage.data_ptr())
    home = "device" if tensor.is_cuda else "pinned" if tensor.is_pinned() else "host"
    found[home] = found.get(home, 0) + storage.nbytes()
