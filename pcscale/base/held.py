"""The frozen base held in memory: its matrices are read once, and given out from there."""

from collections.abc import Collection

import torch

from pcscale.base.int8 import Int8Base
from pcscale.base.mapped import MappedBase
from pcscale.base.weight import FrozenWeight
from pcscale.common.ledger import FROZEN_BASE, ledger, placement_of
from pcscale.common.units import aligned
from pcscale.storage.host_memory import Arena, HostBytes


class HeldBase:
    """The matrices of a base in memory, as `base_home` cpu and device ask for.

    Args:
        base: what they are read from, as stored or in 8 bits.
        device: where they are held; the host's memory is pinned where there is a GPU.
        names: of the matrices to hold; None: all.

    Memory: these matrices, in the precision that they are kept in.
    """

    collective = False

    def __init__(self, base: MappedBase | Int8Base, device: torch.device, names: Collection[str] | None = None) -> None:
        names = base.matrix_names if names is None else names
        self.home = "cpu" if device.type == "cpu" else "device"
        self.lost, self.coded_fingerprints = base.lost, base.coded_fingerprints
        if device.type == "cpu":
            tensors = [tensor for name in names for tensor in base.weight(name).tensors]
            self._memory = HostBytes(sum(aligned(tensor.numel() * tensor.element_size()) for tensor in tensors))
            places = Arena(self._memory.bytes)
            self._weights = {name: _copied(base.weight(name), places) for name in names}
        else:
            self._weights = {name: base.weight(name).to(device) for name in names}
        home = self._memory.home if device.type == "cpu" else placement_of(device)
        ledger.keep(self, FROZEN_BASE, home, sum(weight.num_bytes for weight in self._weights.values()))

    def weight(self, name: str) -> FrozenWeight:
        return self._weights[name]

    def prefetch(self, names: list[str]) -> None:
        """Nothing to do: they are in memory."""


def _copied(weight: FrozenWeight, places: Arena) -> FrozenWeight:
    copies = []
    for tensor in weight.tensors:
        place = places.take(tensor.numel() * tensor.element_size())
        copies.append(place.view(tensor.dtype).view(tensor.shape).copy_(tensor))
    return FrozenWeight(*copies)
