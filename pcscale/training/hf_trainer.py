"""ProjectedAdamW under the Hugging Face Trainer, on one process: the callback that saves and loads its records."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pcscale.common.errors import RequestError
from pcscale.projection.checkpoint import load_state, save_state
from pcscale.projection.sweep import ProjectedAdamW

PROJECTION_NAME = "projection"


class ProjectionCallback(TrainerCallback):
    """Writes a mergeable pcscale checkpoint into every `checkpoint-N/projection`, and reads it on resume.

    It takes the optimizer that the Trainer gets in `optimizers=(optimizer, None)`.
    """

    def __init__(self, optimizer: ProjectedAdamW) -> None:
        self.optimizer = optimizer

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raises: RequestError: the Trainer has more than one process or DeepSpeed, or gradients are on the host."""
        if self.optimizer.engine.gradients_on != "device":
            raise RequestError(
                "the Trainer clips and clears `parameter.grad` itself, which gradient_home cpu takes away. "
                "Leave gradient_home at device."
            )
        if getattr(args, "deepspeed", None) or args.world_size > 1:
            raise RequestError(
                "ProjectedAdamW runs under the Trainer on one process only. "
                "Use `pcscale compress` for DeepSpeed and more processes."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises: RequestError: the Trainer resumes from a checkpoint that holds no projection."""
        if not state.global_step:
            return
        folder = _projection_folder(args, state)
        if not folder.exists():
            raise RequestError(f"{folder} does not exist, so the projections cannot be resumed. Keep it in output_dir.")
        load_state(folder, self.optimizer)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        save_state(_projection_folder(args, state), state.global_step, self.optimizer)


def _projection_folder(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / PROJECTION_NAME
