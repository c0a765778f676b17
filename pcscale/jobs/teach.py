"""The job behind `pcscale teach`: teacher targets of a text, into a folder that runs learn from."""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import torch

from pcscale.base.forward import LayerMajorModel
from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import resolve_base
from pcscale.common.console import console
from pcscale.common.errors import BudgetError, Interrupted, RequestError
from pcscale.common.files import TEMPORARY_PREFIX, readable_os_errors
from pcscale.common.sizes import CACHED_PROBABILITY_BYTES, HIDDEN_BUDGET_BYTES, token_bytes
from pcscale.common.units import format_bytes
from pcscale.config.schema import PlanConfig
from pcscale.data.tokens import load_tokenizer, read_sequences
from pcscale.memory.limits import disk_free
from pcscale.memory.process import AnonymousPeak
from pcscale.training.interrupt import StopRequest
from pcscale.training.teacher_cache import (
    TEACHER_NAME,
    TeacherCache,
    TeacherManifest,
    sequence_key,
    shard_name,
    write_shard,
)

SHARD_TOKENS = 2**16
"""Tokens of a shard at most: what an interruption may cost, minutes on processors."""
_TARGET_BYTES = 24
"""Memory of one of the most likely tokens while a shard is made: found so far, and written."""


def teach(config: PlanConfig, data: list[str], tokens: int | None = None) -> dict[str, Any]:
    """Fill `distill.cache` with the targets of a text; those that are there already stay.

    Every shard is one layer-major pass: each of the base's weights is read once for all of its sequences.

    Args:
        config: `base`, `sequence_length`, `distill` and the batch size matter here.
        data: the text: files, globs or a Hub data set id.
        tokens: at most so many of the text, from its beginning; None: as many as one process trains on.

    Returns:
        A summary of what was done.

    Raises:
        RequestError: the request is wrong, or the folder is of another base or made in another way.
        BudgetError: the disk has too little room.
        RunError: the disk is full.
        Interrupted: the user asked to stop; finished shards stay.

    Memory: one layer, a block of the head, a shard's hidden states, 0.5 GiB at most, 4 bytes a token of the text, and
    some 130 bytes a sequence.
    """
    started = time.monotonic()
    distill = config.distill
    assert distill is not None
    assert distill.cache is not None
    folder = Path(distill.cache).expanduser()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" and config.bf16 else torch.float32
    source = resolve_base(config.base)
    base = MappedBase(source)
    manifest = _open(folder, config, base, dtype)
    tokenizer = load_tokenizer(source.folder, config.trust_remote_code)
    count = config.wanted_sequences(1) if tokens is None else max(1, tokens // config.sequence_length)
    ids_NT = read_sequences("data.train", data, tokenizer, config.sequence_length, count, base.config["vocab_size"])
    with AnonymousPeak() as peak:
        manifest = _bind(folder, manifest, base)
        manifest, added = _fill(folder, manifest, config, ids_NT, LayerMajorModel(base, device, dtype))
    held = sum(1 for _ in TeacherCache(folder, manifest).addresses())
    num_bytes = sum((folder / name).stat().st_size for name in manifest.shards)
    return {
        "output": str(folder),
        "sequences": held,
        "added": added,
        "tokens": held * config.sequence_length,
        "shards": len(manifest.shards),
        "bytes": num_bytes,
        "bytes_per_token": num_bytes / (held * config.sequence_length),
        "seconds": time.monotonic() - started,
        "peak_anonymous_bytes": peak.peak_bytes,
    }


def _open(folder: Path, config: PlanConfig, base: MappedBase, dtype: torch.dtype) -> TeacherManifest:
    """The folder's manifest, or a new one, whose base has not been read yet; nothing is changed."""
    distill = config.distill
    assert distill is not None
    assert distill.top_k is not None
    if distill.top_k > base.config["vocab_size"]:
        raise RequestError(
            f"distill.top_k is {distill.top_k}, the base knows {base.config['vocab_size']} tokens. Set at most that."
        )
    new = TeacherManifest(
        base_name=base.name,
        base_revision=base.revision,
        base_config=base.config,
        base_fingerprints={},
        sequence_length=config.sequence_length,
        top_k=distill.top_k,
        temperature=distill.temperature,
        dtype=str(dtype).removeprefix("torch."),
    )
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file. Name a folder.")
    if (folder / TEACHER_NAME).exists():
        found = TeacherManifest.read(folder)
        found.check(
            folder,
            base,
            sequence_length=("sequence_length", new.sequence_length),
            top_k=("distill.top_k", new.top_k),
            temperature=("distill.temperature", new.temperature),
            dtype=("the dtype that the base runs in (bfloat16 by bf16=true on a GPU)", new.dtype),
        )
        return found
    others = [path.name for path in folder.iterdir()] if folder.exists() else []
    if any(not name.startswith(TEMPORARY_PREFIX) for name in others):
        raise RequestError(f"{folder} holds {others[0]} and no {TEACHER_NAME}. Name a new folder.")
    return new


def _bind(folder: Path, manifest: TeacherManifest, base: MappedBase) -> TeacherManifest:
    """Read the base once, and compare it, or write down which it is; then look at what is there."""
    if manifest.base_fingerprints:
        base.expect(manifest.base_fingerprints, f"that {folder} was made from")
    console.info(f"reading {base.name} once, to know it again")
    fingerprints = base.check_all()
    # A shard that somebody has removed is made again.
    kept = {name: found for name, found in manifest.shards.items() if (folder / name).exists()}
    bound = dataclasses.replace(manifest, base_fingerprints=fingerprints, shards=kept)
    TeacherCache(folder, bound).check("Remove it and run the same command again.")
    if kept != manifest.shards:
        bound.write(folder)  # This text may lack none of them, and then nothing else would be written.
    return bound


def _fill(
    folder: Path, manifest: TeacherManifest, config: PlanConfig, ids_NT: torch.Tensor, model: LayerMajorModel
) -> tuple[TeacherManifest, int]:
    """Add the sequences that the folder lacks, shard by shard; returns how many they were."""
    seen, held = {key for key, _ in TeacherCache(folder, manifest).addresses()}, set(manifest.shards)
    missing = []
    for row in range(len(ids_NT)):  # Not the tensor itself, which makes all of its rows at once.
        key = sequence_key(ids_NT[row])
        if key not in seen:
            missing.append(row)
            seen.add(key)
    if not missing:
        console.info(f"{folder} is complete: it holds all {len(ids_NT):,} sequences")
        return manifest, 0
    _check_disk(folder, manifest, len(missing))
    # So few in a shard that all of them go through the layers together, within the budget of a pass.
    each_bytes = model.base.config["hidden_size"] * model.dtype.itemsize + _TARGET_BYTES * manifest.top_k
    each = max(1, min(SHARD_TOKENS, HIDDEN_BUDGET_BYTES // each_bytes) // manifest.sequence_length)
    shards = torch.tensor(missing).split(each)
    free_names = (name for name in map(shard_name, itertools.count()) if name not in held)
    console.info(
        f"{len(missing):,} of {len(ids_NT):,} sequences to ask the base about, {len(shards[0])} in a shard of "
        f"{len(shards)}; each of its weights is read once a shard"
    )
    with readable_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink()
    manifest.write(folder)  # A folder with shards alone would be taken for somebody else's.
    done = 0
    with StopRequest() as stop:
        for number, (name, rows) in enumerate(zip(free_names, shards, strict=False), 1):
            if stop.asked:
                raise Interrupted(
                    f"interrupted with {done:,} of {len(missing):,} sequences done, which stay. "
                    "Go on with the same command."
                )
            targets: list[tuple[torch.Tensor, torch.Tensor]] = []
            shard_NT = ids_NT[rows]
            batches = list(shard_NT.split(config.per_device_train_batch_size))
            for hidden in model.hidden_states(batches, f"teach {number}/{len(shards)}"):
                targets += model.most_likely(hidden, manifest.top_k, manifest.temperature)
            found = write_shard(folder / name, shard_NT, targets, model.base.config["vocab_size"])
            manifest = dataclasses.replace(manifest, shards={**manifest.shards, name: found})
            manifest.write(folder)
            done += len(rows)
    return manifest, done


def _check_disk(folder: Path, manifest: TeacherManifest, sequences: int) -> None:
    value = CACHED_PROBABILITY_BYTES + token_bytes(manifest.base_config["vocab_size"])
    needed = sequences * manifest.sequence_length * manifest.top_k * value
    free = disk_free(folder)
    if free.num_bytes is not None and needed > free.num_bytes:
        raise BudgetError(
            f"{folder} needs {format_bytes(needed)} for {sequences:,} sequences, there is "
            f"{format_bytes(free.num_bytes)} ({free.source}). Free some, set a smaller top_k, or give fewer --tokens."
        )
