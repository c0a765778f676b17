"""One optimizer step of SmolLM2-135M cut to half: `ProjectedAdamW` against `torch.optim.AdamW` on the same compressed
model and batch, in one process, alternating; medians. The predicted ratio is (train + sweep) / train in FLOPs."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.report import Row
from benchmarks.shapes import SMOLLM2_HALF
from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import resolve_base
from pcscale.calibration.score import random_scores
from pcscale.calibration.select import select
from pcscale.common.cache import cache_folder
from pcscale.families.widths import plan_widths
from pcscale.jobs.demo import fetch_smollm2
from pcscale.model.compressed import build_compressed
from pcscale.model.loss import NextTokenLoss
from pcscale.projection.compression import Compression
from pcscale.projection.costs import sweep_flops
from pcscale.projection.starts import Start, start_tensors
from pcscale.projection.sweep import ProjectedAdamW

REPEATS = 5
SEQUENCE_LENGTH = 256


def half_of_smollm2() -> tuple[MappedBase, NextTokenLoss, ProjectedAdamW]:
    """The base, and the model at half of its parameters with its optimizer."""
    base = MappedBase(resolve_base(str(fetch_smollm2(cache_folder()))))
    plan = plan_widths(base.family, base.config, **SMOLLM2_HALF)
    start = Start(select(plan, random_scores(plan, seed=0)))
    tensors = start_tensors(plan, start, base.tensor)
    loss_module = NextTokenLoss(build_compressed(plan, tensors, torch.device("cpu"), torch.float32))
    return base, loss_module, ProjectedAdamW(Compression(loss_module.model, plan, base, start), lr=1e-6)


def run(scratch: Path) -> list[Row]:
    base, loss_module, projected = half_of_smollm2()
    plan = projected.plan
    plain = torch.optim.AdamW(loss_module.parameters(), lr=1e-6, fused=True)
    flops_of_sweep = sum(sweep_flops(plan))
    rows: list[Row] = []
    for batch_size in (2, 4, 16):
        ids_BT = torch.randint(base.config["vocab_size"], (batch_size, SEQUENCE_LENGTH))
        backward: list[float] = []
        steps: dict[str, list[float]] = {"projected": [], "plain": []}
        for _ in range(REPEATS):
            for name, optimizer in (("projected", projected), ("plain", plain)):
                backward.append(_seconds(lambda ids=ids_BT: loss_module(ids).backward()))
                steps[name].append(_seconds(optimizer.step))
                optimizer.zero_grad(set_to_none=True)
        train, sweep, adamw = (statistics.median(times) for times in (backward, steps["projected"], steps["plain"]))
        train_flops = plan.train_flops_per_token(SEQUENCE_LENGTH) * ids_BT.numel()
        rows += [
            (
                f"{ids_BT.numel()} tokens: forward and backward / sweep / AdamW's step",
                f"{train:.2f} / {sweep:.2f} / {adamw:.2f} s",
                "",
            ),
            (
                f"{ids_BT.numel()} tokens: whole step, ProjectedAdamW over AdamW",
                f"{(train + sweep) / (train + adamw):.2f}",
                f"{(train_flops + flops_of_sweep) / train_flops:.2f} predicted by FLOPs",
            ),
        ]
    rate = train_flops / train
    rows.append(("FLOPs a second: forward and backward", f"{rate / 1e9:.0f} G", ""))
    rows.append(
        ("FLOPs a second: sweep", f"{flops_of_sweep / sweep / 1e9:.0f} G", f"{flops_of_sweep / 1e12:.3f} T a sweep")
    )
    return rows


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
