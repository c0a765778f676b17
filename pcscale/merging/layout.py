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
    num_bytes: int  # of all its tensors


def lay_out(plan: Plan, dtypes: dict[str, torch.dtype], max_shard_bytes: int) -> list[Shard]:
    """Fill files with tensors in the order of the family's table, up to the limit; a larger tensor stands alone."""
    groups: list[list[PlannedWeight]] = []
    sizes: list[int] = []
    for planned in plan.weights:
        size = tensor_bytes(planned, dtypes)
        if not groups or sizes[-1] + size > max_shard_bytes:
            groups.append([])
            sizes.append(0)
        groups[-1].append(planned)
        sizes[-1] += size
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    names = [SINGLE_NAME] if len(groups) == 1 else names
    return [Shard(*parts) for parts in zip(names, map(tuple, groups), sizes, strict=True)]


def tensor_bytes(planned: PlannedWeight, dtypes: dict[str, torch.dtype]) -> int:
    """Bytes of a tensor in the merged model."""
    return math.prod(planned.shape) * dtypes[planned.name].itemsize
