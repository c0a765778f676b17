"""Calibration: activation scores and second moments, in one layer-major pass over the mapped base.

Legend: N tokens, H residual size, I ffn size.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from pcscale.base.forward import LayerMajorModel
from pcscale.base.mapped import MappedBase
from pcscale.common.errors import RequestError
from pcscale.families.axes import FFN, RESIDUAL
from pcscale.families.plan import Plan, kept_name
from pcscale.families.spec import Kind
from pcscale.importance.score import Scores, magnitude_scores, random_scores
from pcscale.storage.index import read_header
from pcscale.storage.reader import TensorReader
from pcscale.storage.writer import write_tensors

SECOND_MOMENT = "second_moment.residual"


def activation_scores(
    plan: Plan, base: MappedBase, batches: list[torch.Tensor], device: torch.device, dtype: torch.dtype
) -> Scores:
    """Sums of absolute activations, and the residual stream's second moments.

    Residual channels are scored by the outputs of every norm over the residual stream, all layers together; ffn
    channels per layer by what enters the matrix that reads them. `second_moment.residual` `[H, H]` float32 is the mean
    of x xᵀ over tokens and norms, with x a norm's input divided by its root mean square (each norm counts alike).

    Source: method as published by Stefaniak et al., arXiv:2506.22255 (activation sums over about 8 M tokens).
    """
    scores: Scores = {name: torch.zeros(size, device=device) for name, size, _ in plan.kept_axes()}
    hidden_size = base.config["hidden_size"]
    moment_HH = torch.zeros(hidden_size, hidden_size, device=device)
    model = LayerMajorModel(base, device, dtype)
    norms = [weight for weight in base.weights if weight.kind is Kind.NORM and weight.axes == (RESIDUAL,)]

    def watch_norm(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        scores[kept_name(RESIDUAL, None)] += _absolute_sum(output)
        x_NH = inputs[0].reshape(-1, hidden_size).float()
        x_NH = x_NH * x_NH.pow(2).mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
        moment_HH.addmm_(x_NH.T, x_NH)

    def watch_ffn(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def watch(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            scores[name] += _absolute_sum(inputs[0])

        return watch

    for weight in norms:
        model.module(weight.module).register_forward_hook(watch_norm)
    for weight in base.weights:
        if weight.kind is Kind.LINEAR and weight.axes[1] == FFN:
            hook = watch_ffn(kept_name(FFN, weight.layer))
            model.module(weight.module).register_forward_pre_hook(hook)
    for _ in model.hidden_states(batches, "calibrate"):
        pass  # The hooks have seen all there is to see.
    tokens = sum(batch.numel() for batch in batches)
    return {name: score.cpu() for name, score in scores.items()} | {
        SECOND_MOMENT: (moment_HH / (tokens * len(norms))).cpu()
    }


def _absolute_sum(activation: torch.Tensor) -> torch.Tensor:
    return activation.abs().sum(tuple(range(activation.ndim - 1)), dtype=torch.float32)


def collect_scores(
    plan: Plan,
    base: MappedBase,
    importance: str,
    batches: list[torch.Tensor],
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Scores:
    """Scores of the named kind; only `activation` looks at the token batches `[B, T]`."""
    if importance == "magnitude":
        return magnitude_scores(plan, base.tensor)
    if importance == "random":
        return random_scores(plan, seed)
    return activation_scores(plan, base, batches, device, dtype)


def write_scores(path: Path, scores: Scores, importance: str, tokens: int) -> None:
    write_tensors(path, scores, {"importance": importance, "tokens": str(tokens)})


def read_scores(path: Path) -> Scores:
    """The scores in a file that `pcscale calibrate` wrote, copied into memory."""
    entries, metadata = read_header(path)
    if "importance" not in metadata:
        raise RequestError(f"{path} holds no importance scores. Write it with `pcscale calibrate`.")
    reader = TensorReader(entries)
    return {name: reader.tensor(name).clone() for name in entries}
