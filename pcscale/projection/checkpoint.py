"""Checkpoints of the optimizer: a record file for each projected matrix, one file for everything else, a manifest.

No base weight is in one; the manifest binds it to the base by name, revision and a hash of every tensor.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pcscale.common.errors import RequestError
from pcscale.common.files import empty_folder, publish_folder, readable_os_errors, temporary_beside, write_json
from pcscale.common.ranks import on_every_rank
from pcscale.common.topology import ALONE, Group
from pcscale.families.axes import RESIDUAL
from pcscale.projection.layout import AUX, AUX_START, RecordFormat
from pcscale.projection.record import FixedTensors, basis_name
from pcscale.run.manifest import OUTER_NAME, TRAINER_NAME, Manifest, record_file
from pcscale.storage.index import read_header
from pcscale.storage.reader import DTYPE_NAMES, TensorReader
from pcscale.storage.writer import write_tensors

if TYPE_CHECKING:
    from pcscale.base.mapped import MappedBase
    from pcscale.families.plan import Plan
    from pcscale.projection.sweep import ProjectedAdamW

_DIRECT = "direct."
_FIXED = "kept."
UPDATES = "updates"


def save_state(
    folder: Path,
    step: int,
    optimizer: "ProjectedAdamW",
    trainer: dict[str, Any] | None = None,
    group: Group = ALONE,
) -> None:
    """Write a checkpoint that can be merged and gone on from: records, manifest, and `trainer` in trainer.json.

    Args:
        folder: the checkpoint's; one that is there is replaced.
        group: the ranks that save it together, each the records that it owns; they share the folder's file system.

    Raises:
        RunError: the disk is full, here or on another rank; nothing was replaced.
    """
    temporary, first = temporary_beside(folder), group.topology.is_first
    base, plan = optimizer.base.stored, optimizer.plan

    def finish(records: list[dict[str, str]]) -> None:
        write_json(temporary / TRAINER_NAME, {**(trainer or {}), "optimizer": optimizer_settings(optimizer)})
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


def optimizer_settings(optimizer: "ProjectedAdamW") -> dict[str, Any]:
    """The settings that the optimizer was made with, as trainer.json keeps them: arguments of `ProjectedAdamW`."""
    found = optimizer.defaults
    decay = max((group["weight_decay"] for group in optimizer.param_groups), default=0.0)
    return {
        "lr": found["lr"],
        "aux_lr": found["lr"] * found["aux_ratio"],
        "betas": list(found["betas"]),
        "eps": found["eps"],
        "weight_decay": decay,
        "projection_rates": optimizer.projection_rates,
        "seed": optimizer.seed,
    }


def load_state(folder: Path, optimizer: "ProjectedAdamW") -> Manifest:
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


def check_checkpoint(manifest: Manifest, plan: "Plan", method: str, base: "MappedBase") -> None:
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


def write_records(optimizer: "ProjectedAdamW", folder: Path) -> dict[str, str]:
    """Write the records of this rank below `folder`.

    Returns:
        Fingerprints by path below the folder, for the manifest.
    """
    return {record_file(name): optimizer.records.save(name, folder / record_file(name)) for name in optimizer.records}


def write_outer(optimizer: "ProjectedAdamW", folder: Path) -> dict[str, str]:
    """Write the values that every rank has: norms, biases, their moments, S. Returns the file's fingerprint."""
    return {OUTER_NAME: write_tensors(folder / OUTER_NAME, _outer_tensors(optimizer))}


def _outer_tensors(optimizer: "ProjectedAdamW") -> dict[str, torch.Tensor]:
    direct = dict(pair for name, trained in optimizer.direct.items() for pair in trained.tensors(direct_name(name)))
    fixed = {fixed_entry(name): tensor for name, tensor in optimizer.fixed.items()}
    return direct | fixed | {UPDATES: torch.tensor(optimizer.updates)}


def direct_name(name: str) -> str:
    """The name in outer.safetensors of a weight that is trained directly."""
    return _DIRECT + name


def fixed_entry(name: str) -> str:
    """The name in outer.safetensors of a tensor that S is made of."""
    return _FIXED + name


def read_fixed(folder: Path, manifest: Manifest) -> FixedTensors:
    """The tensors that S of a checkpoint is made of; mapped."""
    reader = TensorReader(read_header(manifest.file(folder, OUTER_NAME))[0])
    return {name.removeprefix(_FIXED): reader.tensor(name) for name in reader.entries if name.startswith(_FIXED)}


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


def rotates(folder: Path, manifest: Manifest) -> bool:
    """True where S of the checkpoint's residual stream is dense; reads a header alone."""
    return fixed_entry(basis_name(RESIDUAL)) in read_header(manifest.file(folder, OUTER_NAME))[0]


def read_state(optimizer: "ProjectedAdamW", folder: Path, manifest: Manifest) -> None:
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
