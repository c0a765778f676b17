"""Where records live between the sweep's visits: on the device, in host memory, or as files.

While one matrix is worked on, a thread fetches the next one and another puts the one before back (store.py); on a GPU
each has a stream of its own, so that copies run beside the products.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pcscale.common.errors import BudgetError
from pcscale.common.units import aligned, format_bytes
from pcscale.projection.homes import DeviceHome, Home, HostHome, Layouts, Traffic, record_size
from pcscale.projection.layout import overlap_bytes
from pcscale.projection.record_files import DiskHome


@dataclass(frozen=True)
class Residency:
    """Where records and moments live.

    Attributes:
        home: `device`, `cpu` or `disk`.
        folder: of the files; with `disk` alone.
        pinned_bytes: cap on the pinned host memory that this takes; None: what lets motion overlap with compute.
    """

    home: Literal["device", "cpu", "disk"] = "device"
    folder: Path | None = None
    pinned_bytes: int | None = None


ON_DEVICE = Residency()


def open_home(residency: Residency, layouts: Layouts, device: torch.device, traffic: Traffic) -> Home:
    """The home of the records with these layouts; each is made with `create`.

    Raises:
        BudgetError: `pinned_bytes` is less than what this residency needs.
        RunError: the folder's disk has no room for the records.
        RequestError: the folder cannot be written.
    """
    sizes = [record_size(layout) for layout in layouts.values()]
    check_budget(residency, sizes)
    if residency.home == "device":
        return DeviceHome(layouts, device)
    overlap = overlap_bytes(sizes)
    if residency.home == "cpu":
        return HostHome(layouts, device, overlap, traffic)
    assert residency.folder is not None, "residency disk is given a folder"
    staging = overlap if residency.pinned_bytes is None else min(overlap, residency.pinned_bytes)
    return DiskHome(layouts, device, residency.folder, overlap, staging, traffic)


def check_budget(residency: Residency, sizes: list[int]) -> None:
    """Refuse a budget that records of these sizes cannot keep.

    Raises:
        BudgetError: with the least that would do.
    """
    if residency.home == "device" or residency.pinned_bytes is None:
        return
    least = sum(map(aligned, sizes)) if residency.home == "cpu" else max(sizes, default=0)
    if residency.pinned_bytes < least:
        what = "all records take" if residency.home == "cpu" else "the largest record takes"
        raise BudgetError(
            f"pinned_memory {format_bytes(residency.pinned_bytes)} is too small for residency {residency.home}: "
            f"{what} {format_bytes(least)}. Give at least {least} bytes."
        )
