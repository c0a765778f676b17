"""The frozen base under ZeRO-3: every rank holds a part of each weight, and all gather a weight when they need it."""

from typing import Any

import deepspeed
import torch
from torch import nn

from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import BaseFolder
from pcscale.base.weight import FrozenWeight
from pcscale.common.ranks import on_every_rank
from pcscale.common.topology import Group
from pcscale.storage.reader import TORCH_DTYPES


class ZeroBase(MappedBase):
    """A base whose weights DeepSpeed partitions among the ranks, in host memory or as `offload_param` says.

    The first rank reads and checks each weight at its first use, and the others get their parts of it: no rank ever
    holds the model, and files are read once. All ranks ask for the same weights in the same order.

    Args:
        zero: DeepSpeed's section `zero_optimization`, of which `offload_param` counts; without it: host memory.

    Memory: the weights' bytes over the number of ranks; on each rank the gathered weight and those under way, which
    are the next one of a sweep or the next layer of a pass through the model.
    """

    placement = "zero"
    collective = True

    def __init__(self, source: BaseFolder, expected: dict[str, str] | None, zero: dict[str, Any], group: Group) -> None:
        super().__init__(source, expected)
        offload = zero.get("offload_param", {"device": "cpu"})
        self._settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "offload_param": offload, "stage3_param_persistence_threshold": 0},
        }
        self._group = group
        self._parted: dict[str, Any] = {}
        self._under_way: dict[str, Any] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """The whole weight, on every rank, on the host and in its stored dtype.

        Raises:
            RequestError: the weight is not finite, or not the one that the run began with.
            PeerFailed: the first rank has failed to read it.
        """
        return self._gather(name).to("cpu")

    def weight(self, name: str) -> FrozenWeight:
        return FrozenWeight(self._gather(name))

    def _gather(self, name: str) -> torch.Tensor:
        if name not in self._parted:
            self._parted[name] = self._load(name)
        parted = self._parted[name]
        under_way = self._under_way.pop(name, None)
        (under_way or parted.all_gather_coalesced([parted])).wait()
        whole = parted.data
        parted.partition()
        return whole

    def prefetch(self, names: list[str]) -> None:
        """Begin to gather these weights; the first rank reads ahead those that were not used yet."""
        for name in names:
            if name in self._parted and name not in self._under_way:
                self._under_way[name] = self._parted[name].all_gather_coalesced([self._parted[name]])
        if self._group.topology.is_first:
            super().prefetch([name for name in names if name not in self._parted])

    def _load(self, name: str) -> nn.Parameter:
        first, entry = self._group.topology.is_first, self._reader.entries[name]
        values = on_every_rank(self._group, lambda: self._read(name) if first else None)
        if values is None:
            values = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        parameter = nn.Parameter(values, requires_grad=False)
        parted = next(iter(self._parted.values()), None)
        if parted is not None:
            parted.convert_to_zero_parameters(param_list=[parameter])
        else:
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=self._settings)
        return parameter
