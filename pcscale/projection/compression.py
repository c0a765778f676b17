"""A compression: a base, the plan that cuts it, and the compressed model at its start."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from pcscale.base.mapped import MappedBase
from pcscale.base.weight import FrozenWeight
from pcscale.families.plan import Plan
from pcscale.projection.engine import Engine
from pcscale.projection.starts import Start

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Method = Literal["projected", "hard_prune"]


class Base(Protocol):
    """The frozen base as the sweep reads it.

    Attributes:
        placement: `disk`, `cpu`, `device` or `zero`: where its weights come from.
        collective: whether all ranks must ask for a weight together, since each holds a part of it.
        coded_fingerprints: of the 8-bit codes that its weights come from; empty: they are the stored ones.
        stored: the checkpoint that it comes from.
    """

    placement: str
    collective: bool
    coded_fingerprints: dict[str, str]

    @property
    def stored(self) -> MappedBase: ...

    def weight(self, name: str) -> FrozenWeight: ...

    def lost(self, name: str, rows: slice) -> torch.Tensor | None: ...

    def prefetch(self, names: list[str]) -> None: ...


@dataclass(frozen=True)
class Compression:
    """Everything that training begins with.

    Attributes:
        model: a stock causal model at the compressed size; its parameters are named as in the plan.
        start: what S is and where aux begins; of a checkpoint that is loaded, its `fixed` tensors are enough.
        method: `hard_prune` trains the start directly, without the base: the control arm.
        engine: the holder of the model's weights and gradients; None: this process, whole. With several ranks each has
            the records of the matrices that it owns.
    """

    model: "PreTrainedModel"
    plan: Plan
    base: Base
    start: Start
    method: Method = "projected"
    engine: Engine | None = None
