"""Whether a run can fit where it is started, before any work: memory, disk, the merge's cap, and its writer."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pcscale.common.cache import cache_folder
from pcscale.common.console import console
from pcscale.common.errors import BudgetError, RequestError
from pcscale.common.files import TEMPORARY_PREFIX, readable_os_errors
from pcscale.common.topology import ALONE
from pcscale.common.units import format_bytes, format_seconds, parse_bytes
from pcscale.config.schema import RunConfig
from pcscale.distributed.settings import read_engine_settings, without_replicated_bf16
from pcscale.jobs.run import Setup, residency_of
from pcscale.memory.budget import KNOBS, Budget, Choice, candidates, fastest_fitting, needs_of
from pcscale.memory.components import record_format
from pcscale.memory.estimate import plan_document
from pcscale.memory.hardware import CALIBRATION_NAME, named_hardware, read_calibration
from pcscale.memory.limits import Limit, device_limit, disk_free, host_left, host_limit
from pcscale.memory.place import Place, ZeroForm
from pcscale.memory.process import anonymous_bytes
from pcscale.memory.working import merge_need_bytes
from pcscale.merging.merge import try_writer
from pcscale.projection.layout import check_rank, record_bytes
from pcscale.projection.owners import owned_matrices
from pcscale.projection.record_files import check_disk
from pcscale.projection.residency import check_budget
from pcscale.run.folder import RunFolder
from pcscale.storage.blockwise import require_bitsandbytes

DEVICE_SIZES = (8, 16, 24, 48, 80)
"""Devices that a report answers for. Units: GB."""
_ANY_GPU = "a100-80gb"
"""Whose speeds decide between settings where no GPU was named."""


def place_of(setup: Setup, config: RunConfig) -> Place:
    """What the run is spread over."""
    world_size = setup.group.topology.world_size
    zero = None
    if config.deepspeed is not None and setup.group is not ALONE:
        settings, _ = without_replicated_bf16(read_engine_settings(Path(config.deepspeed), config, world_size))
        zero = ZeroForm.read(settings.get("zero_optimization", {}))
    of_a_host = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return Place(setup.device.type != "cpu", world_size, of_a_host, zero)


def predict(setup: Setup, config: RunConfig) -> dict[str, Any]:
    """plan.json: the plan on this machine, its speed where it was calibrated, and what other devices would need."""
    hardware = read_calibration(cache_folder() / CALIBRATION_NAME)
    document = plan_document(setup.plan, config, setup.base.name, place_of(setup, config), hardware)
    return document | {"devices": _devices(setup, config)}


def _devices(setup: Setup, config: RunConfig) -> list[dict[str, Any]]:
    """Whether one GPU of each size would do, and what would have to change."""
    plain = config.model_copy(
        update={"deepspeed": None, "base_home": "disk" if config.base_home == "zero" else config.base_home}
    )
    as_it_is = needs_of(setup.plan, plain, Place())["device"]
    sizes = [size * 10**9 for size in DEVICE_SIZES]
    others = list(candidates(setup.plan, plain, Budget(sizes[0]))) if as_it_is > sizes[0] else []
    found = []
    for device_bytes in sizes:
        change = ""
        if as_it_is > device_bytes:
            choice = fastest_fitting(setup.plan, others, Budget(device_bytes), named_hardware(_ANY_GPU))
            change = "does not fit" if choice is None else _changes(choice, plain)
        found.append({"device_bytes": device_bytes, "fits": change != "does not fit", "change": change})
    return found


def _changes(choice: Choice, config: RunConfig) -> str:
    changed = [key for key in KNOBS if getattr(choice.config, key) != getattr(config, key)]
    words = [f"{key}: {str(getattr(choice.config, key)).lower()}" for key in changed]
    needs = f"host memory {format_bytes(choice.needs['host'])}, disk {format_bytes(choice.needs['disk'])}"
    return f"{', '.join(words)} ({needs})"


def check_fit(document: dict[str, Any], setup: Setup, config: RunConfig, folder: RunFolder, force: bool) -> None:
    """Refuse a run whose prediction is more than there is; warn of one that fits only once other processes have ended.

    Args:
        force: only warn.

    Raises:
        BudgetError: with what is missing, and what would need less.
    """
    place = place_of(setup, config)
    problems = []
    for label, key, limit, sharing in _limits(folder, place):
        phase = max(document["peak"], key=lambda phase: document["peak"][phase][key])
        needed = document["peak"][phase][key] * sharing
        if limit.num_bytes is not None and needed > limit.num_bytes:
            problems.append(
                f"phase {phase} needs {format_bytes(needed)} of {label}, "
                f"there is {format_bytes(limit.num_bytes)} ({limit.source})"
            )
    if not problems:
        _warn_of_others(document, place)
        return
    message = f"the run does not fit: {'; '.join(problems)}."
    if not force:
        raise BudgetError(
            f"{message} `pcscale plan` with --device-memory, --host-memory and --disk finds settings that do; "
            "--force runs it all the same."
        )
    console.warn(message)


def _warn_of_others(document: dict[str, Any], place: Place) -> None:
    needed = place.sharing * max(peak["host_bytes"] for peak in document["peak"].values())
    left = host_left()
    if left.num_bytes is None:
        return
    # What this process holds already is part of what it needs.
    free = left.num_bytes + anonymous_bytes()
    if needed > free:
        console.warn(
            f"the run needs {format_bytes(needed)} of host memory, and other processes leave {format_bytes(free)} "
            f"of it now ({left.source}). It may run out unless they end."
        )


def _limits(folder: RunFolder, place: Place) -> list[tuple[str, str, Limit, int]]:
    """What a resource is called, its key in a plan's peaks, what there is, and how many ranks share it."""
    free = disk_free(folder.path)
    if free.num_bytes is not None:
        # What the run has written already is its own.
        found = (path.stat() for path in folder.path.rglob("*") if path.is_file())
        own = sum({status.st_ino: status.st_blocks * 512 for status in found}.values())
        free = replace(free, num_bytes=free.num_bytes + own)
    found = [("host memory", "host_bytes", host_limit(), place.sharing), ("disk", "disk_bytes", free, 1)]
    return found + ([("device memory", "device_bytes", device_limit(), 1)] if place.on_gpu else [])


def say_plan(document: dict[str, Any], setup: Setup, config: RunConfig, folder: RunFolder) -> None:
    """The plan, and the limits that it fits."""
    base, compressed = document["base"], document["compressed"]
    console.say(
        f"{base['name']}: {base['parameters']:,} → {compressed['parameters']:,} parameters "
        f"({compressed['keep_fraction']:.1%}), hidden {compressed['hidden_size']}, "
        f"ffn {compressed['intermediate_size']}"
    )
    for label, key, limit, sharing in _limits(folder, place_of(setup, config)):
        of = "" if limit.num_bytes is None else f" of {format_bytes(limit.num_bytes)} ({limit.source})"
        peaks = ", ".join(f"{phase} {format_bytes(peak[key] * sharing)}" for phase, peak in document["peak"].items())
        console.say(f"predicted {label}{of}: {peaks}")
    held = document["phases"]["train"]["components"]
    in_memory = [(part["bytes"], name) for name, part in held.items() if part["home"] != "disk"]
    largest = sorted(in_memory, reverse=True)[:5]
    console.say("training holds most for: " + ", ".join(f"{name} {format_bytes(size)}" for size, name in largest))
    seconds = document["step_seconds"]
    if seconds is not None:
        whole = seconds["total"] * config.max_steps
        console.say(f"predicted time: {seconds['total']:.1f} s a step, {format_seconds(whole)} of training")


def check_requests(setup: Setup, config: RunConfig, folder: RunFolder) -> None:
    """Refuse a rank, a budget or a cap that a later part cannot keep.

    Raises:
        RequestError, BudgetError, RunError: with the least that would do.
    """
    least = merge_need_bytes(setup.plan, config.rank, config.rotates)
    if parse_bytes(config.max_memory) < least:
        raise BudgetError(f"max_memory {config.max_memory} is too small for the merge: give at least {least} bytes.")
    if config.memory_snapshot and setup.device.type == "cpu":
        raise RequestError("memory_snapshot records a GPU's allocator, and there is no GPU here. Remove it.")
    if config.memory_snapshot and torch.__version__.startswith("2.11."):
        # github.com/pytorch/pytorch/issues/179536
        raise RequestError(
            f"torch {torch.__version__} fails in the backward pass while its allocator is recorded. "
            "Use another version, or remove memory_snapshot."
        )
    if config.base_precision == "int8" or config.moments == "8bit":
        require_bitsandbytes("base_precision int8" if config.base_precision == "int8" else "moments 8bit")
    if config.method == "projected":
        check_rank(setup.plan.matrices, config.rank)
        sizes = {planned.name: record_bytes(planned, record_format(config)) for planned in setup.plan.matrices}
        owned = owned_matrices(list(setup.plan.matrices), config.rank, setup.group.topology)
        check_budget(residency_of(config, folder), [sizes[name] for name in owned])
        if config.residency == "disk":
            check_disk(folder.residency.absolute(), list(sizes.values()))


def try_merge(setup: Setup, config: RunConfig, folder: RunFolder) -> None:
    """Open and discard what the merge will write, so that its target is found wanting at step 0, not at the end."""
    with (
        readable_os_errors(folder.path),
        tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=folder.path) as scratch,
    ):
        try_writer(setup.plan, setup.base, Path(scratch), parse_bytes(config.max_shard_size))
