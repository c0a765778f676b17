"""Where a run's bytes lie: the GPU or the host, how many ranks, and how ZeRO splits the compressed model."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

FLOAT_BYTES = 4
GATHERED = "gathered weights and gradients"
"""The component that ZeRO's stage 3 puts together for as long as it is needed."""
ON_GPU_ONLY = ("base on its way", "pinned buffers", "device context")
"""Components that exist only where host and device are two memories."""


@dataclass(frozen=True)
class Part:
    """One component's memory.

    Attributes:
        placement: `device`, `host` (anonymous), `pinned` or `disk`.
        num_bytes: Units: bytes.
    """

    placement: str
    num_bytes: int


Parts = dict[str, Part]
"""Components with their memory."""


def total(parts: Iterable[Part], *placements: str) -> int:
    """Bytes of the parts that lie at one of these placements."""
    return sum(part.num_bytes for part in parts if part.placement in placements)


class ModelSplit(Protocol):
    """A way for several ranks to keep the compressed model (distributed/zero_form.py)."""

    @property
    def stage(self) -> int: ...

    def parts(self, parameters: int, weight_bytes: int, ranks: int, accumulates: bool, largest: int = 0) -> Parts: ...

    def scattered_bytes(self, parameters: int, ranks: int) -> int: ...

    def moved_bytes(self, parameters: int, weight_bytes: int, ranks: int, micro_batches: int) -> int: ...


@dataclass(frozen=True)
class Deployment:
    """The devices and ranks that a run is spread over.

    Attributes:
        on_gpu: False: the host holds what a device would.
        ranks: processes, each with a device of its own.
        ranks_of_a_host: how many of them share its memory; None: all.
        zero: how DeepSpeed splits the model; None: one process without it.
    """

    on_gpu: bool = True
    ranks: int = 1
    ranks_of_a_host: int | None = None
    zero: ModelSplit | None = None

    @property
    def sharing(self) -> int:
        """Ranks on one host."""
        return min(self.ranks, self.ranks_of_a_host or self.ranks)

    def settle(self, parts: Parts) -> Parts:
        """The parts as they are beside a GPU; without one all memory is the host's, and nothing moves to a device."""
        if self.on_gpu:
            return parts
        return {
            name: part if part.placement == "disk" else Part("host", part.num_bytes)
            for name, part in parts.items()
            if name not in ON_GPU_ONLY
        }


ONE_GPU = Deployment()
