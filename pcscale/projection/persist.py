"""The optimizer's state as files: a record file for each projected matrix and one file for everything else."""

from pathlib import Path

import torch

from pcscale.checkpoint.manifest import OUTER_NAME, Manifest, record_file
from pcscale.common.errors import RequestError
from pcscale.importance.select import KeptIndices
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.storage.index import read_header
from pcscale.storage.reader import TensorReader
from pcscale.storage.writer import write_tensors

_DIRECT = "direct."
_KEPT = "kept."
_UPDATES = "updates"


def write_state(optimizer: ProjectedAdamW, folder: Path) -> dict[str, str]:
    """Write records, norms, biases, moments and kept indices below `folder`.

    Returns:
        Fingerprints by path below the folder, for the manifest.
    """
    files = {
        record_file(name): write_tensors(folder / record_file(name), record.tensors())
        for name, record in optimizer.records.items()
    }
    files[OUTER_NAME] = write_tensors(folder / OUTER_NAME, _outer_tensors(optimizer))
    return files


def _outer_tensors(optimizer: ProjectedAdamW) -> dict[str, torch.Tensor]:
    direct = dict(pair for name, trained in optimizer.direct.items() for pair in trained.tensors(direct_name(name)))
    kept = {kept_entry(name): indices for name, indices in optimizer.kept.items()}
    return direct | kept | {_UPDATES: torch.tensor(optimizer.updates)}


def direct_name(name: str) -> str:
    """What outer.safetensors calls a weight that is trained directly."""
    return _DIRECT + name


def kept_entry(name: str) -> str:
    """What outer.safetensors calls a set of kept indices."""
    return _KEPT + name


def read_kept(folder: Path, manifest: Manifest) -> KeptIndices:
    """The kept indices of a checkpoint."""
    reader = TensorReader(read_header(manifest.file(folder, OUTER_NAME))[0])
    return {name.removeprefix(_KEPT): reader.tensor(name).clone() for name in reader.entries if name.startswith(_KEPT)}


def read_state(optimizer: ProjectedAdamW, folder: Path, manifest: Manifest) -> None:
    """Put a checkpoint's state into an optimizer of the same plan, and publish every weight from it.

    Raises:
        RequestError: a file is missing, changed or of other shapes.
    """
    for name, record in optimizer.records.items():
        _fill(record.tensors(), manifest.file(folder, record_file(name)))
    outer = _outer_tensors(optimizer)
    _fill(outer, manifest.file(folder, OUTER_NAME))
    optimizer.updates = int(outer[_UPDATES])
    for planned in optimizer.plan.matrices:
        if planned.name in optimizer.records:
            optimizer.records[planned.name].keep(planned, optimizer.kept)
    optimizer.compose_all()


def _fill(tensors: dict[str, torch.Tensor], path: Path) -> None:
    entries, _ = read_header(path)
    reader = TensorReader(entries)
    for name, tensor in tensors.items():
        if name not in entries or entries[name].shape != tuple(tensor.shape):
            found = list(entries[name].shape) if name in entries else "nothing"
            raise RequestError(
                f"{path}: {name} is {found}, this run expects {list(tensor.shape)}. Use its own run.yaml."
            )
        tensor.copy_(reader.tensor(name))
