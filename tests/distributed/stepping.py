"""Optimizer steps of a tiny compression under DeepSpeed, as each rank takes them."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pcscale.config.load import check_values
from pcscale.distributed.settings import EngineSettings, read_engine_settings
from pcscale.model.loss import NextTokenLoss
from pcscale.training.step import training_step
from tests.projection.parts import Compression, token_batches
from tests.reference import Rates, Weights
from tests.tiny import build_base

RATES = Rates()
STEPS = 3


class Case(NamedTuple):
    """One cell of the grid."""

    stage: int
    offload: bool
    base_home: str
    accumulation: int
    base: str
    bf16: bool = False

    @property
    def zero(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage}
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.offload and self.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
        return zero


@dataclass
class Stepped:
    """What a rank saw, and what it holds.

    Attributes:
        weights: the compressed model's, whole.
        records: the values of this rank's records by matrix and part.
    """

    losses: list[float]
    norms: list[float]
    weights: Weights
    records: dict[tuple[str, str], torch.Tensor]


def build_bases(folder: Path) -> dict[str, Path]:
    """By name. What `odd` is cut to, two ranks cannot share evenly."""
    return {
        "tied": build_base(folder / "tied", "llama", True),
        "untied": build_base(folder / "untied", "llama", False),
        "odd": build_base(folder / "odd", "mistral", False),
    }


def compression_of(base: str, folder: Path) -> Compression:
    return Compression.of(folder, **({"hidden_size": 21, "intermediate_size": 33} if base == "odd" else {}))


def steps_of(micro_batches: int) -> list[list[torch.Tensor]]:
    """Of all ranks: so many micro batches a step."""
    batches = token_batches(STEPS * micro_batches)
    return [batches[step * micro_batches : (step + 1) * micro_batches] for step in range(STEPS)]


def settings_of(case: Case, folder: Path, world_size: int) -> EngineSettings:
    """DeepSpeed's, filled in as a run's."""
    file = folder / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": case.zero}))
    values = {
        "base": "tiny",
        "output": "run",
        "data": {"train": "text"},
        "bf16": case.bf16,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": case.accumulation,
    }
    return read_engine_settings(str(file), check_values(values, "test"), world_size)


def step_each(cases: Iterable[Case], folders: dict[str, Path]) -> dict[Case, Stepped]:
    """On one rank: take the steps of every case."""
    from pcscale.distributed.group import ProcessGroup

    group = ProcessGroup()
    found = {case: _step(case, folders[case.base], group) for case in cases}
    group.close()
    return found


def _step(case: Case, folder: Path, group: Any) -> Stepped:
    from pcscale.base.resolve import BaseFolder
    from pcscale.distributed.engine import DeepSpeedEngine
    from pcscale.distributed.zero_base import ZeroBase

    rank, world_size = group.topology.rank, group.topology.world_size
    own = folder / f"{world_size}-{rank}"
    own.mkdir(exist_ok=True)
    settings = settings_of(case, own, world_size)
    compression = compression_of(case.base, folder)
    base = compression.base
    if case.base_home == "zero":
        base = ZeroBase(BaseFolder(folder, "tiny", None), None, settings.zero, group)
    model = compression.model(torch.bfloat16 if case.bf16 else torch.float32)
    engine = DeepSpeedEngine(model, settings, group)
    optimizer = compression.optimizer(model, base=base, engine=engine)
    module = _Spoilt(engine.take_over(NextTokenLoss(model)))
    # A step whose loss is not finite on one rank is skipped by all, and leaves nothing behind.
    module.spoil = rank == world_size - 1
    batches = steps_of(case.accumulation * world_size)
    skipped = training_step(module, optimizer, batches[0][rank::world_size], case.accumulation, RATES.max_grad_norm)
    assert skipped.skipped
    module.spoil = False
    results = [
        training_step(module, optimizer, step[rank::world_size], case.accumulation, RATES.max_grad_norm)
        for step in batches
    ]
    return Stepped(
        [result.loss for result in results],
        [result.grad_norm for result in results],
        {name: engine.value(name).float().clone() for name in sorted(dict(model.named_parameters()))},
        {
            (name, part): trained.value.float()
            for name, record in optimizer.records.items()
            for part, trained in record.parts.items()
        },
    )


class _Spoilt(nn.Module):
    """A loss that is no number while `spoil` is set."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.spoil = module, False

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.module(ids_BT) * (torch.nan if self.spoil else 1.0)
