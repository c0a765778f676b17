"""Where the gradients of the compressed weights accumulate: in `parameter.grad`, or in host memory."""

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from pcscale.common.errors import RequestError
from pcscale.common.ledger import GRADIENTS, ledger, placement_of
from pcscale.storage.host_memory import HostBytes

GRADIENT_HOMES = ("device", "cpu")


class Accumulated:
    """The accumulated gradients of a model.

    With home `cpu` each parameter's gradient is added to a host tensor, and let go on the device, as soon as a backward
    pass has finished it.

    Args:
        parameters: leaves of the model.
        home: `device` or `cpu`.

    Memory: with `cpu` one gradient of every parameter on the host, in the gradient's dtype; pinned beside a GPU.
    """

    def __init__(self, parameters: list[nn.Parameter], home: str) -> None:
        if home not in GRADIENT_HOMES:
            raise RequestError(f"gradient_home is {home!r}: expected one of {', '.join(GRADIENT_HOMES)}.")
        self.home = home
        self._parameters = parameters
        self._host: dict[int, torch.Tensor] = {}
        self._buffers: dict[int, HostBytes] = {}
        self._entered: dict[int, tuple[str, int]] = {}
        weakref.finalize(self, _leave_all, self._entered)
        # torch holds a hook out of the garbage collector's sight: one that held this would keep the model for ever.
        finished = weakref.WeakMethod(self._take if home == "cpu" else self._enter)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(partial(_call, finished))

    def _enter(self, parameter: torch.Tensor) -> None:
        """Say that a gradient is there, until all are cleared."""
        gradient = self.of(parameter)
        if id(parameter) not in self._entered and gradient is not None:
            self._entered[id(parameter)] = (placement_of(gradient.device), gradient.numel() * gradient.element_size())
            ledger.enter(GRADIENTS, *self._entered[id(parameter)])

    def hold(self) -> None:
        """Have a zero gradient where a backward pass would make a new one.

        With several micro batches they are there at the peak anyway; born between activations they would cut the
        allocator's free memory into pieces.
        """
        if self.home == "device":
            for parameter in self._parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter, dtype=getattr(parameter, "grad_dtype", None))
                    self._enter(parameter)

    def _take(self, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        total = self._host.get(id(parameter))
        if total is not None:
            total += gradient.to("cpu")
        elif parameter.is_cuda:
            self._host[id(parameter)] = self._buffer(parameter, gradient).copy_(gradient)
        else:
            self._host[id(parameter)] = gradient
        self._enter(parameter)

    def _buffer(self, parameter: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Pinned memory for a parameter's gradient, the same in every step."""
        if id(parameter) not in self._buffers:
            self._buffers[id(parameter)] = HostBytes(like.numel() * like.element_size())
        return self._buffers[id(parameter)].bytes.view(like.dtype).view(like.shape)

    def of(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """A parameter's gradient where it lies; None: no backward pass has reached the parameter."""
        return parameter.grad if self.home == "device" else self._host.get(id(parameter))

    def clip_norm(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients, in place, so that their norm is at most `max_norm`.

        Returns:
            The norm before, a float32 scalar whatever the gradients' dtype.
        """
        found = [gradient for gradient in map(self.of, self._parameters) if gradient is not None]
        if not found:
            return torch.zeros(())
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in found]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in found:
            gradient.mul_(scale.to(gradient.device))
        return norm

    def clear(self) -> None:
        """Forget the gradients that are on the host; those in `parameter.grad` have been cleared, or are zero."""
        self._host.clear()
        for parameter in self._parameters:
            if parameter.grad is None and id(parameter) in self._entered:
                home, num_bytes = self._entered.pop(id(parameter))
                ledger.enter(GRADIENTS, home, -num_bytes)


def _leave_all(entered: dict[int, tuple[str, int]]) -> None:
    for home, num_bytes in entered.values():
        ledger.enter(GRADIENTS, home, -num_bytes)


def _call(method: "weakref.WeakMethod[Callable[[torch.Tensor], None]]", parameter: torch.Tensor) -> None:
    if (bound := method()) is not None:
        bound(parameter)
