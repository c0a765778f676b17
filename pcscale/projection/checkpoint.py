"""Checkpoints of the optimizer: a record file for each projected matrix, one file for everything else, a manifest.

No base weight is in one; the manifest binds it to the base by name, revision and a hash of every tensor.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from pcscale.base.mapped import MappedBase
from pcscale.common.errors import RequestError
from pcscale.common.files import empty_folder, publish_folder, readable_os_errors, temporary_beside, write_json
from pcscale.common.ranks import on_every_rank
from pcscale.common.topology import ALONE, Group
from pcscale.families.plan import Plan
from pcscale.projection.layout import AUX, AUX_START, RecordFormat
from pcscale.projection.record import FixedTensors
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.run.manifest import OUTER_NAME, TRAINER_NAME, Manifest, record_file
from pcscale.storage.index import read_header
from pcscale.storage.reader import DTYPE_NAMES, TensorReader
from pcscale.storage.writer import write_tensors

DIRECT, FIXED = "direct.", "kept."
"""Beginnings of names in outer.safetensors: of weights that are trained directly, and of what S is made of."""
UPDATES = "updates"


def save_state(
    folder: Path, step: int, optimizer: ProjectedAdamW, trainer: dict[str, Any] | None = None, group: Group = ALONE
) -> None:
    """Write a checkpoint that can be merged and gone on from: records, manifest, and `trainer` in trainer.json.

    Args:
        folder: the checkpoint's; one that is there is replaced.
        group: the ranks that save it together, each the records that it owns, on one file system.

    Raises:
        RunError: the disk is full, here or on another rank; nothing was replaced.
    """
    temporary, first = temporary_beside(folder), group.topology.is_first
    base, plan = optimizer.base.stored, optimizer.plan

    def finish(records: list[dict[str, str]]) -> None:
        made_with = optimizer.defaults
        settings = {  # Arguments of `ProjectedAdamW`.
            "lr": made_with["lr"],
            "aux_lr": made_with["lr"] * made_with["aux_ratio"],
            "betas": list(made_with["betas"]),
            "eps": made_with["eps"],
            "weight_decay": max((group["weight_decay"] for group in optimizer.param_groups), default=0.0),
            "projection_rates": optimizer.projection_rates,
            "seed": optimizer.seed,
        }
        write_json(temporary / TRAINER_NAME, {**(trainer or {}), "optimizer": settings})
        manifest = Manifest(
            step=step,
            method=optimizer.compression.method,
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


def load_state(folder: Path, optimizer: ProjectedAdamW) -> Manifest:
    """Put what `save_state` wrote into an optimizer over the same plan, and publish every weight from it.

    Raises:
        RequestError: the checkpoint is of another base, plan or method, or a file is missing or was changed.
    """
    manifest, base = Manifest.read(folder), optimizer.base.stored
    check_checkpoint(manifest, optimizer.plan, optimizer.compression.method, base)
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
    found = f"{manifest.hidden_size}/{manifest.intermediate_size} by"
    wanted = f"{plan.hidden_size}/{plan.intermediate_size} by {method}"
    if f"{found} {manifest.method}" != wanted:
        raise RequestError(
            f"the checkpoint has widths {found} method {manifest.method}, this run asks for {wanted}. "
            "Put the settings back."
        )


def write_records(optimizer: ProjectedAdamW, folder: Path) -> dict[str, str]:
    """Write the records of this rank; returns fingerprints by path below `folder`, for the manifest."""
    return {record_file(name): optimizer.records.save(name, folder / record_file(name)) for name in optimizer.records}


def write_outer(optimizer: ProjectedAdamW, folder: Path) -> dict[str, str]:
    """Write the values that every rank has: norms, biases, their moments, S. Returns the file's fingerprint."""
    return {OUTER_NAME: write_tensors(folder / OUTER_NAME, _outer_tensors(optimizer))}


def _outer_tensors(optimizer: ProjectedAdamW) -> dict[str, torch.Tensor]:
    direct = dict(pair for name, trained in optimizer.direct.items() for pair in trained.tensors(DIRECT + name))
    fixed = {FIXED + name: tensor for name, tensor in optimizer.fixed.items()}
    return direct | fixed | {UPDATES: torch.tensor(optimizer.updates)}


def read_fixed(folder: Path, manifest: Manifest) -> FixedTensors:
    """The tensors that S of a checkpoint is made of; mapped."""
    reader = TensorReader(read_header(manifest.file(folder, OUTER_NAME))[0])
    return {name.removeprefix(FIXED): reader.tensor(name) for name in reader.entries if name.startswith(FIXED)}


def record_format_of(folder: Path, manifest: Manifest) -> RecordFormat:
    """The format of a checkpoint's records; from headers alone."""
    names = [name for name in manifest.files if name != OUTER_NAME]
    headers = [read_header(manifest.file(folder, name))[0] for name in names]
    dtypes = {entries[AUX].dtype for entries in headers}
    return RecordFormat(
        dtype="bfloat16" if "BF16" in dtypes else "float32",
        moments="8bit" if any(entry.dtype == "U8" for entries in headers for entry in entries.values()) else "32bit",
        rank=manifest.projection_rank,
        aux_start=any(AUX_START in entries for entries in headers),
    )


def read_state(optimizer: ProjectedAdamW, folder: Path, manifest: Manifest) -> None:
    """Put a checkpoint's state into an optimizer of the same plan, and publish every weight from it.

    Raises:
        RequestError: a file is missing, changed or of other shapes.
    """
    for name, layout in optimizer.records.layouts.items():
        path = manifest.file(folder, record_file(name))
        _check(path, {part: (spec.dtype, spec.shape) for part, spec in layout.items()})
        optimizer.records.load(name, path)
    outer, path = _outer_tensors(optimizer), manifest.file(folder, OUTER_NAME)
    _check(path, {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in outer.items()})
    reader = TensorReader(read_header(path)[0])
    for name, tensor in outer.items():
        tensor.copy_(reader.tensor(name))
    optimizer.updates = int(outer[UPDATES])
    optimizer.compose_all()


def _check(path: Path, expected: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Refuse a file whose tensors are others than those that this run has."""
    entries, _ = read_header(path)
    found = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            one, other = (f"{of[name][0]} {list(of[name][1])}" if name in of else "nothing" for of in (found, expected))
            raise RequestError(
                f"{path}: {name} is {one}, this run expects {other}. Use the settings that it was saved with."
            )
