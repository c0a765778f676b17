"""The speed of this machine, measured in about a minute with the code that runs use: training steps on a random base
of two layers, updates of one record, copies, and a file that is synced."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from pcscale.base.weight import FrozenWeight
from pcscale.calibration.score import random_scores
from pcscale.calibration.select import select
from pcscale.common.console import console
from pcscale.common.files import readable_os_errors
from pcscale.common.ledger import ledger
from pcscale.config.schema import PlanConfig
from pcscale.families.plan import Plan
from pcscale.families.registry import FAMILIES
from pcscale.families.widths import plan_widths
from pcscale.memory.deployment import Deployment
from pcscale.memory.predict import Prediction
from pcscale.memory.speed import FORMATS, Dtype, Speed
from pcscale.model.compressed import build_compressed
from pcscale.model.loss import NextTokenLoss
from pcscale.projection.adamw import AdamW, update
from pcscale.projection.compression import Compression
from pcscale.projection.layout import DELTA_IN, RecordFormat, record_layout
from pcscale.projection.record import FixedSides, MatrixRecord, views_of
from pcscale.projection.starts import Start, start_tensors
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.storage.host_memory import HostBytes
from pcscale.training.step import training_step

SHAPES = {"cpu": (1024, 2816, 512), "cuda": (3072, 8192, 4096)}
"""The base's hidden size and ffn, which are halved, and the tokens of a step: large enough for products to outweigh
what goes on around them."""
RUNS, BUDGET_SECONDS = 4, 10.0
"""A measurement ends after so many runs beside the first, or after this time with at least one of them."""
COPY_BYTES = FILE_BYTES = 2**28
HEADS, VOCAB, SEQUENCE = 8, 1024, 256


def measure_speed(scratch: Path) -> Speed:
    """Measure this machine.

    Args:
        scratch: a folder on the disk that runs will write to; a file of 256 MiB is written there and removed.

    Raises:
        RunError, RequestError: the disk is full, or the folder cannot be written.

    Memory: about 1 GiB of the host's, or 6 GiB of a GPU's.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads of this host"
    console.info("measuring this machine, which takes about a minute")
    with torch.random.fork_rng():  # A run that follows draws the numbers that it would have drawn.
        plan, tokens = _plan(device), SHAPES[device.type][2]
        updates = {form: _update_seconds(plan, form, device) for form in FORMATS}
        rates = {dtype: _step_rates(plan, dtype, tokens, device, updates["float32/32bit"]) for dtype in get_args(Dtype)}
        read, write = _file_seconds(scratch)
    return Speed(
        name=name,
        on_gpu=device.type == "cuda",
        train_flops={dtype: train for dtype, (train, _) in rates.items()},
        sweep_flops={dtype: sweep for dtype, (_, sweep) in rates.items()},
        update_seconds=updates,
        bus=COPY_BYTES / _copy_seconds(device),
        disk_read=FILE_BYTES / read,
        disk_write=FILE_BYTES / write,
    )


def _plan(device: torch.device) -> Plan:
    hidden, ffn, _ = SHAPES[device.type]
    config = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": hidden // HEADS,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
    }
    return plan_widths(FAMILIES["llama"], {"model_type": "llama", **config}, hidden // 2, ffn // 2)


class _RandomBase:
    """A base that was never stored: random weights, where products need them."""

    placement, collective = "device", False

    def __init__(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> None:
        self.coded_fingerprints: dict[str, str] = {}
        self._weights = {
            planned.name: torch.randn(planned.base_shape, device=device).mul_(0.02).to(dtype)
            for planned in plan.weights
        }

    @property
    def stored(self) -> Any:
        raise AssertionError("a random base comes from no checkpoint")

    def tensor(self, name: str) -> torch.Tensor:
        return self._weights[name].cpu()

    def weight(self, name: str) -> FrozenWeight:
        return FrozenWeight(self._weights[name])

    def lost(self, name: str, rows: slice) -> None:
        return None

    def prefetch(self, names: list[str]) -> None:
        """Nothing to do: they are in memory."""


class _Stopwatch:
    """Seconds by stage, as the ledger is told of them."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str | None, float] = {}
        self._device, self._stage, self._since = device, None, time.perf_counter()

    def change(self, stage: str | None) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now

    def mark_idle(self) -> None:
        """Nothing to do: it measures no memory."""


def _step_rates(plan: Plan, dtype: str, tokens: int, device: torch.device, update: float) -> tuple[float, float]:
    """Operations a second of forward and backward, and of a sweep without its updates.

    Args:
        update: seconds of one value's update.
    """
    batch = max(1, tokens // SEQUENCE)
    config = PlanConfig(
        base="random",
        bf16=dtype == "bfloat16",
        start="selection",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        sequence_length=SEQUENCE,
    )
    work = Prediction(plan, config, Deployment(on_gpu=device.type == "cuda")).work
    # As it is stored in a checkpoint of the dtype that products have: nothing is converted.
    base = _RandomBase(plan, getattr(torch, dtype) if device.type == "cuda" else torch.float32, device)
    start = Start(select(plan, random_scores(plan, seed=0)))
    tensors = start_tensors(plan, start, base.tensor, device)
    model = build_compressed(plan, tensors, device, getattr(torch, dtype))
    optimizer = ProjectedAdamW(Compression(model, plan, base, start), lr=1e-6)
    loss_module = optimizer.engine.take_over(NextTokenLoss(model))
    ids_BT = torch.randint(VOCAB, (batch, SEQUENCE))

    def step() -> dict[str | None, float]:
        stopwatch, listener = _Stopwatch(device), ledger.listener
        ledger.listener = stopwatch
        try:
            training_step(loss_module, optimizer, [ids_BT], 1, 1.0)
        finally:
            ledger.listener = listener
        return stopwatch.seconds

    steps = _repeat(step)
    passes = statistics.median(seconds["forward"] + seconds["backward"] for seconds in steps)
    sweep = statistics.median(seconds["sweep"] for seconds in steps)
    updating = update * sum(work.updates.values())
    return work.train_flops / passes, work.sweep_flops / max(sweep - updating, sweep / 2)


def _update_seconds(plan: Plan, form: str, device: torch.device) -> float:
    """Seconds of the update of one value whose record has this format."""
    dtype, moments = form.split("/")
    planned = max(plan.matrices, key=lambda planned: planned.base_shape[0] * planned.base_shape[1])
    layout = record_layout(planned, RecordFormat(dtype, moments))  # pyright: ignore[reportArgumentType]
    memory = torch.zeros(sum(spec.num_bytes for spec in layout.values()), dtype=torch.uint8, device=device)
    trained = MatrixRecord.of(FixedSides(None), views_of(memory, layout)).parts[DELTA_IN[0]]
    gradient = torch.randn(trained.value.shape, device=device)
    settings = AdamW(1, 1e-4, (0.9, 0.95), 1e-8, 0.0)
    return _median_seconds(lambda: update(trained, gradient, settings, key=1), device) / gradient.numel()


def _copy_seconds(device: torch.device) -> float:
    """Seconds of a copy between host and device, in the slower direction; without a GPU of one thread's in memory."""
    if device.type == "cpu":
        one, other = (np.ones(COPY_BYTES, dtype=np.uint8) for _ in range(2))
        return _median_seconds(lambda: np.copyto(other, one), device)
    pinned, there = HostBytes(COPY_BYTES).bytes, torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    ways = ((there, pinned), (pinned, there))
    return max(_median_seconds(lambda a=to, b=of: a.copy_(b, non_blocking=True), device) for to, of in ways)


def _file_seconds(scratch: Path) -> tuple[float, float]:
    """Seconds of reading a file, from the disk itself where the system can forget it, and of writing it, synced."""
    path, block, host = scratch / ".pcscale-disk-probe", os.urandom(2**22), torch.device("cpu")

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for _ in range(FILE_BYTES // len(block)):
                file.write(block)
            os.fsync(file.fileno())

    def read() -> None:
        buffer = bytearray(len(block))
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.readinto(buffer):
                pass

    with readable_os_errors(path):
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            written = _median_seconds(write, host)
            return _median_seconds(read, host), written
        finally:
            path.unlink(missing_ok=True)


def _median_seconds(action: Callable[[], object], device: torch.device) -> float:
    def timed() -> float:
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    return statistics.median(_repeat(timed))


def _repeat(action: Callable[[], Any]) -> list[Any]:
    """The results of some runs after one that is not counted: first calls compile, and touch fresh memory."""
    began, found = time.perf_counter(), []
    while len(found) <= RUNS and (len(found) < 2 or time.perf_counter() - began < BUDGET_SECONDS):
        found.append(action())
    return found[1:]
