"""What each rank does for the benchmark `ranks`; the first one writes what it found as JSON."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import nn

from benchmarks.counters import count_collectives
from pcscale.base.held import HeldBase
from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import resolve_base
from pcscale.calibration.score import random_scores
from pcscale.calibration.select import select
from pcscale.common.allocator import release_freed
from pcscale.common.cache import cache_folder
from pcscale.distributed.engine import DeepSpeedEngine
from pcscale.distributed.group import ProcessGroup
from pcscale.distributed.settings import EngineSettings
from pcscale.distributed.zero_base import ZeroBase
from pcscale.families.plan import PlannedWeight
from pcscale.families.widths import plan_widths
from pcscale.jobs.demo import fetch_smollm2
from pcscale.memory.process import anonymous_bytes
from pcscale.model.compressed import build_compressed
from pcscale.model.loss import NextTokenLoss
from pcscale.projection.compression import Compression
from pcscale.projection.layout import RecordFormat, record_bytes, trainable_values
from pcscale.projection.owners import owned_matrices
from pcscale.projection.residency import State
from pcscale.projection.starts import Start, start_tensors
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.training.step import training_step

WIDTHS = {"hidden_size": 387, "intermediate_size": 1032}
SMALL = RecordFormat("bfloat16", "8bit")
CPU = torch.device("cpu")


def settings(stage: int, bf16: bool = False) -> EngineSettings:
    values = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return EngineSettings(f"stage {stage}", values, moved_to_stage_1=False)


class Parts:
    """SmolLM2-135M and a compressed model at half its size."""

    def __init__(self) -> None:
        self.source = resolve_base(str(fetch_smollm2(cache_folder())))
        self.base = MappedBase(self.source)
        self.plan = plan_widths(self.base.family, self.base.config, **WIDTHS)
        self.start = Start(select(self.plan, random_scores(self.plan, 0)))
        self.model = build_compressed(
            self.plan, start_tensors(self.plan, self.start, self.base.tensor), CPU, torch.float32
        )

    def optimizer(self, base: Any, engine: Any, form: RecordFormat = SMALL) -> ProjectedAdamW:
        compression = Compression(self.model, self.plan, base, self.start, engine=engine)
        state = State("cpu", record_dtype=form.dtype, moments=form.moments, projection_rank=form.rank)
        return ProjectedAdamW(compression, state=state)


def settled_bytes() -> int:
    release_freed()
    return anonymous_bytes()


def touch(optimizer: ProjectedAdamW) -> None:
    """Write to every record: memory that nothing was written to is not there yet."""
    for name in optimizer.records:
        buffer = optimizer.records.residency.read(name)
        buffer.add_(0)
        optimizer.records.residency.write(name, buffer, changed=True)


def held(group: ProcessGroup, home: str) -> float:
    """Anonymous bytes of this rank's records, moments and base."""
    parts = Parts()
    engine = DeepSpeedEngine(parts.model, settings(3), group)
    before = settled_bytes()
    if home == "zero":
        base: Any = ZeroBase(parts.source, None, settings(3), group)
        for name in base.matrix_names:
            base.tensor(name)
    else:
        base = HeldBase(parts.base, CPU, owned_matrices(list(parts.plan.matrices), None, group.topology))
    optimizer = parts.optimizer(base, engine)
    touch(optimizer)
    return settled_bytes() - before


def communicated(group: ProcessGroup) -> dict[str, Any]:
    """Payloads of the second step, by ZeRO stage."""
    counts = count_collectives()
    found: dict[str, Any] = {}
    for stage in range(4):
        parts = Parts()
        engine = DeepSpeedEngine(parts.model, settings(stage), group)
        optimizer = parts.optimizer(parts.base, engine)
        module = engine.take_over(NextTokenLoss(parts.model))
        ids_BT = torch.randint(1000, (1, 64), generator=torch.Generator().manual_seed(group.topology.rank))
        training_step(module, optimizer, [ids_BT], 1, 1.0)
        counts.clear()
        training_step(module, optimizer, [ids_BT], 1, 1.0)
        least = 2 * 4 * parts.plan.parameters  # One reduction and one broadcast, in float32.
        found[str(stage)] = {"bytes": counts.total(), "least_bytes": least, "by_kind": dict(counts)}
    return found


def ours(group: ProcessGroup) -> dict[str, float]:
    """Bytes a value of pcscale's records and moments in host memory."""
    parts = Parts()
    engine = DeepSpeedEngine(parts.model, settings(3), group)
    before = settled_bytes()
    optimizer = parts.optimizer(parts.base, engine)
    touch(optimizer)
    values = sum(map(trainable_values, parts.plan.matrices))
    state = sum(record_bytes(planned, SMALL) for planned in parts.plan.matrices)
    anonymous = settled_bytes() - before
    return {"values": values, "state_bytes": state / values, "anonymous_bytes": anonymous / values}


class PlainProjection(nn.Module):
    """P_out W P_in + A of one frozen matrix, as a module that any framework trains.

    Legend: O, I base sizes; o, i compressed sizes.
    """

    def __init__(self, W_OI: torch.Tensor, planned: PlannedWeight) -> None:
        super().__init__()
        (O, I), (o, i) = W_OI.shape, planned.shape
        self.register_buffer("W_OI", W_OI, persistent=False)
        self.P_oO = nn.Parameter(torch.zeros(o, O)) if o != O else None
        self.P_Ii = nn.Parameter(torch.zeros(I, i)) if i != I else None
        self.A_oi = nn.Parameter(torch.zeros(o, i))

    def forward(self) -> torch.Tensor:
        w_xx = self.W_OI.to(self.A_oi.dtype)
        w_xx = w_xx if self.P_oO is None else self.P_oO @ w_xx
        w_xx = w_xx if self.P_Ii is None else w_xx @ self.P_Ii
        return (w_xx + self.A_oi).float().square().mean()


def plain(group: ProcessGroup) -> dict[str, float]:
    """The same of the same projections under plain DeepSpeed: ZeRO-3, everything offloaded, its CPU Adam, bfloat16."""
    parts = Parts()
    # Copied, so that no page of the file counts on either side.
    base = {planned.name: parts.base.tensor(planned.name).clone() for planned in parts.plan.matrices}
    before = settled_bytes()
    model = nn.ModuleList([PlainProjection(base[planned.name], planned) for planned in parts.plan.matrices])
    values = sum(parameter.numel() for parameter in model.parameters())
    zero = {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": zero}
    adam = DeepSpeedCPUAdam(model.parameters(), lr=1e-4)
    engine, *_ = deepspeed.initialize(model=_Sum(model), optimizer=adam, config=config)
    engine.backward(engine())
    engine.step()
    zero_optimizer = engine.optimizer
    state = [parameter.ds_tensor for parameter in model.parameters()]
    state += zero_optimizer.fp32_partitioned_groups_flat
    state += [tensor for moments in adam.state.values() for tensor in moments.values() if torch.is_tensor(tensor)]
    state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state)
    anonymous = settled_bytes() - before
    return {"values": values, "state_bytes": state_bytes / values, "anonymous_bytes": anonymous / values}


class _Sum(nn.Module):
    def __init__(self, parts: nn.ModuleList) -> None:
        super().__init__()
        self.parts = parts

    def forward(self) -> torch.Tensor:
        return torch.stack([part() for part in self.parts]).sum()


WORK: dict[str, Callable[..., Any]] = {"held": held, "communicated": communicated, "ours": ours, "plain": plain}


def main() -> None:
    output, name, *arguments = sys.argv[1:]
    group = ProcessGroup()
    found = WORK[name](group, *arguments)
    if group.topology.is_first:
        Path(output).write_text(json.dumps(found), encoding="utf-8")
    group.close()


if __name__ == "__main__":
    main()
