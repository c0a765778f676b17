"""The speed of a machine that was measured (jobs/measure.py), kept in the cache folder, and the time of a step on it.

Needs no torch. Nothing is known of machines that were not measured, and of what several ranks send each other.
"""

import hashlib
import os
import platform
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pcscale.common.console import console
from pcscale.common.files import write_json
from pcscale.memory.predict import Prediction

FORWARD_BACKWARD, SWEEP, MOTION, TOTAL = "forward and backward", "sweep", "motion not hidden", "total"
Dtype = Literal["float32", "bfloat16"]
FORMATS = ("float32/32bit", "float32/8bit", "bfloat16/32bit", "bfloat16/8bit")
"""`record_dtype` and `moments` of a record, as run.yaml has them."""
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ByDtype = Annotated[dict[Dtype, Rate], Field(min_length=2)]
ByFormat = Annotated[dict[Annotated[str, Field(pattern=f"^({'|'.join(FORMATS)})$")], Rate], Field(min_length=4)]


class Speed(BaseModel):
    """Rates of one process on one machine, everything included that belongs to what is timed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    """The GPU, or the processor's threads."""
    on_gpu: bool
    train_flops: ByDtype
    """Forward and backward of the compressed model, by its dtype. Units: FLOP/s."""
    sweep_flops: ByDtype
    """The sweep without its updates, by the dtype of its products. Units: FLOP/s."""
    update_seconds: ByFormat
    """One value's update, by the format of its record. Units: seconds/value."""
    bus: Rate
    """Copies between host and device in one direction; without a GPU one thread's in memory. Units: bytes/s."""
    disk_read: Rate
    """Units: bytes/s."""
    disk_write: Rate
    """Synced. Units: bytes/s."""


def step_seconds(prediction: Prediction, speed: Speed) -> dict[str, float] | None:
    """Seconds of one optimizer step on the measured machine, by part; None with several ranks.

    While the sweep works on one matrix, others are read and written: of what moves then only that counts which takes
    longer than the work, the disk beside the bus.

    Returns:
        "forward and backward", "sweep", "motion not hidden", and their "total".
    """
    deployment = prediction.deployment
    if deployment.ranks > 1:
        return None
    if deployment.on_gpu != speed.on_gpu:
        prediction = replace(prediction, deployment=replace(deployment, on_gpu=speed.on_gpu), memo={})
    work, dtype = prediction.work, "bfloat16" if prediction.config.bf16 else "float32"
    sweep = work.sweep_flops / speed.sweep_flops[dtype if speed.on_gpu else "float32"]
    sweep += sum(values * speed.update_seconds[form] for form, values in work.updates.items())
    disk = work.disk_read_bytes / speed.disk_read + work.disk_written_bytes / speed.disk_write
    moving = max(work.bus_bytes / speed.bus, disk)
    parts = {
        FORWARD_BACKWARD: work.train_flops / speed.train_flops[dtype],
        SWEEP: sweep,
        MOTION: max(0.0, moving - sweep) + work.gradient_bytes / speed.bus,
    }
    return {**parts, TOTAL: sum(parts.values())}


def speed_file(cache: Path, root: Path = Path("/")) -> Path:
    """The file of this machine's speed: processors, threads and GPUs tell machines apart.

    Args:
        cache: most often `cache_folder()` (common/cache.py).
        root: where /proc is.
    """
    gpus = sorted(root.glob("proc/driver/nvidia/gpus/*/information"))
    parts = [
        _match(root / "proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.processor() or platform.machine(),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        *(_match(path, r"Model:\s*(.+)") for path in gpus),
        *(os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")),
    ]
    return cache / f"speed-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.json"


def _match(path: Path, pattern: str) -> str:
    match = re.search(pattern, path.read_text(errors="replace")) if path.is_file() else None
    return match[1].strip() if match else ""


def read_speed(path: Path) -> Speed | None:
    """The speed in a file; None: there is none, or, with a warning, it is broken."""
    try:
        return Speed.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as error:
        console.warn(f"{path} cannot be used ({' '.join(str(error).split())}): measure the machine anew.")
        return None


def write_speed(path: Path, speed: Speed) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, speed.model_dump())
