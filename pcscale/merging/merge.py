"""Merging: a checkpoint and the base's shards into an ordinary Hugging Face checkpoint, one matrix at a time.

The output is built in a hidden folder beside its final one and gets its name when it is whole; a killed merge goes on
from its finished shards with `resume`. Neither a GPU nor transformers is needed.
"""

import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pcscale.base.int8 import Int8Base
from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import BaseFolder, resolve_base
from pcscale.base.weight import FrozenWeight
from pcscale.common.console import console
from pcscale.common.errors import BudgetError, RequestError, RunError
from pcscale.common.files import (
    TEMPORARY_PREFIX,
    publish,
    read_json,
    readable_os_errors,
    sync_to_disk,
    temporary_beside,
    write_json,
)
from pcscale.common.units import format_bytes
from pcscale.families.hf_config import CONFIG_NAME
from pcscale.families.plan import Plan, PlannedWeight
from pcscale.memory.process import AnonymousPeak
from pcscale.memory.working import merge_need_bytes
from pcscale.merging.blocks import Workspace, blocks, compose_into
from pcscale.merging.card import write_card
from pcscale.merging.layout import Shard, lay_out, tensor_bytes
from pcscale.projection.checkpoint import direct_name, read_fixed, rotates
from pcscale.projection.layout import value_shapes
from pcscale.projection.record import FixedSides, FixedTensors, projection_of
from pcscale.run.folder import BASE_CACHE_NAME
from pcscale.run.manifest import OUTER_NAME, Manifest, record_file
from pcscale.storage.hashing import fingerprint_file
from pcscale.storage.index import INDEX_NAME, SINGLE_NAME, read_header
from pcscale.storage.reader import TORCH_DTYPES, TensorReader
from pcscale.storage.writer import ShardWriter

VERIFY_AHEAD = 8
"""Tensors that are read and hashed ahead of the products: about a layer, since large ones follow small ones."""
PROGRESS_NAME = "merge_progress.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIDECARS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files of the base that belong to the compressed model as well."""


@dataclass(frozen=True)
class MergeResult:
    """The report of a merge. Units: bytes, seconds."""

    output: str
    tensors: int
    bytes_written: int
    shards: int
    seconds: float
    peak_anonymous_bytes: int
    max_memory_bytes: int


@dataclass(frozen=True)
class _Source:
    """The origin of the merged weights."""

    checkpoint: Path
    manifest: Manifest
    plan: Plan
    base: MappedBase
    weights: MappedBase | Int8Base  # the base's matrices as training saw them
    fixed: FixedTensors
    outer: TensorReader
    workspace: Workspace


def merge(
    checkpoint: Path,
    base: MappedBase,
    output: Path,
    max_shard_bytes: int,
    max_memory_bytes: int,
    dtype: str | None = None,
    resume: bool = False,
    replace: bool = False,
) -> MergeResult:
    """Write the compressed model as a stock checkpoint folder.

    Args:
        checkpoint: a step-… folder.
        base: the base that it was trained on, compared tensor by tensor as it is read.
        output: the folder to write; new or empty unless `replace`.
        max_memory_bytes: cap on anonymous memory, the interpreter's 300 MiB aside. It changes no byte of the output.
        dtype: every tensor's dtype; None: each keeps its base weight's.
        resume: go on from the finished shards of an earlier merge into the same folder.

    Raises:
        RequestError: no such checkpoint, another base, an output that holds something, a file that was changed.
        BudgetError: the cap is below one block's need.
        RunError: the disk is full.
    """
    started = time.monotonic()
    manifest = Manifest.read(checkpoint)
    plan = manifest.plan
    least = merge_need_bytes(plan, manifest.projection_rank, rotates(checkpoint, manifest))
    if max_memory_bytes < least:
        raise BudgetError(
            f"max_memory {format_bytes(max_memory_bytes)} is too small: one block of the largest matrix takes "
            f"{format_bytes(least)}. Give at least {least} bytes."
        )
    if output.exists() and not output.is_dir():
        raise RequestError(f"{output} is a file. Name a new folder.")
    if output.is_dir() and any(output.iterdir()) and not replace:
        raise RequestError(f"{output} already holds {next(output.iterdir()).name}. Name a new folder or empty it.")
    with AnonymousPeak() as peak:
        base.expect(manifest.base_fingerprints)
        if base.config != manifest.base_config:
            raise RequestError(
                f"{base.folder / CONFIG_NAME} is not the config this checkpoint was trained on. "
                f"Use the base {manifest.base_name}."
            )
        outer = TensorReader(read_header(manifest.file(checkpoint, OUTER_NAME))[0])
        with trained_weights(checkpoint, manifest, base, output) as weights:
            fixed = read_fixed(checkpoint, manifest)
            source = _Source(checkpoint, manifest, plan, base, weights, fixed, outer, Workspace())
            dtypes = _output_dtypes(source, dtype)
            bytes_written = _write_folder(source, output, dtypes, max_shard_bytes, resume)
    return MergeResult(
        output=str(output),
        tensors=len(plan.weights),
        bytes_written=bytes_written,
        shards=len(lay_out(plan, dtypes, max_shard_bytes)),
        seconds=time.monotonic() - started,
        peak_anonymous_bytes=peak.peak_bytes,
        max_memory_bytes=max_memory_bytes,
    )


def find_base(manifest: Manifest) -> BaseFolder:
    """The base that a checkpoint was trained on, by its name and revision; merging compares its hashes.

    Raises:
        RequestError: there is no base of that name.
    """
    try:
        return resolve_base(manifest.base_name, manifest.base_revision)
    except RequestError as error:
        raise RequestError(f"the checkpoint's base is not found by its name ({error}) Name it with `base`.") from None


def try_writer(plan: Plan, base: MappedBase, folder: Path, max_shard_bytes: int) -> None:
    """Open the largest file of a merge in a folder and discard it, to prove that it can be written and has room.

    Raises:
        RequestError: the folder cannot be written.
        RunError: the disk has no room.
    """
    dtypes = {planned.name: TORCH_DTYPES[base.dtype(planned.name)] for planned in plan.weights}
    shards = lay_out(plan, dtypes, max_shard_bytes)
    largest = max(shards, key=lambda shard: sum(tensor_bytes(planned, dtypes) for planned in shard.weights))
    path = folder / largest.name
    with _shard_writer(path, largest, dtypes):
        pass
    path.unlink()


def _shard_writer(path: Path, shard: Shard, dtypes: dict[str, torch.dtype]) -> ShardWriter:
    shapes = {planned.name: (dtypes[planned.name], planned.shape) for planned in shard.weights}
    return ShardWriter(path, shapes, {"format": "pt"})


@contextmanager
def trained_weights(
    checkpoint: Path, manifest: Manifest, base: MappedBase, beside: Path
) -> Iterator[MappedBase | Int8Base]:
    """The base's matrices as training saw them.

    8-bit codes come from the run's cache. Where the checkpoint was moved away from it they are made again, in a file
    beside `beside` that is removed when the block ends.
    """
    if not manifest.coded_fingerprints:
        yield base
        return
    cache = checkpoint.resolve().parent.parent / BASE_CACHE_NAME
    if cache.exists():
        yield Int8Base(base, cache, manifest.coded_fingerprints)
        return
    with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY_PREFIX}base-", dir=beside.resolve().parent) as scratch:
        yield Int8Base(base, Path(scratch) / BASE_CACHE_NAME, manifest.coded_fingerprints)


def _output_dtypes(source: _Source, dtype: str | None) -> dict[str, torch.dtype]:
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype {dtype} is not known. Use one of {', '.join(DTYPES)}.")
    return {
        planned.name: DTYPES[dtype] if dtype else TORCH_DTYPES[source.base.dtype(planned.name)]
        for planned in source.plan.weights
    }


def _write_folder(
    source: _Source, output: Path, dtypes: dict[str, torch.dtype], max_shard_bytes: int, resume: bool
) -> int:
    output = output.resolve()  # A link is followed, `.` has a name.
    staging = temporary_beside(output)
    shards = lay_out(source.plan, dtypes, max_shard_bytes)
    key = {
        "checkpoint": source.manifest.files,
        "dtypes": {name: str(dtype) for name, dtype in dtypes.items()},
        "shards": {shard.name: [planned.name for planned in shard.weights] for shard in shards},
    }
    with readable_os_errors(output):
        done = _finished_shards(staging, key) if resume else {}
        if not done:
            shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True, exist_ok=True)
        needed = sum(tensor_bytes(planned, dtypes) for shard in shards for planned in shard.weights)
        needed -= sum((staging / name).stat().st_size for name in done)
        free = shutil.disk_usage(staging).free
        if free < needed:
            staging.rmdir() if not any(staging.iterdir()) else None
            raise RunError(
                f"{output}: the disk has {format_bytes(free)} free, the merged model takes {format_bytes(needed)}."
            )
        total = sum(tensor_bytes(planned, dtypes) for shard in shards for planned in shard.weights)
        with console.progress("merge", total / 2**20, "MiB") as progress:
            for shard in shards:
                if shard.name not in done:
                    _write_shard(source, staging / shard.name, shard, dtypes, progress.advance)
                    done[shard.name] = fingerprint_file(staging / shard.name)
                    write_json(staging / PROGRESS_NAME, {"key": key, "done": done})
                else:
                    progress.advance(sum(tensor_bytes(planned, dtypes) for planned in shard.weights) / 2**20)
        bytes_written = sum((staging / shard.name).stat().st_size for shard in shards)
        _write_sidecars(source, staging, shards, dtypes)
        (staging / PROGRESS_NAME).unlink()
        sync_to_disk(staging)
        publish(staging, output)
    return bytes_written


def _finished_shards(staging: Path, key: dict[str, object]) -> dict[str, str]:
    """The shards that an interrupted merge with this key left whole."""
    try:
        progress = read_json(staging / PROGRESS_NAME)
    except RequestError:  # Absent or unreadable: nothing to go on from.
        return {}
    if not isinstance(progress, dict) or progress.get("key") != key:
        return {}
    return {
        name: expected
        for name, expected in progress["done"].items()
        if (staging / name).is_file() and fingerprint_file(staging / name) == expected
    }


def _write_shard(
    source: _Source,
    path: Path,
    shard: Shard,
    dtypes: dict[str, torch.dtype],
    advance: Callable[[float, str], None],
) -> None:
    with _shard_writer(path, shard, dtypes) as writer, ThreadPoolExecutor(1, "verify") as pool:
        ahead = deque(pool.submit(_verified, source, planned) for planned in shard.weights[:VERIFY_AHEAD])
        for position, planned in enumerate(shard.weights):
            weight, record = ahead.popleft().result()
            ahead.extend(
                pool.submit(_verified, source, later) for later in shard.weights[position + VERIFY_AHEAD :][:1]
            )
            if weight is not None and record is not None:
                _compose(source, planned, weight, record, writer[planned.name])
            else:
                value = source.outer.tensor(direct_name(planned.name))
                for rows in blocks(len(value)):
                    writer[planned.name][rows] = value[rows].to(dtypes[planned.name])
            advance(tensor_bytes(planned, dtypes) / 2**20, planned.name)


def _verified(source: _Source, planned: PlannedWeight) -> tuple[FrozenWeight | None, Path | None]:
    """A base weight and its record's file, read once and checked against the manifest.

    This runs ahead on a thread: disk and hashing work while other matrices are multiplied. The base weight is read even
    where no product needs it, so that another base is refused.
    """
    source.base.tensor(planned.name)
    name = record_file(planned.name)
    if name not in source.manifest.files:
        return None, None
    return source.weights.weight(planned.name), source.manifest.file(source.checkpoint, name)


def _compose(source: _Source, planned: PlannedWeight, weight: FrozenWeight, path: Path, out_oi: torch.Tensor) -> None:
    record = TensorReader(read_header(path)[0])
    values = {name: record.tensor(name) for name in value_shapes(planned, source.manifest.projection_rank)}
    projection = projection_of(FixedSides.of(planned, source.fixed), values)
    compose_into(out_oi, weight, projection, source.workspace)
    record.close()


def _write_sidecars(source: _Source, staging: Path, shards: list[Shard], dtypes: dict[str, torch.dtype]) -> None:
    """Write everything but the weights; the index, which makes the folder loadable, comes last."""
    for pattern in SIDECARS:
        for file in source.base.folder.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, staging / file.name)
    config = dict(source.plan.config)
    first = next(iter(dtypes.values()))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(first).removeprefix("torch.")
    write_json(staging / CONFIG_NAME, config)
    write_card(staging / "README.md", source.checkpoint, source.manifest, source.base.folder)
    if shards[0].name != SINGLE_NAME:
        total = sum(tensor_bytes(planned, dtypes) for shard in shards for planned in shard.weights)
        weight_map = {planned.name: shard.name for shard in shards for planned in shard.weights}
        write_json(staging / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
