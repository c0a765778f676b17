"""The optimizer's state as files: a record file for each projected matrix and one file for everything else."""

from pathlib import Path

import torch

from pcscale.common.errors import RequestError
from pcscale.families.axes import RESIDUAL
from pcscale.projection.record import FixedTensors, basis_name
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.run.manifest import OUTER_NAME, Manifest, record_file
from pcscale.storage.index import read_header
from pcscale.storage.reader import DTYPE_NAMES, TensorReader
from pcscale.storage.writer import write_tensors

_DIRECT = "direct."
_FIXED = "kept."
UPDATES = "updates"


def write_records(optimizer: ProjectedAdamW, folder: Path) -> dict[str, str]:
    """Write the records of this rank below `folder`.

    Returns:
        Fingerprints by path below the folder, for the manifest.
    """
    return {record_file(name): optimizer.records.save(name, folder / record_file(name)) for name in optimizer.records}


def write_outer(optimizer: ProjectedAdamW, folder: Path) -> dict[str, str]:
    """Write what every rank has: norms, biases, their moments and what S is made of. Returns the file's fingerprint."""
    return {OUTER_NAME: write_tensors(folder / OUTER_NAME, _outer_tensors(optimizer))}


def _outer_tensors(optimizer: ProjectedAdamW) -> dict[str, torch.Tensor]:
    direct = dict(pair for name, trained in optimizer.direct.items() for pair in trained.tensors(direct_name(name)))
    fixed = {fixed_entry(name): tensor for name, tensor in optimizer.fixed.items()}
    return direct | fixed | {UPDATES: torch.tensor(optimizer.updates)}


def direct_name(name: str) -> str:
    """What outer.safetensors calls a weight that is trained directly."""
    return _DIRECT + name


def fixed_entry(name: str) -> str:
    """What outer.safetensors calls a tensor that S is made of."""
    return _FIXED + name


def read_fixed(folder: Path, manifest: Manifest) -> FixedTensors:
    """What S of a checkpoint is made of; mapped."""
    reader = TensorReader(read_header(manifest.file(folder, OUTER_NAME))[0])
    return {name.removeprefix(_FIXED): reader.tensor(name) for name in reader.entries if name.startswith(_FIXED)}


def rotates(folder: Path, manifest: Manifest) -> bool:
    """Whether S of the checkpoint's residual stream is dense; from a header alone."""
    return fixed_entry(basis_name(RESIDUAL)) in read_header(manifest.file(folder, OUTER_NAME))[0]


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
