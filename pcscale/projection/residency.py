"""The state of the optimizer, how it is kept and where: on the device, in host memory, or as files.

While one matrix is worked on, a thread reads the next one and another writes the one before back (store.py); on a GPU
each has a stream of its own, so that copies run beside the products.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch

from pcscale.common.errors import BudgetError, RequestError
from pcscale.common.units import aligned, format_bytes
from pcscale.projection.layout import overlap_bytes
from pcscale.projection.memory_residency import DeviceResidency, HostResidency, Layouts, Traffic, record_size
from pcscale.projection.record_files import DiskResidency

Residency = DeviceResidency | HostResidency | DiskResidency


@dataclass(frozen=True)
class State:
    """How and where `ProjectedAdamW` keeps what it trains; names and defaults are those of run.yaml.

    Attributes:
        residency: of records and moments: `device`, `cpu` (host memory) or `disk` (files in `folder`).
        pinned_memory: cap on the host memory that the residency takes; None: what lets motion overlap with compute.
            Units: bytes.
        record_dtype: of D and aux; `bfloat16` is rounded stochastically.
        moments: `32bit`, or `8bit` block-wise.
        projection_rank: of D; None: D is kept whole.
        gradient_home: `cpu` accumulates gradients in host memory, out of `parameter.grad`; clip and clear them with
            `clip_grad_norm_` and `zero_grad` of the optimizer.
        seed: of stochastic rounding, and of the fixed factor of a low rank.

    Raises:
        RequestError: a word that is none of these, or residency disk without a folder.
    """

    residency: Literal["device", "cpu", "disk"] = "device"
    folder: Path | None = None
    pinned_memory: int | None = None
    record_dtype: Literal["float32", "bfloat16"] = "float32"
    moments: Literal["32bit", "8bit"] = "32bit"
    projection_rank: int | None = None
    gradient_home: Literal["device", "cpu"] = "device"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(State).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise RequestError(f"{name} is {getattr(self, name)!r}, expected {' or '.join(get_args(kind))}.")
        if self.residency == "disk" and self.folder is None:
            raise RequestError("residency disk keeps records in files. Give State a folder for them.")


def open_residency(state: State, layouts: Layouts, device: torch.device, traffic: Traffic) -> Residency:
    """The residency of the records with these layouts; each is made with `create`.

    Raises:
        BudgetError: `pinned_memory` is less than what this residency needs.
        RunError, RequestError: the folder's disk has no room for the records, or cannot be written.
    """
    sizes = [record_size(layout) for layout in layouts.values()]
    check_budget(state, sizes)
    if state.residency == "device":
        return DeviceResidency(layouts, device)
    overlap = overlap_bytes(sizes)
    if state.residency == "cpu":
        return HostResidency(layouts, device, overlap, traffic)
    assert state.folder is not None, "residency disk is given a folder"
    staging = overlap if state.pinned_memory is None else min(overlap, state.pinned_memory)
    return DiskResidency(layouts, device, state.folder, overlap, staging, traffic)


def check_budget(state: State, sizes: list[int]) -> None:
    """Refuse a budget that records of these sizes cannot keep; the error names the least that would do."""
    if state.residency == "device" or state.pinned_memory is None:
        return
    least = sum(map(aligned, sizes)) if state.residency == "cpu" else max(sizes, default=0)
    if state.pinned_memory < least:
        what = "all records take" if state.residency == "cpu" else "the largest record takes"
        raise BudgetError(
            f"pinned_memory {format_bytes(state.pinned_memory)} is too small for residency {state.residency}: "
            f"{what} {format_bytes(least)}. Give at least {least} bytes."
        )
