"""Statistics that calibration collects beside scores, for starts that need more than kept indices.

Legend: H residual size; C channels of one axis; d dropped channels of it.
"""

import torch

SECOND_MOMENT = "second_moment.residual"
"""`[H, H]` float32: the mean of x xᵀ over tokens and norms, x a norm's input over its root mean square."""


def energy_name(norm: str) -> str:
    """The name of a norm's `[H]` float32: the mean square of each channel of its input over its root mean square."""
    return f"energy.{norm}"


def rebuild(moment_CC: torch.Tensor, kept: torch.Tensor, ridge: float = 1e-3) -> torch.Tensor:
    """The matrix that rebuilds dropped channels from kept ones by least squares: `C[d, kept] (C[kept, kept] + λ)⁻¹`.

    λ is the share `ridge` of the diagonal's mean; the result is `[d, kept]` float32, on the moments' device.
    """
    dropped = dropped_of(kept, len(moment_CC))
    within = moment_CC[kept][:, kept].double()
    # Channels that are never active leave no ridge; the ones rebuilt from them are zero.
    within.diagonal().add_((ridge * moment_CC.diagonal().mean()).double().clamp_min(torch.finfo(torch.double).tiny))
    return torch.linalg.solve(within, moment_CC[kept][:, dropped].double()).T.float().contiguous()


def dropped_of(kept: torch.Tensor, size: int) -> torch.Tensor:
    """The indices below `size` that are not kept, in ascending order."""
    dropped = torch.ones(size, dtype=torch.bool, device=kept.device)
    dropped[kept] = False
    return dropped.nonzero()[:, 0]
