"""Counters of what collectives carry. An all-reduce counts as one reduction, an all-gather as the whole it makes."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_PAYLOADS: dict[str, Callable[..., Any]] = {
    "all_reduce": lambda tensor, *_: tensor,
    "broadcast": lambda tensor, *_: tensor,
    "reduce": lambda tensor, *_: tensor,
    "all_gather": lambda tensors, *_: tensors,
    "all_gather_into_tensor": lambda whole, *_: whole,
    "all_gather_single": lambda whole, *_: whole,
    "reduce_scatter_tensor": lambda part, whole, *_: whole,
    "reduce_scatter_single": lambda part, whole, *_: whole,
}
"""By the name of a collective, what it carries of its arguments."""
_FIRST = ("tensor", "tensor_list", "output_tensor", "output")
_SECOND = ("input_tensor", "input")


def count_collectives() -> Counter[str]:
    """From now on every collective of torch.distributed adds its bytes to the counter."""
    counts: Counter[str] = Counter()
    depth = 0

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*positional: Any, **named: Any) -> Any:
            nonlocal depth
            if depth == 0:
                given = [named[key] for keys in (_FIRST, _SECOND) for key in keys if key in named]
                payload = _PAYLOADS[name](*positional, *given)
                tensors = payload if isinstance(payload, list) else [payload]
                counts[name] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            depth += 1  # One collective may be made of another.
            try:
                return function(*positional, **named)
            finally:
                depth -= 1

        return counted

    for name in _PAYLOADS:
        function = getattr(distributed_c10d, name, None)
        if function is not None:
            counted = counting(name, function)
            for module in (dist, distributed_c10d):
                setattr(module, name, counted)
    assert torch.distributed.all_reduce is distributed_c10d.all_reduce
    return counts
