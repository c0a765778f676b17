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
from itertools import islice
from pathlib import Path

import torch

from pcscale.base.int8 import Int8Base
from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import BaseFolder, resolve_base
from pcscale.common.console import console
from pcscale.common.errors import BudgetError, RequestError, RunError
from pcscale.common.files import publish_folder, read_json, readable_os_errors, temporary_beside, write_json
from pcscale.common.units import format_bytes
from pcscale.families.axes import RESIDUAL
from pcscale.families.hf_config import CONFIG_NAME
from pcscale.families.plan import Plan, PlannedWeight
from pcscale.memory.process import AnonymousPeak
from pcscale.memory.working import merge_need_bytes
from pcscale.merging.blocks import Workspace, blocks, compose_into
from pcscale.merging.card import write_card
from pcscale.merging.layout import Shard, lay_out, tensor_bytes
from pcscale.projection.checkpoint import DIRECT, read_fixed
from pcscale.projection.record import FixedTensors, basis_name, projection_of
from pcscale.run.folder import BASE_CACHE_NAME
from pcscale.run.manifest import OUTER_NAME, Manifest, record_file
from pcscale.storage.hashing import fingerprint_file
from pcscale.storage.index import INDEX_NAME, SINGLE_NAME
from pcscale.storage.reader import TORCH_DTYPES, read_tensors
from pcscale.storage.writer import ShardWriter

VERIFY_AHEAD = 8
"""Tensors that are read and hashed ahead of the products: about a layer, since large ones follow small ones."""
PROGRESS_NAME = "merge_progress.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIDECARS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model"),
    *("*.jinja", "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*"),
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
    checkpoint: Path
    manifest: Manifest
    base: MappedBase
    weights: MappedBase | Int8Base  # the base's matrices as training saw them
    fixed: FixedTensors
    outer: dict[str, torch.Tensor]
    dtypes: dict[str, torch.dtype]
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
    fixed = read_fixed(checkpoint, manifest)
    least = merge_need_bytes(plan, manifest.projection_rank, basis_name(RESIDUAL) in fixed)
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
        outer = read_tensors(manifest.file(checkpoint, OUTER_NAME))
        if dtype is not None and dtype not in DTYPES:
            raise RequestError(f"dtype {dtype} is not known. Use one of {', '.join(DTYPES)}.")
        dtypes = _stored_dtypes(plan, base)
        if dtype is not None:
            dtypes = dict.fromkeys(dtypes, DTYPES[dtype])
        shards = lay_out(plan, dtypes, max_shard_bytes)
        with trained_weights(checkpoint, manifest, base, output) as weights:
            source = _Source(checkpoint, manifest, base, weights, fixed, outer, dtypes, Workspace())
            bytes_written = _write_folder(source, output, shards, resume)
    seconds, num_tensors = time.monotonic() - started, len(plan.weights)
    return MergeResult(str(output), num_tensors, bytes_written, len(shards), seconds, peak.peak_bytes, max_memory_bytes)


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
    dtypes = _stored_dtypes(plan, base)
    largest = max(lay_out(plan, dtypes, max_shard_bytes), key=lambda shard: shard.num_bytes)
    path = folder / largest.name
    with _shard_writer(path, largest, dtypes):
        pass
    path.unlink()


def _stored_dtypes(plan: Plan, base: MappedBase) -> dict[str, torch.dtype]:
    return {planned.name: TORCH_DTYPES[base.dtype(planned.name)] for planned in plan.weights}


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
    folder = temporary_beside(beside.resolve().with_name("base-"))
    with tempfile.TemporaryDirectory(prefix=folder.name, dir=folder.parent) as scratch:
        yield Int8Base(base, Path(scratch) / BASE_CACHE_NAME, manifest.coded_fingerprints)


def _write_folder(source: _Source, output: Path, shards: list[Shard], resume: bool) -> int:
    """Write all files and publish the folder; returns the bytes of its shards."""
    output = output.resolve()  # A link is followed, `.` has a name.
    staging = temporary_beside(output)
    key = {
        "checkpoint": source.manifest.files,
        "dtypes": {name: str(dtype) for name, dtype in source.dtypes.items()},
        "shards": {shard.name: [planned.name for planned in shard.weights] for shard in shards},
    }
    with readable_os_errors(output):
        done = _finished_shards(staging, key) if resume else {}
        if not done:
            shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True, exist_ok=True)
        total = sum(shard.num_bytes for shard in shards)
        needed = total - sum((staging / name).stat().st_size for name in done)
        free = shutil.disk_usage(staging).free
        if free < needed:
            if not done:
                staging.rmdir()
            raise RunError(
                f"{output}: the disk has {format_bytes(free)} free, the merged model takes {format_bytes(needed)}."
            )
        with console.progress("merge", total / 2**20, "MiB") as progress:
            for shard in shards:
                if shard.name in done:
                    progress.advance(shard.num_bytes / 2**20)
                    continue
                _write_shard(source, staging / shard.name, shard, progress.advance)
                done[shard.name] = fingerprint_file(staging / shard.name)
                write_json(staging / PROGRESS_NAME, {"key": key, "done": done})
        bytes_written = sum((staging / shard.name).stat().st_size for shard in shards)
        _write_sidecars(source, staging, shards)
        (staging / PROGRESS_NAME).unlink()
        publish_folder(staging, output)
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


def _write_shard(source: _Source, path: Path, shard: Shard, advance: Callable[[float, str], None]) -> None:
    with _shard_writer(path, shard, source.dtypes) as writer, ThreadPoolExecutor(1, "verify") as pool:
        waiting = iter(shard.weights)
        ahead = deque(pool.submit(_verified_record, source, planned) for planned in islice(waiting, VERIFY_AHEAD))
        for planned in shard.weights:
            record = ahead.popleft().result()
            ahead.extend(pool.submit(_verified_record, source, later) for later in islice(waiting, 1))
            if record is not None:
                projection = projection_of(planned, source.fixed, read_tensors(record))
                weight = source.weights.weight(planned.name)
                compose_into(writer[planned.name], weight, projection, source.workspace)
            else:
                value = source.outer[DIRECT + planned.name]
                for rows in blocks(len(value)):
                    writer[planned.name][rows] = value[rows].to(source.dtypes[planned.name])
            advance(tensor_bytes(planned, source.dtypes) / 2**20, planned.name)


def _verified_record(source: _Source, planned: PlannedWeight) -> Path | None:
    """A weight's record file, checked against the manifest as its base weight is; None: it has no record.

    This runs ahead on a thread: disk and hashing work while other matrices are multiplied. The base weight is read even
    where no product needs it, so that another base is refused.
    """
    source.base.tensor(planned.name)
    name = record_file(planned.name)
    return source.manifest.file(source.checkpoint, name) if name in source.manifest.files else None


def _write_sidecars(source: _Source, staging: Path, shards: list[Shard]) -> None:
    """Write everything but the weights; the index, which makes the folder loadable, comes last."""
    for pattern in SIDECARS:
        for file in source.base.folder.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, staging / file.name)
    config = source.manifest.plan.config
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    first = next(iter(source.dtypes.values()))
    write_json(staging / CONFIG_NAME, {**config, key: str(first).removeprefix("torch.")})
    write_card(staging / "README.md", source.checkpoint, source.manifest, source.base.folder)
    if shards[0].name != SINGLE_NAME:
        total = sum(shard.num_bytes for shard in shards)
        weight_map = {planned.name: shard.name for shard in shards for planned in shard.weights}
        write_json(staging / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
