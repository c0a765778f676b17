"""Model, engine and optimizer of a run: at the start, or where a checkpoint left them."""

from shlex import quote

import torch

from pcscale.base.held import HeldBase
from pcscale.base.int8 import Int8Base
from pcscale.common.console import console
from pcscale.common.ranks import on_every_rank, on_first_rank
from pcscale.common.units import parse_bytes
from pcscale.config.schema import RunConfig
from pcscale.data.loader import sequence_order
from pcscale.data.tokens import TokenSets
from pcscale.jobs.run import Run
from pcscale.model.compressed import build_compressed
from pcscale.model.loss import Distillation, NextTokenLoss
from pcscale.projection.compression import Base, Compression
from pcscale.projection.engine import Engine
from pcscale.projection.owners import owned_matrices
from pcscale.projection.residency import State
from pcscale.projection.starts import Start, start_tensors
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.run.folder import RunFolder
from pcscale.training.loop import Training
from pcscale.training.state import TrainingState, load_checkpoint
from pcscale.training.teacher import AnyTeacher, CachedTeacher, Teacher


def open_training(run: Run, start: Start, tokens: TokenSets, cached_teacher: CachedTeacher | None) -> Training:
    """The training of a run, ready for its next step; the engine has taken the model over."""
    config, group = run.config, run.group
    teacher: AnyTeacher | None = cached_teacher
    if config.distill is not None and teacher is None:
        teacher = Teacher(run.base, config.distill, run.device, run.base_dtype)
    if config.base_precision == "int8" and group.topology.world_size > 1:
        # The first rank codes the base for all hosts.
        on_first_rank(group, lambda: _int8_base(run))

    def build() -> tuple[NextTokenLoss, ProjectedAdamW]:
        return build_optimizer(run, start, teacher and teacher.distillation)

    # Where the ranks read the base together, one that fails cannot wait for the others.
    loss_module, optimizer = build() if run.base.collective else on_every_rank(group, build)
    state = TrainingState(data=tokens.fingerprint, sequences_per_step=run.sequences_per_step)
    if run.checkpoint is not None:
        state = load_checkpoint(*run.checkpoint, optimizer)
        console.info(f"resuming at step {state.step}")
    return Training(
        config=config,
        folder=run.folder,
        group=group,
        engine=optimizer.engine,
        loss_module=optimizer.engine.take_over(loss_module),
        optimizer=optimizer,
        train_NT=tokens.train_NT,
        validation_MT=tokens.validation_MT,
        state=state,
        teacher=teacher,
    )


def build_optimizer(
    run: Run, start: Start, distillation: Distillation | None = None
) -> tuple[NextTokenLoss, ProjectedAdamW]:
    """The compressed model at its start, with its loss, and the optimizer over it.

    Args:
        distillation: the teacher's share of the loss; None: there is none.

    Raises:
        BudgetError, RunError: pinned_memory or the disk is too small.
    """
    config = run.config
    tensors = start_tensors(run.plan, start, run.base.tensor, run.device)
    # DeepSpeed accumulates gradients itself, and puts the model where its ZeRO stage says.
    gradient_dtype = None if run.engine else getattr(torch, config.gradient_dtype)
    device = torch.device("cpu") if run.engine else run.device
    model = build_compressed(run.plan, tensors, device, run.model_dtype, gradient_dtype)
    del tensors
    if config.gradient_checkpointing:
        # transformers 5.23 renamed it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    engine = _engine(run, model)
    optimizer = ProjectedAdamW(
        Compression(model, run.plan, _frozen_base(run), start, config.method, engine),
        lr=config.learning_rate,
        aux_lr=config.aux_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        projection_rates=config.projection_rates,
        state=state_of(config, run.folder, run.group.topology.rank),
    )
    return NextTokenLoss(model, distillation), optimizer


def state_of(config: RunConfig, folder: RunFolder, rank: int = 0) -> State:
    """The optimizer's state as run.yaml asks for it."""
    return State(
        residency=config.residency,
        folder=folder.records_of(rank),
        pinned_memory=None if config.pinned_memory is None else parse_bytes(config.pinned_memory),
        record_dtype=config.record_dtype,
        moments=config.moments,
        projection_rank=config.rank,
        gradient_home=config.gradient_home,
        seed=config.seed,
    )


def teacher_of(run: Run, tokens: TokenSets) -> CachedTeacher | None:
    """The teacher of a run with cached targets, which are found for every sequence that it trains on.

    Raises:
        RequestError: a file of the cache is missing or was changed, or it lacks some of the sequences.
    """
    config = run.config
    if run.cache is None or config.distill is None:
        return None
    made_with = run.cache.manifest
    more = f"pcscale teach {quote(str(run.folder.settings))} --tokens {tokens.train_NT.numel()}"
    if config.distill.top_k != made_with.top_k:
        more += f" --top-k {made_with.top_k}"
    in_bf16 = made_with.dtype == "bfloat16"
    if in_bf16 != config.bf16:
        more += f" bf16={str(in_bf16).lower()}"
        if config.gradient_dtype == "bfloat16":  # Refused without bf16.
            more += " gradient_dtype=float32"
    seen = sequence_order(len(tokens.train_NT), config.seed, epoch=0)[: config.max_steps * run.sequences_per_step]
    # One by one: together they would be a second copy of the text.
    sequences = (tokens.train_NT[row] for row in seen.numpy())
    return CachedTeacher(run.cache, config.distill, sequences, more, check=run.group.topology.local_rank == 0)


def _engine(run: Run, model: torch.nn.Module) -> Engine | None:
    """DeepSpeed around the model; None: this process holds it."""
    if run.engine is None:
        return None
    from pcscale.distributed.engine import DeepSpeedEngine
    from pcscale.distributed.group import ProcessGroup

    assert isinstance(run.group, ProcessGroup)
    if run.engine.moved_to_stage_1:
        console.info("deepspeed: bf16 at ZeRO stage 0 runs as stage 1, which keeps the weights that pcscale sets")
    return DeepSpeedEngine(model, run.engine, run.group)


def _int8_base(run: Run) -> Int8Base:
    return Int8Base(run.base, run.folder.base_cache, run.manifest.coded_fingerprints if run.manifest else None)


def _frozen_base(run: Run) -> Base:
    """The base as the sweep reads it."""
    config = run.config
    base = _int8_base(run) if config.base_precision == "int8" else run.base
    if config.base_home in ("disk", "zero"):
        return base
    owned = owned_matrices(list(run.plan.matrices), config.rank, run.group.topology)
    return HeldBase(base, run.device if config.base_home == "device" else torch.device("cpu"), owned)
