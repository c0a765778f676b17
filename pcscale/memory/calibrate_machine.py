"""How fast this machine is, measured in some twenty seconds with what a step is made of. Needs torch.

Every figure is the median of some runs after one that is not counted: first calls compile, and touch fresh memory.
"""

import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from pcscale.base.weight import FrozenWeight, encode_weight
from pcscale.common.console import Tracker, console
from pcscale.common.files import readable_os_errors
from pcscale.common.sizes import QUANTISED_BLOCK
from pcscale.memory.hardware import HOST_RANK_BANDWIDTH, RECORD_FORMATS, Dtype, Hardware
from pcscale.projection.adamw import AdamW, update
from pcscale.projection.record import Moment, Trained
from pcscale.projection.sweep import tf32_products
from pcscale.storage.blockwise import Blockwise
from pcscale.storage.host_memory import HostBytes

MAX_RUNS = 5
BUDGET_SECONDS = 1.5
"""A measurement ends after so many runs, or after this time with at least one that counts."""
DISK_BYTES, COPY_BYTES = 2**28, 2**28
_SIDE = 2048
"""Of the matrices that are updated and decoded."""
_PRODUCTS = {"cpu": (1024, 2048, 5632), "cuda": (3072, 4096, 14336)}
"""Widths o, O and I of the products: those of a base of 1B, or of 8B where there is a GPU."""
_STACK = {"cpu": (768, 2048, 12, 512, 1), "cuda": (2048, 5632, 16, 1024, 4)}
"""Of the two layers that are trained: hidden size, ffn, heads, tokens of a sequence, sequences."""
_SLOW_PRODUCTS, _SLOW_STACK = (128, 256, 512), (768, 2048, 12, 32, 1)
"""The same in bfloat16 on processors, which may take a hundred times as long."""
_LAYERS = 2
_BUSY_PERCENT = 20.0
_DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def calibrate_machine(scratch: Path) -> Hardware:
    """Measure this machine.

    Args:
        scratch: a folder on the disk that runs will write to; a file of 256 MiB is written there and removed.

    Raises:
        RunError, RequestError: the disk is full, or the folder cannot be written.

    Memory: about 1 GiB of the host's, or 2 GiB of a GPU's.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    busy = _others_compute()
    measurements = 4 + 2 * len(_DTYPES) + len(RECORD_FORMATS) + on_gpu
    with (
        console.progress("measure the machine", measurements, "measurements") as progress,
        torch.random.fork_rng(),  # A run that follows draws the numbers that it would have drawn.
    ):
        training: dict[Dtype, float] = {name: _training_rate(name, device, progress) for name in _DTYPES}
        products: dict[Dtype, float] = {name: _product_rate(name, device, progress) for name in _DTYPES}
        updates = {form: _update_seconds(form, device, progress) for form in RECORD_FORMATS}
        decode, copied = _decode_seconds(device, progress), _copy_bandwidth(device, progress)
        bus, (read, write) = _bus_bandwidth(progress), _disk_bandwidths(scratch, progress)
    return Hardware(
        name=torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads of this host",
        origin=f"measured here on {date.today().isoformat()}" + ", while others computed as well" * busy,
        product_rates=products,
        training_rates=training,
        memory_bandwidth=copied,
        bus_bandwidth=bus,
        disk_read_bandwidth=read,
        disk_write_bandwidth=write,
        # One process cannot measure it: GPUs are taken to talk over the bus.
        rank_bandwidth=bus if on_gpu else HOST_RANK_BANDWIDTH,
        update_seconds=updates,
        decode_seconds=decode,
        device_bytes=torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
    )


def _others_compute() -> bool:
    """Whether the processors are busy before anything is measured."""
    busy_percent = psutil.cpu_percent(interval=0.3)
    if busy_percent > _BUSY_PERCENT:
        console.warn(f"other programs keep the processors {busy_percent:.0f} % busy: measure again when they are done.")
    return busy_percent > _BUSY_PERCENT


def _training_rate(name: Dtype, device: torch.device, progress: Tracker) -> float:
    """Operations a second of forward and backward through stock layers."""
    from transformers import AutoModel, LlamaConfig

    slow, dtype = name == "bfloat16" and device.type == "cpu", _DTYPES[name]
    hidden, ffn, heads, length, batch = _SLOW_STACK if slow else _STACK[device.type]
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads}
    config = LlamaConfig(**sizes, num_hidden_layers=_LAYERS, vocab_size=8)
    with device:
        model = AutoModel.from_config(config, dtype=dtype).train()
        hidden_BTH = torch.randn(batch, length, hidden, dtype=dtype, requires_grad=True)
    for parameter in model.parameters():
        if hasattr(parameter, "grad_dtype"):
            parameter.grad_dtype = torch.float32  # As a run has it.

    def run() -> None:
        model(inputs_embeds=hidden_BTH, use_cache=False).last_hidden_state.float().square().mean().backward()
        model.zero_grad(set_to_none=True)
        hidden_BTH.grad = None

    multiplied = _LAYERS * (4 * hidden**2 + 3 * hidden * ffn + hidden * length)
    rate = 6 * multiplied * length * batch / _median_seconds(run, device)
    progress.advance(1, f"training: {rate / 1e9:,.0f} GFLOP/s in {name}")
    return rate


def _product_rate(name: Dtype, device: torch.device, progress: Tracker) -> float:
    """Operations a second of a visit's products: of the shapes and the layouts that a sweep has."""
    slow, dtype = name == "bfloat16" and device.type == "cpu", _DTYPES[name]
    o, O, I = _SLOW_PRODUCTS if slow else _PRODUCTS[device.type]
    W_OI, p_oO, p_Io, G_oo = (
        torch.randn(shape, dtype=dtype, device=device) for shape in ((O, I), (o, O), (I, o), (o, o))
    )

    def run() -> tuple[torch.Tensor, ...]:
        Y_Oo = W_OI @ p_Io
        return p_oO @ Y_Oo, G_oo @ Y_Oo.T, W_OI.T @ (p_oO.T @ G_oo)

    with tf32_products():
        seconds = _median_seconds(run, device)
    rate = 2 * (2 * O * I * o + 3 * o * O * o) / seconds
    progress.advance(1, f"products: {rate / 1e9:,.0f} GFLOP/s in {name}")
    return rate


def _update_seconds(form: str, device: torch.device, progress: Tracker) -> float:
    """Seconds of one value's update."""
    settings = AdamW(1, 1e-4, (0.9, 0.95), 1e-8, 0.0)
    seconds = 0.0
    for side in (QUANTISED_BLOCK, _SIDE):  # The first, small one loads what 8 bits need, which may take seconds.
        trained, gradient = _trained(form, side, device), torch.randn(side, side, device=device)
        action = partial(update, trained, gradient, settings, key=1)
        seconds = _median_seconds(action, device) / gradient.numel()
    progress.advance(1, f"update in {form}: {seconds * 1e9:.2g} ns a value")
    return seconds


def _trained(form: str, side: int, device: torch.device) -> Trained:
    kept, moments = form.split("/")
    value = torch.zeros(side, side, dtype=getattr(torch, kept), device=device)
    return Trained(value, _moment(value, moments, True), _moment(value, moments, False))


def _moment(value: torch.Tensor, moments: str, signed: bool) -> Moment:
    if moments == "32bit":
        return torch.zeros_like(value, dtype=torch.float32)
    codes = torch.ones_like(value, dtype=torch.uint8)
    return Blockwise(codes, torch.ones(value.numel() // QUANTISED_BLOCK, device=value.device), signed)


def _decode_seconds(device: torch.device, progress: Tracker) -> float:
    """Seconds of one value of the 8-bit base."""
    values = torch.randn(_SIDE // 8, _SIDE)
    codes, scales = torch.empty(values.shape, dtype=torch.uint8), torch.empty(values.numel() // QUANTISED_BLOCK)
    encode_weight(values, codes, scales)
    coded = FrozenWeight(codes.repeat(8, 1), scales.repeat(8)).to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    seconds = _median_seconds(lambda: coded.rows(dtype), device) / coded.values.numel()
    progress.advance(1, f"8-bit base: {seconds * 1e9:.2g} ns a value")
    return seconds


def _copy_bandwidth(device: torch.device, progress: Tracker) -> float:
    """Bytes a second that the memory which is computed in reads and writes."""
    source, target = (torch.ones(COPY_BYTES // 4, device=device) for _ in range(2))
    rate = 2 * COPY_BYTES / _median_seconds(lambda: target.copy_(source), device)
    progress.advance(1, f"memory: {rate / 1e9:.3g} GB/s")
    return rate


def _bus_bandwidth(progress: Tracker) -> float:
    """Bytes a second between the homes of records: host and device; without a GPU one thread's copy of memory."""
    if not torch.cuda.is_available():
        one, other = (np.ones(COPY_BYTES, dtype=np.uint8) for _ in range(2))
        rate = COPY_BYTES / _median_seconds(lambda: np.copyto(other, one), torch.device("cpu"))
        progress.advance(1, f"a thread's copy: {rate / 1e9:.3g} GB/s")
        return rate
    device = torch.device("cuda")
    pinned, there = HostBytes(COPY_BYTES), torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    slowest = 0.0
    for target, source in ((there, pinned.bytes), (pinned.bytes, there)):
        slowest = max(slowest, _median_seconds(lambda t=target, s=source: t.copy_(s, non_blocking=True), device))
        progress.advance(1, f"host and device: {COPY_BYTES / slowest / 1e9:.3g} GB/s")
    return COPY_BYTES / slowest


def _disk_bandwidths(scratch: Path, progress: Tracker) -> tuple[float, float]:
    """Bytes a second of reading, from the disk itself where the system can forget a file, and of writing, synced."""
    path = scratch / ".pcscale-disk-probe"
    block = memoryview(os.urandom(2**22))
    with readable_os_errors(path):
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            write_seconds = _median_seconds(lambda: _write(path, block), torch.device("cpu"))
            read_seconds = _median_seconds(lambda: _read(path), torch.device("cpu"))
        finally:
            path.unlink(missing_ok=True)
    read, write = DISK_BYTES / read_seconds, DISK_BYTES / write_seconds
    progress.advance(1, f"disk: {read / 1e9:.3g} GB/s read, {write / 1e9:.3g} GB/s written")
    return read, write


def _write(path: Path, block: memoryview) -> None:
    with path.open("wb", buffering=0) as file:
        for _ in range(DISK_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())


def _read(path: Path) -> None:
    buffer = bytearray(2**22)
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.readinto(buffer):
            pass


def _median_seconds(action: Callable[[], object], device: torch.device) -> float:
    """The median time of some runs; of the first one alone where that takes longer than all may."""
    times: list[float] = []
    started = time.perf_counter()
    while len(times) <= MAX_RUNS:
        before = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - before)
        if time.perf_counter() - started > BUDGET_SECONDS and (len(times) > 1 or times[0] > BUDGET_SECONDS):
            break
    return statistics.median(times[1:] or times)
