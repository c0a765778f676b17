"""The state of a run that the next step depends on, as a checkpoint, and back."""

import base64
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pcscale.common.errors import RequestError
from pcscale.common.files import read_json
from pcscale.common.topology import ALONE, Group
from pcscale.projection.checkpoint import read_state, save_state
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.run.manifest import TRAINER_NAME, Manifest


@dataclass
class TrainingState:
    """The progress of a run. The data position is the step itself: batches are a pure function of it.

    Attributes:
        step: optimizer steps taken, skipped ones included.
        skipped_in_row, skipped: steps without an update, just now and in all.
        loss, eval_loss: the last known ones; None before the first.
        data: fingerprint of the token sets.
        sequences_per_step: what a step sees, over all ranks.
    """

    step: int = 0
    tokens: int = 0
    skipped_in_row: int = 0
    skipped: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    data: str = ""
    sequences_per_step: int = 0


def save_checkpoint(
    folder: Path, state: TrainingState, optimizer: ProjectedAdamW, settings: dict[str, Any], group: Group = ALONE
) -> None:
    """Write a checkpoint of a run, visible only when it is whole; `settings` are run.yaml's, for the model card."""
    trainer = asdict(state) | {"rng": _random_states(), "settings": settings}
    save_state(folder, state.step, optimizer, trainer, group)


def check_text(folder: Path, found: str) -> None:
    """Refuse to go on with a checkpoint of other text than the token sets with the fingerprint `found`."""
    if _read_trainer(folder).get("data") != found:
        raise RequestError(
            "the training or held-out text is not what this run began with (its fingerprint differs). "
            "Put the files back, or start a new run."
        )


def check_batch(folder: Path, batch_size: int, accumulation: int, world_size: int) -> None:
    """Refuse to go on where a step would see more or fewer sequences than it did."""
    before = _read_trainer(folder).get("sequences_per_step")
    now = batch_size * accumulation * world_size
    if before != now:
        raise RequestError(
            f"a step would see {now} sequences ({batch_size} × {accumulation} on {world_size} processes), "
            f"the run began with {before}. "
            "Set gradient_accumulation_steps so that the product is the same."
        )


def load_checkpoint(folder: Path, manifest: Manifest, optimizer: ProjectedAdamW) -> TrainingState:
    """Put a checkpoint's state into the optimizer and its model; a file that is missing or was changed is refused."""
    trainer = _read_trainer(folder)
    try:
        state = TrainingState(**{key: trainer[key] for key in asdict(TrainingState())})
        random_states = trainer["rng"]
    except (KeyError, TypeError) as error:
        raise RequestError(f"{folder / TRAINER_NAME} lacks {error}: the file was changed.") from None
    read_state(optimizer, folder, manifest)
    _restore_random_states(random_states)
    return state


def _read_trainer(folder: Path) -> dict[str, Any]:
    trainer = read_json(folder / TRAINER_NAME)
    return trainer if isinstance(trainer, dict) else {}


def _random_states() -> dict[str, str]:
    """torch's generators; nothing else here draws random numbers."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(bytes(state.tolist())).decode() for name, state in states.items()}


def _restore_random_states(states: dict[str, str]) -> None:
    restore = {"cpu": torch.set_rng_state, "cuda": torch.cuda.set_rng_state}
    for name, text in states.items():
        if name == "cpu" or torch.cuda.is_available():
            restore[name](torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8))
