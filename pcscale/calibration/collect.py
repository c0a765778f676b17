"""Calibration: scores and second moments of activations, in layer-major passes over the mapped base.

Legend: B batch, T tokens of a sequence, N tokens, H residual size, F ffn size, C channels of either.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pcscale.base.forward import LayerMajorModel
from pcscale.base.mapped import MappedBase
from pcscale.calibration.score import Scores, magnitude_scores, random_scores
from pcscale.calibration.select import KeptIndices
from pcscale.calibration.statistics import SECOND_MOMENT, energy_name, rebuild
from pcscale.common.errors import RequestError
from pcscale.families.axes import FFN, RESIDUAL
from pcscale.families.plan import Plan, kept_name
from pcscale.families.spec import Kind, Weight
from pcscale.storage.index import read_header
from pcscale.storage.reader import read_tensors
from pcscale.storage.writer import ShardWriter, TensorShape, write_tensors


def activation_scores(
    plan: Plan, base: MappedBase, importance: str, batches: list[torch.Tensor], device: torch.device, dtype: torch.dtype
) -> Scores:
    """Channel scores from activations, and the residual stream's second moments.

    Residual channels are scored by the outputs of every norm over the residual stream, all layers together; ffn
    channels per layer by the inputs of the matrix that reads them. `activation` sums absolute values, as published;
    `energy` sums squares, for an ffn channel times the squared norm of the column that reads it.

    Returns:
        The scores, `SECOND_MOMENT`, and the `energy_name` of each norm (calibration/statistics.py).

    Source: Stefaniak et al., arXiv:2506.22255 (activation sums over about 8 M tokens); `energy` sums Wanda's squared
    weight scores over a column, Sun et al., arXiv:2306.11695.
    """
    scores: Scores = {name: torch.zeros(size, device=device) for name, size, _ in plan.kept_axes()}
    hidden_size = plan.base_sizes[RESIDUAL]
    moment_HH = torch.zeros(hidden_size, hidden_size, device=device)
    model = LayerMajorModel(base, device, dtype)
    norms = [weight for weight in base.weights if weight.kind is Kind.NORM and weight.axes == (RESIDUAL,)]
    energies = {energy_name(weight.name): torch.zeros(hidden_size, device=device) for weight in norms}
    total = _SUMS[importance]

    def watch_norm(energy: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        scores[kept_name(RESIDUAL, None)] += total(output)
        x_NH = inputs[0].reshape(-1, hidden_size).float()
        x_NH = x_NH * x_NH.pow(2).mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
        moment_HH.addmm_(x_NH.T, x_NH)
        energies[energy] += x_NH.square().sum(0)

    def watch_ffn(name: str, module: nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
        weight = module.weight.float().square().sum(0) if importance == "energy" else 1.0
        scores[name] += total(inputs[0]) * weight

    for weight in norms:
        model.module(weight.module).register_forward_hook(partial(watch_norm, energy_name(weight.name)))
    for weight in _ffn_readers(base):
        model.module(weight.module).register_forward_pre_hook(partial(watch_ffn, kept_name(FFN, weight.layer)))
    for _ in model.hidden_states(batches, "calibrate"):
        pass  # The hooks see it all.
    tokens = sum(batch.numel() for batch in batches)
    return {
        **{name: score.cpu() for name, score in scores.items()},
        **{name: (energy_H / tokens).cpu() for name, energy_H in energies.items()},
        SECOND_MOMENT: (moment_HH / (tokens * len(norms))).cpu(),
    }


def _ffn_readers(base: MappedBase) -> list[Weight]:
    return [weight for weight in base.weights if weight.kind is Kind.LINEAR and weight.axes[1] == FFN]


def write_rebuilt(
    path: Path | None,
    plan: Plan,
    base: MappedBase,
    kept: KeptIndices,
    batches: list[torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Rebuild dropped ffn channels from kept ones by least squares, layer by layer, into a file for `read_rebuilt`.

    The second moments of a layer must be complete before the next layer is read. Only those batches count, therefore,
    whose hidden states fit the host's budget together.

    Args:
        path: the file to write; None: another rank writes it, and this one takes part in reading the base.

    Memory: the second moments of one layer, `[F, F]` float32, and its solution in float64, on the device; the file is
    bfloat16.
    """
    model = LayerMajorModel(base, device, dtype)
    passes = model.hidden_states(model.one_group(batches), "rebuild ffn channels")
    if path is None:
        list(passes)
        return
    sizes = plan.base_sizes[FFN] - plan.sizes[FFN], plan.sizes[FFN]
    shapes: dict[str, TensorShape] = {
        kept_name(FFN, layer): (torch.bfloat16, sizes) for layer in range(plan.num_layers)
    }
    under_way: dict[str, torch.Tensor] = {}
    with ShardWriter(path, shapes) as writer:

        def solve() -> None:
            for name, moment_FF in under_way.items():
                writer[name].copy_(rebuild(moment_FF, kept[name].to(device)))
            under_way.clear()

        def watch(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if name not in under_way:
                solve()  # The layer before has seen all batches.
                under_way[name] = torch.zeros(plan.base_sizes[FFN], plan.base_sizes[FFN], device=device)
            x_NF = inputs[0].flatten(0, -2).float()
            under_way[name].addmm_(x_NF.T, x_NF)

        for weight in _ffn_readers(base) if sizes[0] else []:
            model.module(weight.module).register_forward_pre_hook(partial(watch, kept_name(FFN, weight.layer)))
        list(passes)
        solve()


def read_rebuilt(path: Path) -> dict[str, torch.Tensor]:
    """The matrices `[d, kept]` that `write_rebuilt` wrote, by set of kept indices; mapped."""
    return read_tensors(path)


_SUMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "activation": lambda x_BTC: x_BTC.abs().sum((0, 1), dtype=torch.float32),
    "energy": lambda x_BTC: x_BTC.float().square().sum((0, 1)),
}
"""Sums over all tokens, by channel."""


def collect_scores(
    plan: Plan,
    base: MappedBase,
    importance: str,
    batches: list[torch.Tensor],
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Scores:
    """Channel scores by the named measure; `activation` and `energy` run the base on the token batches `[B, T]`."""
    if importance == "magnitude":
        return magnitude_scores(plan, base.tensor)
    if importance == "random":
        return random_scores(plan, seed)
    return activation_scores(plan, base, importance, batches, device, dtype)


def write_scores(path: Path, scores: Scores, importance: str, tokens: int) -> None:
    """Write scores to a file for `read_scores`, with the measure and the number of tokens that they come from."""
    write_tensors(path, scores, {"importance": importance, "tokens": str(tokens)})


def read_scores(path: Path) -> Scores:
    """The scores in a file that `pcscale calibrate` wrote, copied into memory."""
    if "importance" not in read_header(path)[1]:
        raise RequestError(f"{path} holds no importance scores. Write it with `pcscale calibrate`.")
    return {name: tensor.clone() for name, tensor in read_tensors(path).items()}
