"""The holder of the compressed weights and their gradients, which runs the model forward and backward.

The optimizer sees them through an engine alone: one process keeps them whole (`LocalEngine`), DeepSpeed may replicate,
partition or offload them (distributed/engine.py).
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from pcscale.common.topology import ONE_PROCESS, Topology
from pcscale.projection.gradients import Accumulated
from pcscale.projection.owners import Round


class Engine(Protocol):
    """Compressed weights by name. Every rank makes the same calls in the same order.

    Attributes:
        device: where the products are computed.
        dtype: of the weights.
        gradients_on: `device`, `cpu`, or `engine` where DeepSpeed keeps them.
    """

    topology: Topology
    device: torch.device
    dtype: torch.dtype
    gradients_on: str

    def take_over(self, loss_module: nn.Module) -> nn.Module:
        """Take the model over; returns the module to call from now on. Before, every rank holds all of it."""
        ...

    def hold_gradients(self) -> None:
        """Before a step of several micro batches: take memory for all gradients, where that is ours to say."""
        ...

    def backward(self, loss: torch.Tensor, accumulation: int) -> None:
        """Accumulate the gradients of one of so many micro batches; with the last they are those of the step."""
        ...

    def mean(self, value: torch.Tensor) -> float:
        """The mean of a scalar over ranks."""
        ...

    def value(self, name: str) -> torch.Tensor:
        """The whole weight, on every rank; the parameter itself where it lies whole."""
        ...

    def reached(self) -> list[str]:
        """The weights that have a gradient."""
        ...

    def clip_norm(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their norm is at most `max_norm`; returns the norm before."""
        ...

    def round_gradient(self, sweep_round: Round) -> torch.Tensor | None:
        """The whole gradient, where it lies, of the weight that this rank works on in the round."""
        ...

    def gradient(self, name: str) -> torch.Tensor:
        """A whole gradient on every rank."""
        ...

    def destination(self, name: str) -> torch.Tensor:
        """The tensor into which this rank writes a new weight before it is published."""
        ...

    def publish(self, sweep_round: Round) -> None:
        """Make each rank's new weight of this round the model's."""
        ...

    def replace(self, name: str, value: torch.Tensor) -> None:
        """Make a value that every rank has the model's."""
        ...

    def clear(self) -> None:
        """Forget the gradients; what was published is the model's from now on."""
        ...

    def release(self) -> None:
        """Let go of what `take_over` made: no other call follows."""
        ...


class LocalEngine:
    """One process that holds everything whole."""

    topology = ONE_PROCESS

    def __init__(self, parameters: Mapping[str, nn.Parameter], gradient_home: str = "device") -> None:
        first = next(iter(parameters.values()))
        self.device, self.dtype, self.gradients_on = first.device, first.dtype, gradient_home
        self._parameters = parameters
        self._gradients = Accumulated(list(parameters.values()), gradient_home)

    def take_over(self, loss_module: nn.Module) -> nn.Module:
        return loss_module

    def hold_gradients(self) -> None:
        self._gradients.hold()

    def backward(self, loss: torch.Tensor, accumulation: int) -> None:
        (loss / accumulation).backward()

    def mean(self, value: torch.Tensor) -> float:
        return value.item()

    def value(self, name: str) -> torch.Tensor:
        return self._parameters[name].detach()

    def reached(self) -> list[str]:
        return [name for name, parameter in self._parameters.items() if self._gradients.of(parameter) is not None]

    def clip_norm(self, max_norm: float) -> torch.Tensor:
        return self._gradients.clip_norm(max_norm)

    def round_gradient(self, sweep_round: Round) -> torch.Tensor | None:
        return None if sweep_round[0] is None else self.gradient(sweep_round[0])

    def gradient(self, name: str) -> torch.Tensor:
        gradient = self._gradients.of(self._parameters[name])
        assert gradient is not None
        return gradient

    def destination(self, name: str) -> torch.Tensor:
        return self.value(name)

    def publish(self, sweep_round: Round) -> None:
        """Nothing to do: the weight was written in place."""

    def replace(self, name: str, value: torch.Tensor) -> None:
        parameter = self.value(name)
        if value.data_ptr() != parameter.data_ptr():
            parameter.copy_(value)

    def clear(self) -> None:
        self._gradients.clear()

    def release(self) -> None:
        """Nothing to let go of."""
