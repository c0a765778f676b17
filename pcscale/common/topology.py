"""Which process this is among those of a run, and what they say to each other."""

import os
from dataclasses import dataclass
from typing import Any, Protocol

_LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@dataclass(frozen=True)
class Topology:
    """The processes of a run.

    Attributes:
        rank: this process, from 0.
        world_size: how many there are.
        local_rank: this process among those of its host.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def launched(cls) -> "Topology":
        """What torchrun or the deepspeed launcher has told this process; one process where neither has."""
        values = (os.environ.get(name, default) for name, default in _LAUNCHED.items())
        return cls(*map(int, values))

    @property
    def is_first(self) -> bool:
        return self.rank == 0


ONE_PROCESS = Topology()


class Group(Protocol):
    """What the processes of a run say to each other. Every rank makes the same calls in the same order.

    Attributes:
        device_name: of this rank's device; None: a lone process chooses.
    """

    topology: Topology
    device_name: str | None

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, by rank, on every rank."""
        ...

    def sum(self, values: list[float]) -> list[float]:
        """The sums over ranks, equal to the last bit on every rank."""
        ...


class Alone:
    """One process: nobody to talk to."""

    topology = ONE_PROCESS
    device_name: str | None = None

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def sum(self, values: list[float]) -> list[float]:
        return values


ALONE = Alone()
