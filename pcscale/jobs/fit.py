"""Checks that a run fits where it is started, before any work: memory, disk, the merge's cap, and its writer."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pcscale.common.console import console
from pcscale.common.errors import BudgetError, RequestError
from pcscale.common.files import TEMPORARY_PREFIX, readable_os_errors
from pcscale.common.topology import ALONE
from pcscale.common.units import format_bytes, parse_bytes
from pcscale.config.schema import PlanConfig
from pcscale.distributed.zero_form import ZeroForm
from pcscale.jobs.build import state_of
from pcscale.jobs.run import Run
from pcscale.memory.choose import Budget, Choice, candidates, cheapest_fitting
from pcscale.memory.deployment import ONE_GPU, Deployment
from pcscale.memory.limits import Limit, device_limit, disk_free, host_left, host_limit
from pcscale.memory.predict import Prediction
from pcscale.memory.process import anonymous_bytes
from pcscale.memory.shared import KNOBS
from pcscale.memory.working import merge_need_bytes
from pcscale.merging.merge import try_writer
from pcscale.projection.layout import check_rank, record_bytes, record_format
from pcscale.projection.owners import owned_matrices
from pcscale.projection.record_files import check_disk
from pcscale.projection.residency import check_budget
from pcscale.run.folder import RunFolder
from pcscale.storage.blockwise import require_bitsandbytes

DEVICE_SIZES = (8, 16, 24, 48, 80)
"""Devices that a report answers for. Units: GB."""


def deployment_of(run: Run) -> Deployment:
    """The devices and ranks that the run is spread over."""
    world_size = run.group.topology.world_size
    zero = ZeroForm.read(run.engine.zero) if run.engine and run.group is not ALONE else None
    of_a_host = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return Deployment(run.device.type != "cpu", world_size, of_a_host, zero)


def predict(run: Run) -> dict[str, Any]:
    """The contents of plan.json: the run on this machine, and what other GPUs would need."""
    prediction = Prediction(run.plan, run.config, deployment_of(run))
    return prediction.document(run.base.name) | {"devices": _devices(prediction)}


def _devices(prediction: Prediction) -> list[dict[str, Any]]:
    """One GPU of each size: if it would do, and what would have to change."""
    config = prediction.config
    plain = config.model_copy(
        update={"deepspeed": None, "base_home": "disk" if config.base_home == "zero" else config.base_home}
    )
    on_one = Prediction(prediction.plan, plain, ONE_GPU)
    as_it_is = on_one.needs["device"]
    sizes = [size * 10**9 for size in DEVICE_SIZES]
    others = list(candidates(on_one, Budget(sizes[0]))) if as_it_is > sizes[0] else []
    found = []
    for device_bytes in sizes:
        change = ""
        if as_it_is > device_bytes:
            choice = cheapest_fitting(others, Budget(device_bytes))
            change = "does not fit" if choice is None else _changes(choice, plain)
        found.append({"device_bytes": device_bytes, "fits": change != "does not fit", "change": change})
    return found


def _changes(choice: Choice, config: PlanConfig) -> str:
    changed = [key for key in KNOBS if getattr(choice.config, key) != getattr(config, key)]
    words = [f"{key}: {str(getattr(choice.config, key)).lower()}" for key in changed]
    needs = f"host memory {format_bytes(choice.needs['host'])}, disk {format_bytes(choice.needs['disk'])}"
    return f"{', '.join(words)} ({needs})"


def check_fit(document: dict[str, Any], run: Run, force: bool) -> None:
    """Refuse a run whose prediction is more than there is; warn of one that fits only once other processes have ended.

    Args:
        force: only warn.

    Raises:
        BudgetError: with what is missing, and what would need less.
    """
    deployment = deployment_of(run)
    problems = []
    for label, key, limit, sharing in _limits(run.folder, deployment):
        phase = max(document["peak"], key=lambda phase: document["peak"][phase][key])
        needed = document["peak"][phase][key] * sharing
        if limit.num_bytes is not None and needed > limit.num_bytes:
            problems.append(
                f"phase {phase} needs {format_bytes(needed)} of {label}, "
                f"there is {format_bytes(limit.num_bytes)} ({limit.source})"
            )
    if not problems:
        _warn_of_others(document, deployment)
        return
    message = f"the run does not fit: {'; '.join(problems)}."
    if not force:
        raise BudgetError(
            f"{message} `pcscale plan` with --device-memory, --host-memory and --disk finds settings that do; "
            "--force runs it all the same."
        )
    console.warn(message)


def _warn_of_others(document: dict[str, Any], deployment: Deployment) -> None:
    needed = deployment.sharing * max(peak["host_bytes"] for peak in document["peak"].values())
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


def _limits(folder: RunFolder, deployment: Deployment) -> list[tuple[str, str, Limit, int]]:
    """Each resource by name, its key in a plan's peaks, what there is of it, and how many ranks share it."""
    free = disk_free(folder.path)
    if free.num_bytes is not None:
        # What the run has written already is its own.
        found = (path.stat() for path in folder.path.rglob("*") if path.is_file())
        own = sum({status.st_ino: status.st_blocks * 512 for status in found}.values())
        free = replace(free, num_bytes=free.num_bytes + own)
    found = [("host memory", "host_bytes", host_limit(), deployment.sharing), ("disk", "disk_bytes", free, 1)]
    return found + ([("device memory", "device_bytes", device_limit(), 1)] if deployment.on_gpu else [])


def say_plan(document: dict[str, Any], run: Run) -> None:
    """Print the plan, and the limits that it fits."""
    base, compressed = document["base"], document["compressed"]
    console.info(
        f"{base['name']}: {base['parameters']:,} → {compressed['parameters']:,} parameters "
        f"({compressed['keep_fraction']:.1%}), hidden {compressed['hidden_size']}, "
        f"ffn {compressed['intermediate_size']}"
    )
    for label, key, limit, sharing in _limits(run.folder, deployment_of(run)):
        of = "" if limit.num_bytes is None else f" of {format_bytes(limit.num_bytes)} ({limit.source})"
        peaks = ", ".join(f"{phase} {format_bytes(peak[key] * sharing)}" for phase, peak in document["peak"].items())
        console.info(f"predicted {label}{of}: {peaks}")
    held = document["phases"]["train"]["components"]
    in_memory = [(part["bytes"], name) for name, part in held.items() if part["home"] != "disk"]
    largest = sorted(in_memory, reverse=True)[:5]
    console.info("training holds most for: " + ", ".join(f"{name} {format_bytes(size)}" for size, name in largest))


def check_requests(run: Run) -> None:
    """Refuse a rank, a budget or a cap that a later part cannot keep.

    Raises:
        RequestError, BudgetError, RunError: with the least that would do.
    """
    config = run.config
    least = merge_need_bytes(run.plan, config.rank, config.rotates)
    if parse_bytes(config.max_memory) < least:
        raise BudgetError(f"max_memory {config.max_memory} is too small for the merge: give at least {least} bytes.")
    if config.memory_snapshot and run.device.type == "cpu":
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
        check_rank(run.plan.matrices, config.rank)
        sizes = {planned.name: record_bytes(planned, record_format(config)) for planned in run.plan.matrices}
        owned = owned_matrices(list(run.plan.matrices), config.rank, run.group.topology)
        check_budget(state_of(config, run.folder), [sizes[name] for name in owned])
        if config.residency == "disk":
            check_disk(run.folder.residency.absolute(), list(sizes.values()))


def try_merge(run: Run) -> None:
    """Open and discard what the merge will write, so that its target is found wanting at step 0, not at the end."""
    with (
        readable_os_errors(run.folder.path),
        tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=run.folder.path) as scratch,
    ):
        try_writer(run.plan, run.base, Path(scratch), parse_bytes(run.config.max_shard_size))
