"""Held-out loss, perplexity and bits per byte of the base and of a compressed model, on the same tokens."""

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from pcscale.base.forward import LayerMajorModel
from pcscale.base.mapped import MappedBase
from pcscale.common.console import console
from pcscale.common.errors import RequestError
from pcscale.common.topology import ALONE, Group
from pcscale.model.loss import NextTokenLoss
from pcscale.run.record import ModelResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class HeldOut:
    """Held-out sequences `[M, T]`, with the number of UTF-8 bytes of the text that they predict."""

    ids_MT: torch.Tensor
    text_bytes: int

    @property
    def predicted_tokens(self) -> int:
        """Tokens with one before them in their sequence."""
        return self.ids_MT.shape[0] * (self.ids_MT.shape[1] - 1)

    def result(self, loss: float, parameters: int, seconds: float) -> ModelResult:
        """The result of a model whose evaluation took so many seconds.

        Raises:
            RequestError: the loss is not finite.
        """
        if not math.isfinite(loss):
            raise RequestError(f"the held-out loss is {loss}: the model's outputs are not finite. Check its weights.")
        return ModelResult(
            loss=loss,
            # A hopeless model's perplexity is past what a float holds.
            perplexity=math.exp(min(loss, 700.0)),
            bits_per_byte=loss * self.predicted_tokens / math.log(2) / max(self.text_bytes, 1),
            tokens=self.predicted_tokens,
            parameters=parameters,
            tokens_per_second=self.predicted_tokens / max(seconds, 1e-9),
        )


def evaluate_base(
    base: MappedBase, parameters: int, held_out: HeldOut, batch_size: int, device: torch.device, dtype: torch.dtype
) -> ModelResult:
    """The base's result, layer-major over its mapped weights. Memory: one layer and the waiting hidden states."""
    started = time.monotonic()
    batches = list(held_out.ids_MT.split(batch_size))
    losses_MT = LayerMajorModel(base, device, dtype).losses(batches, "evaluate base")
    return held_out.result(losses_MT.double().mean().item(), parameters, time.monotonic() - started)


@torch.no_grad()
def mean_loss(
    loss_module: nn.Module,
    ids_MT: torch.Tensor,
    batch_size: int,
    label: str,
    device: torch.device,
    group: Group = ALONE,
) -> float:
    """The mean held-out loss of a `NextTokenLoss`, or an engine's module around one; it stays in its training mode.

    Several ranks share the batches. Each makes equally many calls, since ZeRO-3 gathers weights in them.
    """
    was_training = loss_module.training
    loss_module.eval()
    batches, world_size = ids_MT.split(batch_size), group.topology.world_size
    total = 0.0
    try:
        with console.progress(label, ids_MT.numel(), "tokens") as progress:
            for first in range(0, len(batches), world_size):
                position = first + group.topology.rank
                ids_BT = batches[min(position, len(batches) - 1)]
                weight = len(ids_BT) if position < len(batches) else 0
                total += loss_module(ids_BT.long().to(device)).item() * weight
                progress.advance(sum(batch.numel() for batch in batches[first : first + world_size]))
    finally:
        loss_module.train(was_training)
    return group.sum([total])[0] / len(ids_MT)


def evaluate_model(model: "PreTrainedModel", held_out: HeldOut, batch_size: int, label: str) -> ModelResult:
    """The result of a stock model that is in memory."""
    started = time.monotonic()
    device = next(model.parameters()).device
    loss = mean_loss(NextTokenLoss(model), held_out.ids_MT, batch_size, label, device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return held_out.result(loss, parameters, time.monotonic() - started)
