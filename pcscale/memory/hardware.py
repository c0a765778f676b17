"""How fast a machine is: named GPUs by their vendor's figures, and measurements of this machine kept in a file."""

import json
import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

from pcscale.common.console import console
from pcscale.common.errors import RequestError
from pcscale.common.files import read_json, write_json

Dtype = Literal["float32", "bfloat16"]
RECORD_FORMATS = ("float32/32bit", "float32/8bit", "bfloat16/32bit", "bfloat16/8bit")
"""`record_dtype` and `moments`, as run.yaml has them."""
CALIBRATION_NAME = "calibration.json"
"""In the cache folder (common/cache.py)."""


@dataclass(frozen=True)
class Hardware:
    """What one rank computes with: a GPU, or the processors of a host without one.

    On a host without a GPU the device is the host: its memory is the device's, and `bus_bandwidth` that of one thread's
    copy from memory to memory.
    """

    name: str
    """What it is called."""
    origin: str
    """Where the figures come from, for whoever reads a prediction."""
    product_rates: dict[Dtype, float]
    """Of the sweep's matrix products, by their dtype; float32 is TF32 on a GPU. Units: FLOP/s."""
    training_rates: dict[Dtype, float]
    """Of a stock model's forward and backward, everything between the products included; on a GPU float32 is not TF32
    there. Units: FLOP/s."""
    memory_bandwidth: float
    """Of the memory that is computed in, bytes read and written added up. Units: bytes/s."""
    bus_bandwidth: float
    """Between host and device, in each direction. Units: bytes/s."""
    disk_read_bandwidth: float
    """Units: bytes/s."""
    disk_write_bandwidth: float
    """Synced. Units: bytes/s."""
    rank_bandwidth: float
    """What a rank sends, and receives at the same time, in a collective. Units: bytes/s."""
    update_seconds: dict[str, float]
    """Of the optimizer's update of one value, by `RECORD_FORMATS`. Units: seconds/value."""
    decode_seconds: float
    """Of decoding one value of the 8-bit base to the dtype of the products. Units: seconds/value."""
    device_bytes: int | None
    """The GPU's memory; None: there is none. Units: bytes."""

    def __post_init__(self) -> None:
        rates = [value for field in fields(self) if field.name not in _NO_RATES for value in _values(self, field.name)]
        rates += [] if self.device_bytes is None else [self.device_bytes]
        if not all(isinstance(rate, float | int) and 0 < rate < math.inf for rate in rates):
            raise ValueError(f"{self.name}: every figure of a machine is positive and finite")
        if set(self.product_rates) != _DTYPES or set(self.training_rates) != _DTYPES:
            raise ValueError(f"{self.name}: rates are of {' and '.join(sorted(_DTYPES))}")
        if set(self.update_seconds) != set(RECORD_FORMATS):
            raise ValueError(f"{self.name}: updates are of {', '.join(RECORD_FORMATS)}")

    @property
    def on_gpu(self) -> bool:
        return self.device_bytes is not None


_NO_RATES = ("name", "origin", "device_bytes")
_DTYPES = set(get_args(Dtype))


def _values(hardware: Hardware, name: str) -> list[Any]:
    value = getattr(hardware, name)
    return list(value.values()) if isinstance(value, dict) else [value]


PRODUCT_EFFICIENCY = 0.7
"""Of the dense peak, for products as large as the sweep's. Assumed: not measured by pcscale."""
TRAINING_EFFICIENCY = 0.4
"""The same for forward and backward, attention and everything element by element included. Assumed."""
MEMORY_EFFICIENCY = 0.8
"""Of the memory's peak bandwidth, for large element-wise work. Assumed."""
PCIE_BANDWIDTH = {4: 25e9, 5: 50e9}
"""16 lanes, pinned, by generation: 0.8 of the 31.5 and 63 GB/s that the lanes carry. Assumed."""
LINK_EFFICIENCY = 0.7
"""Of NVLink's peak in one direction. Assumed."""
NVME_READ_BANDWIDTH, NVME_WRITE_BANDWIDTH = 5e9, 3e9
"""One NVMe drive of PCIe 4.0 under large sequential files. Assumed."""
HOST_RANK_BANDWIDTH = 0.4e9
"""Of ranks on one host's processors, over gloo. Source: benchmarks/reports/ranks_amd-epyc-2-cores_2026-11-25.md:
1.17 GB a step at stage 1 in the 3.2 s by which it took longer than half of one process's step."""
UPDATE_BYTES = {"float32/32bit": 34, "float32/8bit": 60, "bfloat16/32bit": 124, "bfloat16/8bit": 150}
"""What one update of a value reads and writes on a GPU, counted in projection/adamw.py: 28 of the fused kernel and 6 of
a bfloat16 gradient's copy; with 8-bit moments 10 to decode and 16 to code them; with bfloat16 values 6 of their copy
and 84 of the kernels of stochastic rounding."""
DECODE_BYTES = 5
"""The same for one value of the 8-bit base: 1 read, 4 written."""


def _gpu(
    name: str, tf32: float, bf16: float, float32: float, memory: float, device_gb: int, pcie: int, link: float | None
) -> Hardware:
    """A GPU from its vendor's dense peaks.

    Args:
        tf32, bf16: of the tensor cores, accumulating in float32. Units: TFLOP/s.
        float32: without tensor cores. Units: TFLOP/s.
        memory: its peak bandwidth. Units: GB/s.
        device_gb: decimal: what the name says beyond that, the driver takes.
        pcie: generation.
        link: NVLink in one direction; None: ranks talk over PCIe. Units: GB/s.
    """
    bandwidth = memory * 1e9 * MEMORY_EFFICIENCY
    return Hardware(
        name=name,
        origin=f"vendor's figures × {PRODUCT_EFFICIENCY:g} (products) and {TRAINING_EFFICIENCY:g} (training); "
        f"disk: an NVMe of {NVME_READ_BANDWIDTH / 1e9:g}/{NVME_WRITE_BANDWIDTH / 1e9:g} GB/s; not measured",
        product_rates={"float32": tf32 * 1e12 * PRODUCT_EFFICIENCY, "bfloat16": bf16 * 1e12 * PRODUCT_EFFICIENCY},
        training_rates={
            "float32": float32 * 1e12 * TRAINING_EFFICIENCY,
            "bfloat16": bf16 * 1e12 * TRAINING_EFFICIENCY,
        },
        memory_bandwidth=bandwidth,
        bus_bandwidth=PCIE_BANDWIDTH[pcie],
        disk_read_bandwidth=NVME_READ_BANDWIDTH,
        disk_write_bandwidth=NVME_WRITE_BANDWIDTH,
        rank_bandwidth=PCIE_BANDWIDTH[pcie] if link is None else link * 1e9 * LINK_EFFICIENCY,
        update_seconds={form: moved / bandwidth for form, moved in UPDATE_BYTES.items()},
        decode_seconds=DECODE_BYTES / bandwidth,
        device_bytes=device_gb * 10**9,
    )


HARDWARE: dict[str, Hardware] = {
    gpu.name: gpu
    for gpu in (
        _gpu("rtx-3090", 35.6, 71.0, 35.6, 936, 24, 4, None),
        _gpu("rtx-4090", 82.6, 165.2, 82.6, 1008, 24, 4, None),
        _gpu("l40s", 183.0, 362.0, 91.6, 864, 48, 4, None),
        _gpu("a100-40gb", 156.0, 312.0, 19.5, 1555, 40, 4, 300),
        _gpu("a100-80gb", 156.0, 312.0, 19.5, 2039, 80, 4, 300),
        _gpu("h100-80gb", 494.7, 989.4, 66.9, 3352, 80, 5, 450),
        _gpu("h200-141gb", 494.7, 989.4, 66.9, 4800, 141, 5, 450),
    )
}
"""GPUs by name; A100, H100 and H200 are those of SXM boards. Source: NVIDIA's GA102 (2021) and Ada (2022) architecture
whitepapers, the A100, L40S, H100 and H200 data sheets; dense figures, half of those with sparsity."""


def named_hardware(name: str) -> Hardware:
    """A machine of `HARDWARE`.

    Raises:
        RequestError: there is none of that name.
    """
    if name not in HARDWARE:
        raise RequestError(f"'{name}' is no machine that pcscale knows: expected one of {', '.join(HARDWARE)}.")
    return HARDWARE[name]


def machine_key(root: Path = Path("/")) -> str:
    """What tells machines apart whose speeds differ: processor, cores, GPUs, threads, and torch's version.

    Args:
        root: where /proc is.
    """
    environment = {name: os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = ""
    gpus = sorted(root.glob("proc/driver/nvidia/gpus/*/information"))
    parts: dict[str, Any] = {
        "cpu": _match(root / "proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": [_match(path, r"Model:\s*(.+)") for path in gpus],
        "torch": torch,
        **environment,
    }
    return json.dumps(parts, sort_keys=True)


def _match(path: Path, pattern: str) -> str:
    try:
        match = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    return match[1].strip() if match else ""


def read_calibration(path: Path, key: str | None = None) -> Hardware | None:
    """What was measured on this machine; None: nothing yet, and a warning where the file is broken.

    Args:
        path: the file, most often `cache_folder() / CALIBRATION_NAME`.
        key: of the machine; None: this one.
    """
    found = _read_all(path).get(machine_key() if key is None else key)
    if found is None:
        return None
    try:
        return Hardware(**found)
    except (TypeError, ValueError, AttributeError) as error:
        _warn_broken(path, str(error))
        return None


def write_calibration(path: Path, hardware: Hardware, key: str | None = None) -> None:
    """Keep what was measured on this machine beside that of others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**_read_all(path), machine_key() if key is None else key: asdict(hardware)})


def _read_all(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        document = read_json(path)
    except (RequestError, OSError) as error:
        _warn_broken(path, str(error.__cause__ or error))
        return {}
    if isinstance(document, dict):
        return document
    _warn_broken(path, "it holds no JSON object")
    return {}


def _warn_broken(path: Path, reason: str) -> None:
    console.warn(f"{path} cannot be used and is measured anew: {reason}")
