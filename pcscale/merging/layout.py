"""The files of a merged model and the tensors in each. Known before the first byte is computed."""

import math
from dataclasses import dataclass

import torch

from pcscale.families.plan import Plan, PlannedWeight
from pcscale.storage.index import SINGLE_NAME


@dataclass(frozen=True)
class Shard:
    """One file of the merged model."""

    name: str
    weights: tuple[PlannedWeight, ...]


def lay_out(plan: Plan, dtypes: dict[str, torch.dtype], max_shard_bytes: int) -> list[Shard]:
    """Fill files with tensors in the order of the family's table, up to the limit; a larger tensor stands alone."""
    groups: list[list[PlannedWeight]] = []
    room = 0
    for planned in plan.weights:
        size = tensor_bytes(planned, dtypes)
        if not groups or size > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(planned)
        room -= size
    if len(groups) == 1:
        return [Shard(SINGLE_NAME, tuple(groups[0]))]
    count = len(groups)
    return [
        Shard(f"model-{number:05d}-of-{count:05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def tensor_bytes(planned: PlannedWeight, dtypes: dict[str, torch.dtype]) -> int:
    """Bytes of a tensor in the merged model."""
    return math.prod(planned.shape) * dtypes[planned.name].itemsize
