"""The compressed model under DeepSpeed: replicated, partitioned or offloaded, and still one sweep per step.

DeepSpeed runs forward and backward, reduces gradients and keeps the weights as its ZeRO stage says. Its optimizer does
nothing: it lists the parameters, so that ZeRO partitions them. pcscale takes each gradient whole on its owner, and
publishes the new weight before `engine.step()`, which puts it into the model.

At stage 0 every rank has every gradient after the backward pass, so that a step moves one reduction and one broadcast.
"""

import math
from collections import Counter
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from torch import nn

from pcscale.common.errors import RequestError, one_line
from pcscale.common.ledger import ENGINE, GRADIENTS, WEIGHTS, ledger
from pcscale.distributed.census import held_tensors, stored_bytes
from pcscale.distributed.group import ProcessGroup
from pcscale.distributed.settings import EngineSettings
from pcscale.projection.owners import Round


def check_settings(settings: EngineSettings) -> None:
    """Refuse settings that DeepSpeed itself would refuse, before any work.

    Raises:
        RequestError: DeepSpeed cannot read them.
    """
    try:
        DeepSpeedConfig(settings.values)
    except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:
        raise RequestError(
            f"{settings.file}: DeepSpeed refuses it: {one_line(error)}. See deepspeed_configs/README.md."
        ) from error


class _Listing(torch.optim.Optimizer):
    """An optimizer without state whose step does nothing."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        pass


class DeepSpeedEngine:
    """An `Engine` (projection/engine.py) whose weights and gradients DeepSpeed keeps.

    Until `take_over` the model is whole on every rank: a resumed run publishes its weights into it before DeepSpeed
    takes it apart.

    Memory: the ZeRO stage's (deepspeed_configs/README.md); in a step the gradient that this rank works on, and on
    every rank the weights of a round, until those of the next one are published.
    """

    gradients_on = "engine"

    def __init__(self, model: nn.Module, settings: EngineSettings, group: ProcessGroup) -> None:
        self.topology, self.device = group.topology, group.device
        self._group, self._settings, self._stage = group, settings.values, settings.stage
        self._parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        self.dtype = next(iter(self._parameters.values())).dtype
        self._engine: Any = None
        self._scale = 1.0
        self._destinations: dict[str, torch.Tensor] = {}
        """Weights that this rank publishes next, where the model's own weight is not whole."""
        self._entered = Counter[tuple[str, str]]()
        """Bytes in the ledger by component and placement. The model itself has entered its weights as a whole."""
        self._sent: list[tuple[str, torch.Tensor, Any]] = []
        """Broadcasts under way: while they are, the next matrices are worked on."""

    def take_over(self, loss_module: nn.Module) -> nn.Module:
        self._finish_publishing()
        if self._stage == 3:
            # Part by part: DeepSpeed's own start would put the whole model on each device first.
            deepspeed.zero.Init(module=loss_module, config_dict_or_path=self._settings)
        listing = _Listing(list(self._parameters.values()))
        self._engine, *_ = deepspeed.initialize(model=loss_module, optimizer=listing, config=self._settings)
        self._enter_held()
        return self._engine

    @property
    def _whole(self) -> bool:
        """True where every rank has every weight and its gradient in `parameter` itself."""
        return self._engine is None or self._stage == 0

    @property
    def _in_place(self) -> bool:
        """True where those weights also lie on the device that ranks compute and communicate on."""
        return self._whole and (self._engine is not None or self.device.type == "cpu")

    def hold_gradients(self) -> None:
        """Do nothing: DeepSpeed holds gradients in its own way."""

    def backward(self, loss: torch.Tensor, accumulation: int) -> None:
        self._engine.backward(loss)
        self._enter_held()
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # This only counts the micro batch.

    def mean(self, value: torch.Tensor) -> float:
        return self._group.sum([value.item()])[0] / self.topology.world_size

    def value(self, name: str) -> torch.Tensor:
        self._finish_publishing()
        parameter = self._parameters[name]
        if self._whole:
            return parameter.detach()
        value = deepspeed.utils.safe_get_full_fp32_param(parameter)
        assert value is not None
        return value.view(self._shapes[name])

    def reached(self) -> list[str]:
        return list(self._parameters)

    def clip_norm(self, max_norm: float) -> torch.Tensor:
        squares = [
            torch.linalg.vector_norm(self._local_gradient(parameter), dtype=torch.float32).double().cpu() ** 2
            for parameter in self._parameters.values()
        ]
        square = torch.stack(squares).sum().item()
        # At stage 0 all ranks have the same gradients; the first rank's sum counts, so that all agree to the last bit.
        counts = self._stage > 0 or self.topology.is_first
        norm = self._group.sum([square if counts else 0.0])[0] ** 0.5
        self._scale = min(1.0, max_norm / (norm + 1e-6))
        return torch.tensor(norm)

    def round_gradient(self, sweep_round: Round) -> torch.Tensor | None:
        mine = None
        for rank, name in enumerate(sweep_round):
            if name is not None and rank == self.topology.rank:
                mine = self.gradient(name)
            elif name is not None and not self._whole:
                self._full_gradient(name)  # All ranks take part.
        return mine

    def gradient(self, name: str) -> torch.Tensor:
        return self._full_gradient(name).mul_(self._scale)

    def destination(self, name: str) -> torch.Tensor:
        if self._in_place:
            return self._parameters[name].detach()
        self._destinations[name] = self._empty(name)
        return self._destinations[name]

    def publish(self, sweep_round: Round) -> None:
        self._finish_publishing()
        for rank, name in enumerate(sweep_round):
            if name is not None:
                value = self._parameters[name].detach() if self._in_place else self._destinations.pop(name, None)
                value = self._empty(name) if value is None else value
                under_way = dist.broadcast(value, rank, async_op=True) if self.topology.world_size > 1 else None
                self._sent.append((name, value, under_way))

    def replace(self, name: str, value: torch.Tensor) -> None:
        self._finish_publishing()
        self._set(name, value)

    def clear(self) -> None:
        self._finish_publishing()
        self._engine.step()
        self._scale = 1.0
        self._enter_held()

    def release(self) -> None:
        """Give back DeepSpeed's memory: its objects refer to each other from places that no collector reaches."""
        self._engine.destroy()
        for tensor in held_tensors([self._held_weights(), self._engine.optimizer]):
            storage = tensor.untyped_storage()
            if storage.resizable():
                storage.resize_(0)

    def _held_weights(self) -> list[torch.Tensor]:
        """The tensors that this rank's weights, or its parts of them, lie in."""
        return [getattr(parameter, "ds_tensor", parameter.data) for parameter in self._parameters.values()]

    def _enter_held(self) -> None:
        gradients = [parameter.grad for parameter in self._parameters.values()]
        holders = ((WEIGHTS, self._held_weights()), (GRADIENTS, gradients), (ENGINE, self._engine.optimizer))
        seen: set[int] = set()
        held = Counter(
            {(name, on): size for name, holder in holders for on, size in stored_bytes(holder, seen).items()}
        )
        # The model's own entry of whole weights stays.
        held[WEIGHTS, "host"] -= sum(map(math.prod, self._shapes.values())) * self.dtype.itemsize
        for key in self._entered.keys() | held.keys():
            ledger.enter(*key, held[key] - self._entered[key])
        self._entered = held

    def _finish_publishing(self) -> None:
        """Wait for the weights that were published, and put them into the model."""
        for name, value, under_way in self._sent:
            if under_way is not None:
                under_way.wait()
            self._set(name, value)
        self._sent.clear()

    def _set(self, name: str, value: torch.Tensor) -> None:
        """Give DeepSpeed a new weight, of which it keeps this rank's part."""
        parameter: Any = self._parameters[name]
        if self._whole:
            if value.data_ptr() != parameter.data_ptr():
                parameter.detach().copy_(value)
            return
        if self._stage < 3:
            deepspeed.utils.safe_set_full_fp32_param(parameter, value)
            return
        # Its own call for whole values fails at stage 3 where ranks do not divide them: the last part is padded.
        size = parameter.ds_tensor.numel()
        part = value.flatten()[self.topology.rank * size :][:size]
        deepspeed.utils.safe_set_local_fp32_param(parameter, F.pad(part, (0, size - len(part))))

    def _empty(self, name: str) -> torch.Tensor:
        return torch.empty(self._shapes[name], dtype=self.dtype, device=self.device)

    def _full_gradient(self, name: str) -> torch.Tensor:
        gradient = deepspeed.utils.safe_get_full_grad(self._parameters[name])
        assert gradient is not None
        return gradient.view(self._shapes[name])

    def _local_gradient(self, parameter: Any) -> torch.Tensor:
        """This rank's part of the reduced gradient, flat; at stage 0 all of it."""
        if self._stage == 0:
            return parameter.grad.view(-1)
        if self._stage == 3:
            partition = deepspeed.utils.safe_get_local_grad(parameter).view(-1)
            # The last partition is padded.
            left = parameter.ds_numel - self.topology.rank * partition.numel()
            return partition[: max(0, left)]
        mapping = parameter._hp_mapping
        if mapping is None:
            return torch.zeros(1)
        fragment = mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
        address = mapping.lp_fragment_address
        return fragment[address.start :][: address.numel] if fragment.numel() == parameter.numel() else fragment
