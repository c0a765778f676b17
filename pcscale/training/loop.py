"""The training loop: steps, evaluation, metrics, checkpoints, and what to do when something goes wrong."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from pcscale.common.allocator import release_between_stages
from pcscale.common.console import console
from pcscale.common.errors import Interrupted, RunError
from pcscale.common.files import readable_os_errors
from pcscale.common.ledger import ledger
from pcscale.common.ranks import on_every_rank
from pcscale.common.topology import Group
from pcscale.common.units import format_seconds
from pcscale.config.schema import RunConfig
from pcscale.data.loader import step_batches
from pcscale.evaluation.perplexity import mean_loss
from pcscale.projection.engine import Engine
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.run.folder import RunFolder
from pcscale.training.interrupt import StopRequest
from pcscale.training.schedule import rate_factor
from pcscale.training.state import TrainingState, save_checkpoint
from pcscale.training.step import training_step
from pcscale.training.teacher import AnyTeacher
from pcscale.training.trackers import open_trackers


@dataclass
class Training:
    """A run under way, on which `train` works; `loss_module` is the one that the engine gave to call."""

    config: RunConfig
    folder: RunFolder
    group: Group
    engine: Engine
    loss_module: nn.Module
    optimizer: ProjectedAdamW
    train_NT: torch.Tensor
    validation_MT: torch.Tensor
    state: TrainingState
    teacher: AnyTeacher | None = None

    @property
    def tokens_per_step(self) -> int:
        return self.state.sequences_per_step * self.config.sequence_length

    @property
    def moved_bytes(self) -> int:
        """Bytes that this rank has moved so far for sweeps and teacher."""
        return self.optimizer.records.traffic.total + (self.teacher.read_bytes if self.teacher else 0)


def train(training: Training) -> None:
    """Take the steps that are left; the last one is checkpointed.

    Raises:
        Interrupted: the user asked to stop; a checkpoint was written.
        RunError: too many steps in a row without finite loss or gradients, or a full disk.
    """
    config, state, group = training.config, training.state, training.group
    with (
        StopRequest() as stop,
        _metrics(training) as log,
        console.progress("train", (config.max_steps - state.step) * training.tokens_per_step, "tokens") as progress,
    ):
        started, first = time.monotonic(), state.step
        while state.step < config.max_steps:
            row = _take_step(training)
            progress.advance(training.tokens_per_step, _progress_note(row, config))
            if state.step % config.logging_steps == 0 or "eval_loss" in row:
                left = (config.max_steps - state.step) * (time.monotonic() - started) / (state.step - first)
                console.info(f"{_describe(row, training)} · {format_seconds(left)} left")

            def finish_step(row: dict[str, Any] = row) -> None:
                log(row)
                if state.skipped_in_row >= config.max_skipped_steps:
                    raise RunError(
                        f"loss or gradients were not finite in {state.skipped_in_row} steps in a row, up to step "
                        f"{state.step}. Last checkpoint: {training.folder.latest_checkpoint() or 'none'}. "
                        "Lower learning_rate, or look at the data."
                    )

            on_every_rank(group, finish_step)  # A full disk under metrics.jsonl is the first rank's, and ends all.
            last, stopping = state.step == config.max_steps, group.sum([float(stop.asked)])[0] > 0
            if last or stopping or state.step % config.save_steps == 0:
                _save(training)
            if stopping:
                on_every_rank(group, lambda: _interrupt(training))


@contextmanager
def _metrics(training: Training) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield the function that takes a step's row, into metrics.jsonl and trackers; on the first rank alone."""
    if not training.group.topology.is_first:
        yield lambda row: None
        return
    path = training.folder.metrics
    with (
        open_trackers(training.config.report_to, training.folder.path) as trackers,
        readable_os_errors(path),
        path.open("a", encoding="utf-8") as metrics,
    ):

        def log(row: dict[str, Any]) -> None:
            with readable_os_errors(path):
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
            for log_to in trackers:
                log_to(row)

        yield log


def _take_step(training: Training) -> dict[str, Any]:
    config, state = training.config, training.state
    started = time.monotonic()
    state.step += 1
    factor = rate_factor(state.step, config.warmup_steps, config.max_steps)
    for group in training.optimizer.param_groups:
        group["lr"] = config.learning_rate * factor
    batches = step_batches(
        training.train_NT,
        state.step,
        state.sequences_per_step,
        config.per_device_train_batch_size,
        config.seed,
        training.group.topology,
    )
    moved_before = training.moved_bytes
    accumulation, teacher = config.gradient_accumulation_steps, training.teacher
    result = training_step(
        training.loss_module, training.optimizer, batches, accumulation, config.max_grad_norm, teacher
    )
    state.tokens += training.tokens_per_step
    state.skipped_in_row = state.skipped_in_row + 1 if result.skipped else 0
    state.skipped += result.skipped
    state.loss, grad_norm = (None, None) if result.skipped else (result.loss, result.grad_norm)
    row: dict[str, Any] = {
        "step": state.step,
        "tokens": state.tokens,
        "loss": state.loss,
        "learning_rate": config.learning_rate * factor,
        "grad_norm": grad_norm,
        "seconds": time.monotonic() - started,
        "moved_bytes": int(training.group.sum([training.moved_bytes - moved_before])[0]),
    }
    if result.skipped:
        row["skipped"] = True
    if state.step % config.eval_steps == 0 or state.step == config.max_steps:
        held_out = evaluate_now(training)
        state.eval_loss = held_out if math.isfinite(held_out) else None
        row["eval_loss"] = state.eval_loss
    return row


def evaluate_now(training: Training, label: str = "evaluate") -> float:
    """The held-out loss of the compressed model as it is."""
    batch, device = training.config.per_device_train_batch_size, training.engine.device
    with ledger.during("evaluate"):
        loss = mean_loss(training.loss_module, training.validation_MT, batch, label, device, training.group)
    release_between_stages(device)
    return loss


def _save(training: Training) -> None:
    folder = training.folder.checkpoint(training.state.step)
    settings = training.config.model_dump(mode="json")
    with ledger.during("checkpoint"):
        save_checkpoint(folder, training.state, training.optimizer, settings, training.group)
    if training.group.topology.is_first:
        training.folder.prune_checkpoints(training.config.keep_checkpoints)


def _interrupt(training: Training) -> NoReturn:
    raise Interrupted(
        f"interrupted after step {training.state.step}; checkpoint written. Go on with: "
        f"pcscale compress {training.folder.settings} --resume"
    )


def _progress_note(row: dict[str, Any], config: RunConfig) -> str:
    loss = "skipped (not finite)" if row["loss"] is None else f"loss {row['loss']:.4f}"
    return f"step {row['step']}/{config.max_steps} · {loss}"


def _describe(row: dict[str, Any], training: Training) -> str:
    parts = [_progress_note(row, training.config)]
    if "eval_loss" in row:
        held_out = row["eval_loss"]
        parts.append("held-out not finite" if held_out is None else f"held-out {held_out:.4f}")
    parts.append(f"rate {row['learning_rate']:.3g}")
    if row["grad_norm"] is not None:
        parts.append(f"grad norm {row['grad_norm']:.3g}")
    parts.append(f"{training.tokens_per_step / row['seconds']:.0f} tokens/s")
    return " · ".join(parts)
