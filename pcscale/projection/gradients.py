"""Where the gradients of the compressed weights accumulate: in `parameter.grad`, or in host memory."""

import torch
from torch import nn

from pcscale.storage.host_memory import HostBytes

GRADIENT_HOMES = ("device", "cpu")


class Accumulated:
    """The accumulated gradients of a model.

    With home `cpu` each parameter's gradient is added to a host tensor, and let go on the device, as soon as a backward
    pass has finished it; they are scaled when they are fetched.

    Args:
        parameters: leaves of the model.
        home: `device` or `cpu`.

    Memory: with `cpu` one gradient of every parameter on the host, in the gradient's dtype.
    """

    def __init__(self, parameters: list[nn.Parameter], home: str) -> None:
        assert home in GRADIENT_HOMES
        self._parameters = parameters
        self._on_host = home == "cpu"
        self._host: dict[int, torch.Tensor] = {}
        self._scale = 1.0
        if self._on_host:
            self._buffers: dict[int, HostBytes] = {}
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self._take)

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

    def _buffer(self, parameter: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Pinned memory for a parameter's gradient, the same in every step."""
        if id(parameter) not in self._buffers:
            self._buffers[id(parameter)] = HostBytes(like.numel() * like.element_size())
        return self._buffers[id(parameter)].bytes.view(like.dtype).view(like.shape)

    def of(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """Where it lies, not yet scaled; None: no backward pass has reached the parameter."""
        return self._host.get(id(parameter)) if self._on_host else parameter.grad

    def rows(self, parameter: nn.Parameter, rows: slice) -> torch.Tensor:
        """Some rows of a parameter's gradient, on its device."""
        gradient = self.of(parameter)
        assert gradient is not None
        if not self._on_host:
            return gradient[rows]
        return gradient[rows].to(parameter.device) * self._scale

    def clip_norm(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their norm is at most `max_norm`; returns the norm before, float32."""
        if not self._on_host:
            return torch.nn.utils.clip_grad_norm_(self._parameters, max_norm)
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in self._host.values()]
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        self._scale = min(1.0, max_norm / (norm.item() + 1e-6))
        return norm

    def clear(self) -> None:
        """Forget the gradients of this step."""
        self._host.clear()
        self._scale = 1.0
