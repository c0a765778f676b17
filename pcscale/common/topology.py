"""This process among those of a run, and the messages between them."""

import os
from dataclasses import dataclass
from typing import Any, Protocol

_LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@dataclass(frozen=True)
class Topology:
    """The processes of a run, and the number of this one among all and among those of its host."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def launched(cls) -> "Topology":
        """The topology in the environment, from torchrun or the deepspeed launcher; without one, a single process."""
        values = (os.environ.get(name, default) for name, default in _LAUNCHED.items())
        return cls(*map(int, values))

    @property
    def is_first(self) -> bool:
        return self.rank == 0


ONE_PROCESS = Topology()


class Group(Protocol):
    """The processes of a run that exchange values. Every rank makes the same calls in the same order."""

    topology: Topology
    device_name: str | None  # of this rank; None: a lone process chooses

    def gather(self, value: Any) -> list[Any]:
        """Collect each rank's value, in the order of ranks, on every rank."""
        ...

    def sum(self, values: list[float]) -> list[float]:
        """Sum over ranks; the sums are equal to the last bit on every rank."""
        ...


class Alone:
    """A group of one process."""

    topology = ONE_PROCESS
    device_name: str | None = None

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def sum(self, values: list[float]) -> list[float]:
        return values


ALONE = Alone()
