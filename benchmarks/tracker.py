"""Cost of measuring memory: steps of SmolLM2-135M cut to half, with and without the memory meter of `pcscale
compress` around them, in one process, alternating; medians. Beside the whole steps, which noise on a machine can hide
it in: the time of one sample and of one change of stage, times how often a step takes them."""

import statistics
import time
from pathlib import Path

import torch

from benchmarks.report import Row
from benchmarks.step_time import half_of_smollm2
from pcscale.common.ledger import ledger
from pcscale.memory.measure import INTERVAL_SECONDS, MemoryMeter, Series

REPEATS, STEPS = 8, 2
SEQUENCES, SEQUENCE_LENGTH = 4, 256
STAGES_PER_STEP = 3
"""Forward, backward, sweep; evaluating and checkpoints are seldom."""
EVENTS = 500


def run(scratch: Path) -> list[Row]:
    base, loss_module, optimizer = half_of_smollm2()
    ids_BT = torch.randint(base.config["vocab_size"], (SEQUENCES, SEQUENCE_LENGTH))

    def steps() -> None:
        for _ in range(STEPS):
            with ledger.during("forward"):
                loss = loss_module(ids_BT)
            with ledger.during("backward"):
                loss.backward()
            with ledger.during("sweep"):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def measured_steps() -> None:
        with MemoryMeter({}, Series()).phase("train"):
            steps()

    steps()
    wall: dict[str, list[float]] = {"plain": [], "measured": []}
    processor: dict[str, list[float]] = {"plain": [], "measured": []}
    for _ in range(REPEATS):
        for name, action in (("plain", steps), ("measured", measured_steps)):
            began, began_processor = time.perf_counter(), time.process_time()
            action()
            wall[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - began_processor)
    step_seconds = statistics.median(wall["plain"]) / STEPS
    sample, change = _event_seconds()
    share = sample / INTERVAL_SECONDS + STAGES_PER_STEP * change / step_seconds
    return [
        (
            "a step without the meter, median (least to most)",
            f"{step_seconds:.2f} s",
            f"{min(wall['plain']) / STEPS:.2f} to {max(wall['plain']) / STEPS:.2f} s",
        ),
        ("with the meter over without, time", f"{_ratio(wall):.4f}", "1.01 at most"),
        ("with the meter over without, time of all processor cores", f"{_ratio(processor):.4f}", "1.01 at most"),
        ("one sample", f"{sample * 1e6:.0f} µs", f"every {INTERVAL_SECONDS * 1000:.0f} ms"),
        ("one change of stage", f"{change * 1e6:.0f} µs", f"{STAGES_PER_STEP} a step"),
        ("both over a step, if nothing else ran meanwhile", f"{share:.3%}", "1 % at most"),
    ]


def _ratio(times: dict[str, list[float]]) -> float:
    """The median over pairs that ran one after the other."""
    return statistics.median(
        measured / plain for measured, plain in zip(times["measured"], times["plain"], strict=True)
    )


def _event_seconds() -> tuple[float, float]:
    """Seconds of one sample and of one change of stage, on the thread that works, with this process's memory mapped."""
    meter = MemoryMeter({}, Series())
    with meter.phase("train"):
        samples, changes = [], []
        for event in range(EVENTS):
            began = time.perf_counter()
            meter._sample()
            samples.append(time.perf_counter() - began)
            began = time.perf_counter()
            meter.change(f"stage {event % STAGES_PER_STEP}")
            changes.append(time.perf_counter() - began)
    return statistics.median(samples), statistics.median(changes)
