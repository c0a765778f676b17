"""Runs of the comparison, several at a time where there is a GPU: each is kept as one JSON file and not made again, and
one that was cut off goes on from its checkpoint."""

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.arms import Job
from pcscale.common.cache import cache_folder
from pcscale.common.console import console
from pcscale.common.files import read_json, write_json
from pcscale.config.load import check_values
from pcscale.storage.hashing import fingerprint
from pcscale.training.demo import fetch_smollm2

WORKERS = int(os.environ.get("PCSCALE_WORKERS", "1"))


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        losses: held-out loss by tokens trained on, from none on. Units: nats.
        seconds: of training by the same tokens.
        peak_bytes: of anonymous memory.
    """

    job: Job
    base: float
    losses: dict[int, float]
    seconds: dict[int, float]
    parameters: int
    peak_bytes: int

    @property
    def start(self) -> float:
        return self.losses[0]

    @property
    def last(self) -> float:
        return next(reversed(self.losses.values()))


def kept_result(scratch: Path, job: Job) -> Result | None:
    """The result of a run that has been made; None: it has not."""
    path = _path(scratch, job)
    return _result(job, read_json(path)) if path.exists() else None


def run_jobs(scratch: Path, wanted: Callable[[], Iterable[Job]], ends: float) -> None:
    """Make the runs that are not there, `WORKERS` at a time, until none is left or it is too late to begin one.

    Args:
        wanted: what can be made now, the most urgent first; asked anew whenever a run is done.
        ends: when no further run is begun, by `time.monotonic`.
    """
    # A process of its own for each run tells its memory; on a GPU several share the time that starting one takes.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, context, max_tasks_per_child=1 if WORKERS == 1 else None) as pool:
        begun: set[Path] = set()
        running: dict[Future[None], Job] = {}
        while True:
            for job in wanted():
                path = _path(scratch, job)
                if len(running) < WORKERS and time.monotonic() < ends and path not in begun and not path.exists():
                    begun.add(path)
                    running[pool.submit(_make, path, job.values)] = job
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                job, error = running.pop(done), done.exception()
                result = None if error else kept_result(scratch, job)
                console.say(f"{job.name} {job.rates}: {f'{result.last:.4f}' if result else f'failed: {error!r}'}")


def _make(path: Path, values: dict[str, Any]) -> None:
    """Make one run and keep what it came to."""
    from pcscale.training.pipeline import compress

    console.configure(quiet=True)
    folder, corpus = path.with_suffix(""), os.environ["PCSCALE_CORPUS"]
    data = {part: [f"{corpus}/{name}.txt*"] for part, name in (("train", "train"), ("validation", "valid"))}
    places = {"base": str(fetch_smollm2(cache_folder())), "output": str(folder), "data": data}
    on_gpu = {"bf16": True} if torch.cuda.is_available() else {}
    report = compress(check_values({**values, **on_gpu, **places}, "benchmark"), resume=True)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    write_json(path, {"report": report, "steps": steps, "values": values, "at_a_time": WORKERS})
    shutil.rmtree(folder)


def _path(scratch: Path, job: Job) -> Path:
    return scratch / f"{fingerprint(json.dumps(job.values, sort_keys=True).encode())}.json"


def _result(job: Job, document: dict[str, Any]) -> Result:
    report, steps = document["report"], document["steps"]
    evaluation = report["evaluation"]
    losses, seconds, total = {0: evaluation["start"]["loss"]}, {0: 0.0}, 0.0
    for step in steps:
        total += step["seconds"]
        if step.get("eval_loss") is not None:
            losses[step["tokens"]], seconds[step["tokens"]] = step["eval_loss"], total
    return Result(
        job,
        evaluation["base"]["loss"],
        losses,
        seconds,
        evaluation["compressed"]["parameters"],
        report["peak"]["host_anonymous"]["measured_bytes"],
    )
