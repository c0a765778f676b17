"""From settings to the things that a run works on: base, plan, device, start, optimizer."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pcscale.base.held import HeldBase
from pcscale.base.int8 import Int8Base
from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import BaseFolder, resolve_base
from pcscale.common.console import console
from pcscale.common.topology import ALONE, Group
from pcscale.common.units import parse_bytes
from pcscale.config.schema import RunConfig
from pcscale.distributed.settings import read_engine_settings, without_replicated_bf16
from pcscale.families.plan import Plan
from pcscale.families.widths import make_plan
from pcscale.memory.components import record_format
from pcscale.model.compressed import build_compressed
from pcscale.model.loss import Distillation, NextTokenLoss
from pcscale.projection.engine import Engine
from pcscale.projection.owners import owned_matrices
from pcscale.projection.residency import Residency
from pcscale.projection.starts import Start, start_tensors
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.run.folder import RunFolder


@dataclass(frozen=True)
class Setup:
    """A run's base and plan, and where and in what precision it computes.

    Attributes:
        group: the processes of the run.
        device: this rank's GPU, or the host's processor.
        base_dtype: what the base's own forward runs in.
        model_dtype: what the compressed model is held and run in.
    """

    source: BaseFolder
    base: MappedBase
    plan: Plan
    group: Group
    device: torch.device
    base_dtype: torch.dtype
    model_dtype: torch.dtype


def prepare(config: RunConfig, expected: dict[str, str] | None = None, group: Group = ALONE) -> Setup:
    """Open the base and plan the compression; nothing is written and no weight is read.

    Args:
        expected: fingerprints that the base must have, from a checkpoint.
    """
    if config.deepspeed is not None and group is not ALONE:
        from pcscale.distributed.engine import check_settings

        settings = read_engine_settings(Path(config.deepspeed), config, group.topology.world_size)
        check_settings(config.deepspeed, settings)
    source = resolve_base(config.base)
    base = _open_base(source, expected, config, group)
    device = torch.device(group.device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    return Setup(
        source=source,
        base=base,
        plan=make_plan(base.family, base.config, config),
        group=group,
        device=device,
        # Without a GPU bfloat16 saves no time in the base's forward.
        base_dtype=torch.bfloat16 if on_gpu and config.bf16 else torch.float32,
        model_dtype=torch.bfloat16 if config.bf16 else torch.float32,
    )


def _open_base(source: BaseFolder, expected: dict[str, str] | None, config: RunConfig, group: Group) -> MappedBase:
    if config.base_home != "zero" or config.deepspeed is None or group is ALONE:
        return MappedBase(source, expected)
    from pcscale.distributed.zero_base import ZeroBase

    settings = read_engine_settings(Path(config.deepspeed), config, group.topology.world_size)
    return ZeroBase(source, expected, settings, group)


def build_training_parts(
    setup: Setup,
    config: RunConfig,
    start: Start,
    folder: RunFolder,
    expected_codes: dict[str, str] | None = None,
    distillation: Distillation | None = None,
) -> tuple[NextTokenLoss, ProjectedAdamW]:
    """The compressed model at its start, with its loss, and the optimizer over it.

    Args:
        expected_codes: fingerprints that the 8-bit base must have, from a checkpoint.
        distillation: how a teacher counts.

    Raises:
        BudgetError, RunError: pinned_memory or the disk is too small.
    """
    tensors = start_tensors(setup.plan, start, setup.base.tensor, setup.device)
    with_engine = config.deepspeed is not None
    # DeepSpeed accumulates gradients itself, and puts the model where its ZeRO stage says.
    gradient_dtype = None if with_engine else getattr(torch, config.gradient_dtype)
    device = torch.device("cpu") if with_engine else setup.device
    model = build_compressed(setup.plan, tensors, device, setup.model_dtype, gradient_dtype)
    del tensors
    if config.gradient_checkpointing:
        # transformers 5.23 renamed it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    optimizer = ProjectedAdamW(
        model,
        setup.plan,
        _frozen_base(setup, config, folder, expected_codes),
        start,
        lr=config.learning_rate,
        aux_lr=config.aux_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        rates_per_matrix=config.projection_rates == "per_matrix",
        project=config.method == "projected",
        form=record_format(config),
        residency=residency_of(config, folder, setup.group.topology.rank),
        gradient_home=config.gradient_home,
        seed=config.seed,
        engine=_engine(setup, config, model),
    )
    return NextTokenLoss(model, distillation), optimizer


def residency_of(config: RunConfig, folder: RunFolder, rank: int = 0) -> Residency:
    pinned_bytes = None if config.pinned_memory is None else parse_bytes(config.pinned_memory)
    return Residency(config.residency, folder.records_of(rank), pinned_bytes)


def _engine(setup: Setup, config: RunConfig, model: nn.Module) -> Engine | None:
    """What holds the model where run.yaml names a DeepSpeed file."""
    if config.deepspeed is None:
        return None
    from pcscale.distributed.engine import DeepSpeedEngine
    from pcscale.distributed.group import ProcessGroup

    assert isinstance(setup.group, ProcessGroup)
    settings, changed = without_replicated_bf16(
        read_engine_settings(Path(config.deepspeed), config, setup.group.topology.world_size)
    )
    if changed:
        console.say("deepspeed: bf16 at ZeRO stage 0 runs as stage 1, which keeps the weights that pcscale sets")
    return DeepSpeedEngine(model, settings, setup.group)


def _frozen_base(
    setup: Setup, config: RunConfig, folder: RunFolder, expected_codes: dict[str, str] | None
) -> MappedBase | Int8Base | HeldBase:
    """The base as the sweep reads it."""
    base = setup.base
    if config.base_precision == "int8":
        base = Int8Base(base, folder.base_cache, expected_codes)
    if config.base_home in ("disk", "zero"):
        return base
    owned = owned_matrices(list(setup.plan.matrices), config.rank, setup.group.topology)
    return HeldBase(base, setup.device if config.base_home == "device" else torch.device("cpu"), owned)
