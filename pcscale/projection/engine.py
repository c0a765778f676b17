"""The engine, which holds the compressed weights and their gradients and runs the model forward and backward.

One process keeps them whole; DeepSpeed may replicate, partition or offload them (distributed/engine.py).
"""

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import nn

from pcscale.common.ledger import GRADIENTS, ledger, placement_of
from pcscale.common.topology import ONE_PROCESS, Topology
from pcscale.projection.owners import Round
from pcscale.storage.host_memory import HostBytes


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
        """Take memory for all gradients before a step of several micro batches, where that is ours to say: born between
        activations they would cut the allocator's free memory into pieces.
        """

    def backward(self, loss: torch.Tensor, accumulation: int) -> None:
        """Accumulate the gradients of one of so many micro batches; with the last they are those of the step."""

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
        """Scale all gradients so that their norm is at most `max_norm`; returns the norm before, a float32 scalar."""
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

    def replace(self, name: str, value: torch.Tensor) -> None:
        """Make a value that every rank has the model's."""

    def clear(self) -> None:
        """Forget the gradients; what was published is the model's from now on."""

    def release(self) -> None:
        """Let go of what `take_over` made: no other call follows."""


class LocalEngine(Engine):
    """One process that holds everything whole: a weight is written in place, and nothing is published or released.

    Args:
        gradient_home: `device` leaves gradients in `parameter.grad`; with `cpu` each is added to a host tensor, and let
            go on the device, as soon as a backward pass has finished it.

    Memory: with `cpu` one gradient of every parameter on the host, in the gradient's dtype; pinned beside a GPU.
    """

    topology = ONE_PROCESS

    def __init__(self, parameters: Mapping[str, nn.Parameter], gradient_home: str = "device") -> None:
        first = next(iter(parameters.values()))
        self.device, self.dtype, self.gradients_on = first.device, first.dtype, gradient_home
        self._parameters = parameters
        self._host: dict[str, torch.Tensor] = {}
        self._buffers: dict[str, HostBytes] = {}
        """Pinned memory for gradients, the same in every step."""
        self._entered: dict[str, tuple[str, int]] = {}
        """Placement and bytes of gradients in the ledger."""
        weakref.finalize(self, _leave_all, self._entered)
        # torch holds a hook out of the garbage collector's sight: one that held this would keep the model for ever.
        finished = weakref.WeakMethod(self._take if gradient_home == "cpu" else self._enter)
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(_call, finished, name))

    def take_over(self, loss_module: nn.Module) -> nn.Module:
        return loss_module

    def hold_gradients(self) -> None:
        for name, parameter in self._parameters.items():
            if self.gradients_on == "device" and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=getattr(parameter, "grad_dtype", None))
                self._enter(name)

    def backward(self, loss: torch.Tensor, accumulation: int) -> None:
        (loss / accumulation).backward()

    def mean(self, value: torch.Tensor) -> float:
        return value.item()

    def value(self, name: str) -> torch.Tensor:
        return self._parameters[name].detach()

    def reached(self) -> list[str]:
        return [name for name in self._parameters if self._gradient(name) is not None]

    def clip_norm(self, max_norm: float) -> torch.Tensor:
        found = [self.gradient(name) for name in self.reached()]
        if not found:
            return torch.zeros(())
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in found]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in found:
            gradient.mul_(scale.to(gradient.device))
        return norm

    def round_gradient(self, sweep_round: Round) -> torch.Tensor | None:
        return None if sweep_round[0] is None else self.gradient(sweep_round[0])

    def gradient(self, name: str) -> torch.Tensor:
        gradient = self._gradient(name)
        assert gradient is not None
        return gradient

    def destination(self, name: str) -> torch.Tensor:
        return self.value(name)

    def replace(self, name: str, value: torch.Tensor) -> None:
        parameter = self.value(name)
        if value.data_ptr() != parameter.data_ptr():
            parameter.copy_(value)

    def clear(self) -> None:
        self._host.clear()
        for name, parameter in self._parameters.items():
            # Those in `parameter.grad` have been cleared by the optimizer, or are zeros that stay.
            if parameter.grad is None and name in self._entered:
                placement, num_bytes = self._entered.pop(name)
                ledger.enter(GRADIENTS, placement, -num_bytes)

    def _gradient(self, name: str) -> torch.Tensor | None:
        return self._parameters[name].grad if self.gradients_on == "device" else self._host.get(name)

    def _enter(self, name: str) -> None:
        """Enter a gradient into the ledger, until all are cleared."""
        if name not in self._entered:
            gradient = self.gradient(name)
            self._entered[name] = (placement_of(gradient.device), gradient.nbytes)
            ledger.enter(GRADIENTS, *self._entered[name])

    def _take(self, name: str) -> None:
        """Move a gradient that a backward pass has finished to the host."""
        parameter = self._parameters[name]
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if name in self._host:
            self._host[name] += gradient.to("cpu")
        elif parameter.is_cuda:
            if name not in self._buffers:
                self._buffers[name] = HostBytes(gradient.nbytes)
            self._host[name] = self._buffers[name].bytes.view(gradient.dtype).view(gradient.shape).copy_(gradient)
        else:
            self._host[name] = gradient
        self._enter(name)


def _leave_all(entered: dict[str, tuple[str, int]]) -> None:
    for placement, num_bytes in entered.values():
        ledger.enter(GRADIENTS, placement, -num_bytes)


def _call(method: "weakref.WeakMethod[Callable[[str], None]]", name: str, parameter: torch.Tensor) -> None:
    if (bound := method()) is not None:
        bound(name)
