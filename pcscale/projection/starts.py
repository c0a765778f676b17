"""Starts: what S is, and the compressed model before the first step.

Legend: O, I base sizes of the out and in side; o, i compressed sizes; H, h the residual stream's; d dropped channels;
b a block of rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce

import torch

from pcscale.calibration.score import ReadTensor, Scores
from pcscale.calibration.select import select
from pcscale.calibration.statistics import SECOND_MOMENT, dropped_of, energy_name, rebuild
from pcscale.common.errors import RequestError
from pcscale.config.schema import REBUILDING_STARTS
from pcscale.families.axes import RESIDUAL
from pcscale.families.plan import Plan, PlannedWeight, kept_name
from pcscale.families.spec import Kind
from pcscale.projection.layout import DELTA_IN, DELTA_OUT, row_blocks, value_shapes
from pcscale.projection.record import FixedTensors, basis_name, scale_name, start_of

TIED_GAIN = 1.1
"""Gain of the last norm where a rotated head is the embedding (found on SmolLM2-135M, and on no other base)."""
_SMALLEST_GAMMA = 1e-3
"""Share of the root mean square of a norm's weight: smaller entries are not divided by."""
RowsOf = Callable[[slice], torch.Tensor | None]
"""Rows of a base weight, or of what its precision loses, in any dtype; None: it loses nothing."""
ReadIn = Callable[[torch.Tensor], torch.Tensor]
"""The in side of a product: of `[x, I]` it makes `[x, i]`."""


@dataclass(frozen=True)
class Start:
    """The beginning of training.

    Attributes:
        fixed: what S is made of.
        norms: weights of norms over the residual stream that are not the kept entries, `[h]` float32 by name.
        rebuilt: by set of kept indices, `[d, kept]`: what kept channels say of each dropped one. It goes into aux,
            beside an S that selects.
        gammas: the base's norm weights that rebuilt residual channels pass through, `[H]` by name.
        moves_aux: whether aux begins elsewhere than at zero, in records that a checkpoint brings.
    """

    fixed: FixedTensors
    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    rebuilt: Mapping[str, torch.Tensor] = field(default_factory=dict)
    gammas: dict[str, torch.Tensor] = field(default_factory=dict)
    moves_aux: bool = False


def selection(plan: Plan, scores: Scores, read: ReadTensor) -> Start:
    """The most important channels, as published: the hard-pruned model."""
    return Start(select(plan, scores))


def rescaled(plan: Plan, scores: Scores, read: ReadTensor) -> Start:
    """The most important channels, with norms that divide by the root mean square of all channels again.

    A norm's weight is multiplied by `sqrt(H e / h)`, e the share of its input's energy that is kept.
    """
    fixed = select(plan, scores)
    kept = fixed[kept_name(RESIDUAL, None)]
    norms = {}
    for norm in _norms(plan):
        energy_H = scores[energy_name(norm)]
        gain = (energy_H[kept].sum() / energy_H.sum() * len(energy_H) / len(kept)).sqrt()
        norms[norm] = read(norm)[kept].float() * gain
    return Start(fixed, norms)


def least_squares(plan: Plan, scores: Scores, read: ReadTensor) -> Start:
    """Norms rescaled, and dropped channels of the residual stream rebuilt from kept ones.

    With C the second moments of the activations a dropped channel is `C[d, kept] C[kept, kept]⁻¹` of the kept ones, up
    to a ridge; where a matrix reads it, that is added to what it reads of them.
    """
    start, name = rescaled(plan, scores, read), kept_name(RESIDUAL, None)
    rebuilt = {name: rebuild(scores[SECOND_MOMENT], start.fixed[name])}
    gammas = {norm: read(norm).float() for norm in _norms(plan)}
    return Start(start.fixed, start.norms, rebuilt, gammas)


def pca(plan: Plan, scores: Scores, read: ReadTensor) -> Start:
    """One rotation of the residual stream onto its main directions; ffn channels are selected.

    The basis P holds the leading eigenvectors of the second moments, turned among themselves to lie closest to the kept
    coordinates (orthogonal Procrustes), which a tied head needs.

    Source: rotation of the residual stream as in SliceGPT, Ashkboos et al., arXiv:2401.15024.
    """
    fixed = select(plan, scores)
    moment_HH, kept = scores[SECOND_MOMENT].double(), fixed[kept_name(RESIDUAL, None)]
    if len(kept) == len(moment_HH):
        return Start(fixed)
    basis_Hh = torch.linalg.eigh(moment_HH).eigenvectors[:, -len(kept) :]
    left, _, right = torch.linalg.svd(basis_Hh[kept].T)
    basis_Hh = basis_Hh @ left @ right
    energy = ((moment_HH @ basis_Hh) * basis_Hh).sum() / moment_HH.trace()
    gain = float((energy * len(moment_HH) / len(kept)).sqrt())
    return rotated(plan, fixed, basis_Hh.float().contiguous(), gain, read)


def rotated(plan: Plan, fixed: FixedTensors, basis_Hh: torch.Tensor, gain: float, read: ReadTensor) -> Start:
    """The start whose residual stream is `x P`, exact but for what the basis P leaves out.

    What reads a norm with weight γ has `diag(γ / g) P` for S, g the root mean square of γ; the norm itself keeps
    `g gain` for every channel, so that what is trained keeps the size it has in the base; `gain` makes up for the
    energy that P leaves out. A head that is the embedding has the embedding's P, and its norm the diagonal of
    `Pᵀ diag(γ) P`, which no P makes exact.
    """
    fixed, norms = fixed | {basis_name(kept_name(RESIDUAL, None)): basis_Hh}, {}
    readers = {planned.weight.reads for planned in plan.weights}
    for norm in _norms(plan):
        gamma_H = read(norm).float()
        if norm in readers:
            mean = gamma_H.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
            fixed[scale_name(norm)] = gamma_H / mean
            norms[norm] = (mean * gain).expand(basis_Hh.shape[1]).clone()
        else:
            norms[norm] = gamma_H @ basis_Hh.square() * (gain * TIED_GAIN)
    return Start(fixed, norms)


STARTS: dict[str, Callable[[Plan, Scores, ReadTensor], Start]] = {
    "selection": selection,
    "rescaled": rescaled,
    "least_squares": least_squares,
    "pca": pca,
    "pca_least_squares": pca,
}
"""With `least_squares` in its name a start also gets what calibration solves for of the ffn."""


def make_start(
    name: str, plan: Plan, scores: Scores, read: ReadTensor, rebuilt: Mapping[str, torch.Tensor] | None = None
) -> Start:
    """The start of that name.

    Args:
        scores: with what calibration leaves beside them (calibration/statistics.py).
        read: gives a base weight as it is stored.
        rebuilt: of dropped ffn channels, as `read_rebuilt` gives them, for starts with `least_squares` in their name.
            Empty: they are added later.

    Raises:
        RequestError: the scores are of another model, or of no activations where the start needs these, or `rebuilt`
            is missing.
    """
    needed = [SECOND_MOMENT, *map(energy_name, _norms(plan))] if name != "selection" else []
    for missing in (entry for entry in needed if entry not in scores):
        raise RequestError(f"start {name} needs {missing}, which these scores lack: calibrate with activations.")
    if rebuilt is None and name in REBUILDING_STARTS:
        raise RequestError(f"start {name} rebuilds ffn channels: give `rebuilt`, from write_rebuilt and read_rebuilt.")
    start = STARTS[name](plan, scores, read)
    return replace(start, rebuilt={**start.rebuilt, **(rebuilt or {})})


def _norms(plan: Plan) -> list[str]:
    """The norms over the residual stream."""
    return [p.name for p in plan.weights if p.weight.kind is Kind.NORM and p.weight.axes == (RESIDUAL,)]


def start_tensors(
    plan: Plan, start: Start, read: ReadTensor, device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """The compressed model before the first step, by name, on the host: kept entries as stored, all else in float32.
    Products are computed on `device`.
    """
    fixed = {name: tensor.to(device) for name, tensor in start.fixed.items()}
    return {planned.name: _start_tensor(planned, start, fixed, read, device) for planned in plan.weights}


def _start_tensor(
    planned: PlannedWeight, start: Start, fixed: FixedTensors, read: ReadTensor, device: torch.device | None
) -> torch.Tensor:
    if planned.name in start.norms:
        return start.norms[planned.name]
    tensor = read(planned.name)
    sides = [start_of(planned, fixed, dim) for dim in range(tensor.ndim)]
    rebuilt = _rebuilt(planned, start, device)
    if rebuilt is None and all(side is None or side.ndim == 1 for side in sides):
        for dim, kept in enumerate(sides):
            tensor = tensor if kept is None else tensor.index_select(dim, kept.to(tensor.device))
        return tensor
    if not planned.is_matrix:  # A bias that is added to a rotated residual stream.
        assert sides[0] is not None
        return tensor.float() @ sides[0].T.cpu()
    reads = [_kept(planned, fixed), rebuilt]
    parts = (_product(planned, fixed, tensor.__getitem__, read, device) for read in reads if read is not None)
    return reduce(torch.Tensor.add_, parts)


def start_aux(
    planned: PlannedWeight,
    start: Start,
    fixed: FixedTensors,
    lost: RowsOf | None,
    stored: RowsOf | None,
    device: torch.device,
) -> torch.Tensor | None:
    """The aux at which the composed weight is that of `start_tensors`, `[o, i]` float32 on the host; None: zero.

    Args:
        fixed: on the device.
        lost: rows of what the base's precision loses (docs/method.md, The base in 8 bits); None: nothing.
        stored: rows of the base weight, of a matrix that `rebuilds`.
    """
    pairs = ((lost, _kept(planned, fixed)), (stored, _rebuilt(planned, start, device)))
    parts = [_product(planned, fixed, rows, read, device) for rows, read in pairs if rows and read]
    return reduce(torch.Tensor.add_, parts) if parts else None


def rebuilds(planned: PlannedWeight, start: Start) -> bool:
    """Whether aux begins with what kept channels say of those that this matrix read beside them."""
    through_norm = planned.projects_in and (planned.weight.axes[1] != RESIDUAL or planned.weight.reads is not None)
    return through_norm and kept_name(planned.weight.axes[1], planned.weight.layer) in start.rebuilt


def _kept(planned: PlannedWeight, fixed: FixedTensors) -> ReadIn:
    """The product `X S_in`."""
    S = start_of(planned, fixed, 1)
    if S is None:
        return lambda X_xI: X_xI
    return (lambda X_xI: X_xI.index_select(1, S)) if S.ndim == 1 else (lambda X_xI: X_xI @ S)


def _rebuilt(planned: PlannedWeight, start: Start, device: torch.device | None) -> ReadIn | None:
    """The dropped channels, read through the kept ones; None: nothing does."""
    if not rebuilds(planned, start):
        return None
    name = kept_name(planned.weight.axes[1], planned.weight.layer)
    kept, factor_di = start.fixed[name], start.rebuilt[name].float()
    dropped = dropped_of(kept, planned.base_shape[1])
    if planned.weight.axes[1] == RESIDUAL and planned.weight.reads is not None:
        gamma_I = start.gammas[planned.weight.reads]
        smallest = _SMALLEST_GAMMA * gamma_I.square().mean().sqrt()
        inverse_i = torch.where(gamma_I[kept].abs() > smallest, gamma_I[kept].reciprocal(), 0.0)
        factor_di = gamma_I[dropped][:, None] * factor_di * inverse_i
    dropped, factor_di = dropped.to(device), factor_di.to(device)
    return lambda X_xI: X_xI.index_select(1, dropped) @ factor_di


def _product(
    planned: PlannedWeight, fixed: FixedTensors, rows_of: RowsOf, read_in: ReadIn, device: torch.device | None
) -> torch.Tensor:
    """`S_out X read_in`, `[o, i]` float32 on the host: rows in one block where the out side is projected."""
    S, value_oi = start_of(planned, fixed, 0), torch.empty(planned.shape)
    for rows in row_blocks(planned):
        found_bI = rows_of(rows)
        assert found_bI is not None
        X_bI = found_bI.to(device, torch.float32)
        if S is not None:
            X_bI = X_bI.index_select(0, S) if S.ndim == 1 else S @ X_bI
        value_oi[rows if S is None else slice(None)] = read_in(X_bI).cpu()
    return value_oi


def random_factors(planned: PlannedWeight, rank: int | None, key: int) -> dict[str, torch.Tensor]:
    """The U of a low rank, by name; with a whole D nothing.

    D of low rank is U V with V zero. U is normal with variance 1 / rank: an entry of D then moves by about the learning
    rate in a step of Adam, as it does when D is whole.
    """
    generator = torch.Generator().manual_seed(key)
    return {
        name: torch.randn(shape, generator=generator) * (rank or 1) ** -0.5
        for name, shape in value_shapes(planned, rank).items()
        if name in (DELTA_OUT[1], DELTA_IN[1])
    }
