"""One optimizer step: forward and backward over the micro batches, clip, sweep."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from pcscale.common.allocator import release_between_stages
from pcscale.common.ledger import ledger
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.training.teacher import AnyTeacher


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step: its mean loss before the update, the norm of the gradients before clipping, and whether
    the update was skipped because one of them was not finite.
    """

    loss: float
    grad_norm: float
    skipped: bool


def training_step(
    loss_module: nn.Module,
    optimizer: ProjectedAdamW,
    micro_batches: Iterable[torch.Tensor],
    accumulation: int,
    max_grad_norm: float,
    teacher: AnyTeacher | None = None,
) -> StepResult:
    """Train on one batch, with several ranks on each one's part of it.

    Args:
        micro_batches: `accumulation` of them, token ids `[B, T]`, equally large.
        teacher: gives the targets of all of them beforehand.
    """
    engine = optimizer.engine
    total = torch.zeros((), device=engine.device)
    if accumulation > 1:
        engine.hold_gradients()
    batches = list(micro_batches)
    targets: list[tuple[torch.Tensor, ...]] = [() for _ in batches]
    if teacher is not None:
        with ledger.during("teach"):
            targets = teacher.targets(batches)
        release_between_stages(engine.device)
    for position, ids_BT in enumerate(batches):
        with ledger.during("forward"):
            loss = loss_module(ids_BT.to(engine.device), *(values.to(engine.device) for values in targets[position]))
        targets[position] = ()  # Not needed again.
        with ledger.during("backward"):
            engine.backward(loss, accumulation)
        total += loss.detach() / accumulation
        del loss
        # Else holes between freed activations grow with every micro batch.
        release_between_stages(engine.device)
    mean = engine.mean(total)
    with ledger.during("sweep"):
        grad_norm = optimizer.clip_grad_norm_(max_grad_norm)
        skipped = not (math.isfinite(mean) and math.isfinite(grad_norm.item()))
        if not skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=accumulation == 1)
    release_between_stages(engine.device)
    return StepResult(mean, grad_norm.item(), skipped)
