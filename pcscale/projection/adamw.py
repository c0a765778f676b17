"""One AdamW update of one tensor, in whatever precision it is kept, through torch's own fused kernel."""

from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw

from pcscale.projection.record import Moment, Trained
from pcscale.projection.rounding import round_stochastically
from pcscale.storage.blockwise import Blockwise

CPU_CHUNK_VALUES, GPU_CHUNK_VALUES = 2**18, 2**24
"""Values that are updated at a time where they are kept in fewer bits: what fits a processor's cache, or enough to keep
a GPU busy. The result does not depend on it."""


@dataclass(frozen=True)
class AdamW:
    """The settings of one update, `updates` of them made before.

    Decay is decoupled: a value moves by `rate * weight_decay` of itself towards where it began.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101.
    """

    updates: int
    rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float


def update(
    trained: Trained, gradient: torch.Tensor, settings: AdamW, key: int = 0, start: torch.Tensor | None = None
) -> None:
    """Update a value and its moments in place.

    Args:
        gradient: in the value's shape, of any floating-point dtype; from another device it comes a chunk at a time.
        key: of the stochastic rounding where the value is kept in bfloat16.
        start: what weight decay pulls towards; None: zero.

    Memory: with values or moments in fewer than 32 bits, float32 copies of one chunk at a time.
    """
    exact = (trained.value, trained.exp_avg, trained.exp_avg_sq, gradient)
    here = gradient.device == trained.value.device
    if here and start is None and all(isinstance(p, torch.Tensor) and p.dtype == torch.float32 for p in exact):
        _fused(trained.value, gradient, _float(trained.exp_avg), _float(trained.exp_avg_sq), settings)
        return
    flat, flat_gradient = trained.value.view(-1), gradient.reshape(-1)
    chunk = CPU_CHUNK_VALUES if flat.device.type == "cpu" else GPU_CHUNK_VALUES
    for first in range(0, len(flat), chunk):
        last = min(first + chunk, len(flat))
        value, exp_avg, exp_avg_sq = (
            _float(_part(stored, first, last)) for stored in (flat, trained.exp_avg, trained.exp_avg_sq)
        )
        _fused(value, flat_gradient[first:last].to(value.device, torch.float32), exp_avg, exp_avg_sq, settings)
        if start is not None:
            value.add_(start.view(-1)[first:last], alpha=settings.rate * settings.weight_decay)
        for stored, moment in ((trained.exp_avg, exp_avg), (trained.exp_avg_sq, exp_avg_sq)):
            if isinstance(stored, Blockwise):
                stored.part(first, last).encode(moment)
        if flat.dtype == torch.bfloat16:
            round_stochastically(value, key, first, flat[first:last])


def _part(stored: Moment, first: int, last: int) -> Moment:
    return stored.part(first, last) if isinstance(stored, Blockwise) else stored.view(-1)[first:last]


def _float(stored: Moment) -> torch.Tensor:
    """Float32 values: a view where they are kept so."""
    return stored.decode() if isinstance(stored, Blockwise) else stored.float()


def _fused(
    value: torch.Tensor, gradient: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, settings: AdamW
) -> None:
    step = torch.tensor(float(settings.updates), device=value.device)
    adamw(
        *([value], [gradient], [exp_avg], [exp_avg_sq], [], [step]),
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=settings.betas[0],
        beta2=settings.betas[1],
        lr=settings.rate,
        weight_decay=settings.weight_decay,
        eps=settings.epsilon,
    )
