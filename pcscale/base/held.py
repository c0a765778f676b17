"""The frozen base held in memory: its matrices are read once and handed out from there."""

from collections.abc import Collection

import torch

from pcscale.base.int8 import Int8Base
from pcscale.base.mapped import MappedBase
from pcscale.base.weight import FrozenWeight
from pcscale.common.ledger import FROZEN_BASE, ledger, placement_of
from pcscale.common.units import aligned
from pcscale.storage.host_memory import Arena, HostBytes


class HeldBase:
    """The matrices of a base in memory, for `base_home` cpu and device.

    Args:
        device: the device that holds them; the host's memory is pinned where there is a GPU.
        names: the matrices to hold; None: all.

    Memory: these matrices, in the precision of `base`.
    """

    collective = False

    def __init__(self, base: MappedBase | Int8Base, device: torch.device, names: Collection[str] | None = None) -> None:
        names = base.matrix_names if names is None else names
        self.placement = "cpu" if device.type == "cpu" else "device"
        self.stored: MappedBase = base.stored
        self.lost, self.coded_fingerprints = base.lost, base.coded_fingerprints
        if device.type == "cpu":
            sizes = (aligned(tensor.nbytes) for name in names for tensor in base.weight(name).tensors)
            self._memory = HostBytes(sum(sizes))
            arena = Arena(self._memory.bytes)
            self._weights = {
                name: FrozenWeight(*(_copied(tensor, arena) for tensor in base.weight(name).tensors)) for name in names
            }
            placement = self._memory.placement
        else:
            self._weights = {name: base.weight(name).to(device) for name in names}
            placement = placement_of(device)
        ledger.keep(self, FROZEN_BASE, placement, sum(weight.num_bytes for weight in self._weights.values()))

    def weight(self, name: str) -> FrozenWeight:
        return self._weights[name]

    def prefetch(self, names: list[str]) -> None:
        """Do nothing: the weights are in memory."""


def _copied(tensor: torch.Tensor, arena: Arena) -> torch.Tensor:
    return arena.take(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)
