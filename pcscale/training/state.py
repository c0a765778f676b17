"""Everything that the next step depends on, as a checkpoint, and back."""

import base64
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pcscale.base.mapped import MappedBase
from pcscale.common.errors import RequestError
from pcscale.common.files import (
    empty_folder,
    publish_folder,
    read_json,
    readable_os_errors,
    temporary_beside,
    write_json,
)
from pcscale.common.ranks import on_every_rank
from pcscale.common.topology import ALONE, Group
from pcscale.config.schema import RunConfig
from pcscale.families.plan import Plan
from pcscale.projection.persist import read_state, write_outer, write_records
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.run.manifest import TRAINER_NAME, Manifest


@dataclass
class TrainingState:
    """Where a run stands. The data position is the step itself: batches are a pure function of it.

    Attributes:
        step: optimizer steps taken, skipped ones included.
        tokens: tokens trained on.
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
    folder: Path,
    state: TrainingState,
    optimizer: ProjectedAdamW,
    base: MappedBase,
    config: RunConfig,
    group: Group = ALONE,
) -> None:
    """Write a checkpoint of a run: visible only when it is whole, without any base weight."""
    trainer = asdict(state) | {"rng": _random_states(), "settings": config.model_dump(mode="json")}
    save_state(folder, state.step, optimizer, base, trainer, group)


def save_state(
    folder: Path,
    step: int,
    optimizer: ProjectedAdamW,
    base: MappedBase,
    trainer: dict[str, Any] | None = None,
    group: Group = ALONE,
) -> None:
    """Write what can be merged, and resumed in a loop of one's own: records, manifest, and `trainer` as trainer.json.

    Args:
        folder: the checkpoint's; one that is there is replaced.
        group: the ranks that save it together, each the records that it owns; they share the folder's file system.

    Raises:
        RunError: the disk is full, here or on another rank; nothing was replaced.
    """
    temporary, first = temporary_beside(folder), group.topology.is_first

    def finish(records: list[dict[str, str]]) -> None:
        if trainer is not None:
            write_json(temporary / TRAINER_NAME, trainer)
        plan = optimizer.plan
        manifest = Manifest(
            step=step,
            method="projected" if optimizer.project else "hard_prune",
            base_name=base.name,
            base_revision=base.revision,
            base_config=base.config,
            base_fingerprints=base.check_all(),
            hidden_size=plan.hidden_size,
            intermediate_size=plan.intermediate_size,
            files={path: found for files in records for path, found in files.items()}
            | write_outer(optimizer, temporary),
            projection_rank=optimizer.records.form.rank,
            coded_fingerprints=optimizer.base.coded_fingerprints,
        )
        manifest.write(temporary)
        publish_folder(temporary, folder)

    try:
        with readable_os_errors(folder):
            on_every_rank(group, lambda: empty_folder(temporary) if first else None)
            records = group.gather(on_every_rank(group, lambda: write_records(optimizer, temporary)))
            on_every_rank(group, lambda: finish(records) if first else None)
    except BaseException:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_state(folder: Path, optimizer: ProjectedAdamW, base: MappedBase) -> Manifest:
    """Put what `save_state` wrote into an optimizer over the same plan, and publish every weight from it.

    Raises:
        RequestError: the checkpoint is of another base, plan or method, or a file is missing or was changed.
    """
    manifest = Manifest.read(folder)
    check_checkpoint(manifest, optimizer.plan, "projected" if optimizer.project else "hard_prune", base)
    base.expect(manifest.base_fingerprints)
    if manifest.coded_fingerprints != optimizer.base.coded_fingerprints:
        raise RequestError(
            "the checkpoint was trained on a base in another precision, or on other 8-bit codes. "
            "Give the optimizer the base that it was trained with."
        )
    read_state(optimizer, folder, manifest)
    return manifest


def check_checkpoint(manifest: Manifest, plan: Plan, method: str, base: MappedBase) -> None:
    """Refuse a checkpoint of another base, of other widths or of the other method, before any weight is read."""
    if manifest.base_config != base.config:
        raise RequestError(
            f"the checkpoint was trained on {manifest.base_name}, whose config.json is not that of {base.folder}. "
            "Use the same base and revision."
        )
    found = (manifest.hidden_size, manifest.intermediate_size, manifest.method)
    wanted = (plan.hidden_size, plan.intermediate_size, method)
    if found != wanted:
        raise RequestError(
            f"the checkpoint has widths {found[0]}/{found[1]} by method {found[2]}, this run asks for "
            f"{wanted[0]}/{wanted[1]} by {wanted[2]}. Put the settings back."
        )


def check_text(folder: Path, found: str) -> None:
    """Refuse to go on with a checkpoint of other text than the token sets with the fingerprint `found`."""
    trainer = read_json(folder / TRAINER_NAME)
    if not isinstance(trainer, dict) or trainer.get("data") != found:
        raise RequestError(
            "the training or held-out text is not what this run began with (its fingerprint differs). "
            "Put the files back, or start a new run."
        )


def check_batch(folder: Path, config: RunConfig, world_size: int) -> None:
    """Refuse to go on where a step would see more or fewer sequences than it did."""
    trainer = read_json(folder / TRAINER_NAME)
    before = trainer.get("sequences_per_step") if isinstance(trainer, dict) else None
    now = config.sequences_per_step * world_size
    if before not in (None, 0, now):
        raise RequestError(
            f"a step would see {now} sequences ({config.per_device_train_batch_size} × "
            f"{config.gradient_accumulation_steps} on {world_size} processes), the run began with {before}. "
            "Set gradient_accumulation_steps so that the product is the same."
        )


def load_checkpoint(folder: Path, manifest: Manifest, optimizer: ProjectedAdamW) -> TrainingState:
    """Put a checkpoint's state into the optimizer and its model.

    Raises:
        RequestError: a file is missing or was changed.
    """
    trainer: dict[str, Any] = read_json(folder / TRAINER_NAME)
    try:
        values: dict[str, Any] = {"sequences_per_step": 0} | trainer
        state = TrainingState(**{key: values[key] for key in asdict(TrainingState())})
        random_states = trainer["rng"]
    except (KeyError, TypeError) as error:
        raise RequestError(f"{folder / TRAINER_NAME} lacks {error}: the file was changed.") from None
    read_state(optimizer, folder, manifest)
    _restore_random_states(random_states)
    return state


def _random_states() -> dict[str, str]:
    """torch's generators; nothing else here draws random numbers."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(bytes(state.tolist())).decode() for name, state in states.items()}


def _restore_random_states(states: dict[str, str]) -> None:
    for name, text in states.items():
        state = torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)
