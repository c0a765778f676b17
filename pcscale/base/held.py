"""The frozen base held in memory: its matrices are read once, and given out from there."""

import torch

from pcscale.base.int8 import Int8Base
from pcscale.base.mapped import MappedBase
from pcscale.base.weight import FrozenWeight
from pcscale.storage.host_memory import HostBytes


class HeldBase:
    """The matrices of a base in memory, as `base_home` cpu and device ask for.

    Args:
        base: what they are read from, as stored or in 8 bits.
        device: where they are held; the host's memory is pinned where there is a GPU.

    Memory: every matrix of the base, in the precision that it is kept in.
    """

    def __init__(self, base: MappedBase | Int8Base, device: torch.device) -> None:
        self.loss, self.coded_fingerprints = base.loss, base.coded_fingerprints
        if device.type == "cpu":
            self._memory = HostBytes(sum(base.weight(name).num_bytes for name in base.matrix_names))
            self._free = self._memory.bytes
            self._weights = {name: self._copied(base.weight(name)) for name in base.matrix_names}
        else:
            self._weights = {name: base.weight(name).to(device) for name in base.matrix_names}

    def _copied(self, weight: FrozenWeight) -> FrozenWeight:
        """A copy in the block, taken from its start."""
        copies = []
        for tensor in weight.tensors:
            num_bytes = tensor.numel() * tensor.element_size()
            copies.append(self._free[:num_bytes].view(tensor.dtype).view(tensor.shape).copy_(tensor))
            self._free = self._free[num_bytes:]
        return FrozenWeight(*copies)

    def weight(self, name: str) -> FrozenWeight:
        return self._weights[name]

    def prefetch(self, names: list[str]) -> None:
        """Nothing to do: they are in memory."""
