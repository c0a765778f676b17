"""One AdamW update of one tensor, through torch's own fused kernel."""

import torch
from torch.optim.adamw import adamw

from pcscale.projection.record import Trained


def update(
    trained: Trained,
    gradient: torch.Tensor,
    steps: int,
    rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> None:
    """Update a float32 value and its moments in place, in one pass over memory.

    Args:
        gradient: float32, in the value's shape and on its device.
        steps: updates made before this one.
        weight_decay: decoupled: the value shrinks by `rate * weight_decay` of itself.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101.
    """
    adamw(
        [trained.value],
        [gradient],
        [trained.exp_avg],
        [trained.exp_avg_sq],
        [],
        [torch.tensor(float(steps), device=trained.value.device)],
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=rate,
        weight_decay=weight_decay,
        eps=epsilon,
        maximize=False,
    )
