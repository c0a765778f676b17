"""Runs of the comparison, several at a time where there is a GPU: each is kept as one JSON file and not made again, and
one that was cut off goes on from its checkpoint."""

import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quality.arms import Job
from benchmarks.report import hardware
from pcscale.common.cache import cache_folder
from pcscale.common.console import console
from pcscale.common.files import read_json, write_json, write_text
from pcscale.jobs.demo import fetch_smollm2
from pcscale.memory.process import machine
from pcscale.storage.hashing import fingerprint

REPOSITORY = Path(__file__).parents[2]
WORKERS = int(os.environ.get("PCSCALE_WORKERS", "1"))


RESULTS = Path(__file__).parent / "results" / hardware()
"""Of this machine."""


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        losses: held-out loss by tokens trained on, from none on. Units: nats.
        step_seconds: of a step, the median.
        at_once: how many runs shared the machine.
        peak_bytes: of anonymous memory.
    """

    job: Job
    base: float
    losses: dict[int, float]
    step_seconds: float
    at_once: int
    parameters: int
    peak_bytes: int

    @property
    def start(self) -> float:
        return self.losses[0]

    @property
    def last(self) -> float:
        return next(reversed(self.losses.values()))

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return self.step_seconds * self.job.values["max_steps"]


def kept_result(job: Job) -> Result | None:
    """The result of a run that has been made; None: it has not."""
    path = RESULTS / f"{_name(job)}.json"
    if not path.exists():
        return None
    kept = read_json(path)
    curve: list[dict[str, Any]] = kept["curve"]
    return Result(
        job,
        kept["base_loss"],
        {point["tokens"]: point["loss"] for point in curve},
        kept["step_seconds"],
        kept["machine"]["runs_at_a_time"],
        kept["parameters"],
        kept["peak_bytes"],
    )


def run_jobs(scratch: Path, wanted: Callable[[], Iterable[Job]], ends: float) -> None:
    """Make the runs that are not there, `WORKERS` at a time, until none is left or it is too late to begin one.

    Args:
        scratch: where run folders lie meanwhile.
        wanted: what can be made now, the most urgent first; asked anew whenever a run is done.
        ends: when no further run is begun, by `time.monotonic`.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(WORKERS) as pool:
        begun: set[str] = set()
        running: dict[Future[None], Job] = {}
        while True:
            for job in wanted():
                name = _name(job)
                if len(running) < WORKERS and time.monotonic() < ends and name not in begun and not kept_result(job):
                    begun.add(name)
                    running[pool.submit(_make, scratch / name, RESULTS / f"{name}.json", job)] = job
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                job, error = running.pop(done), done.exception()
                result = None if error else kept_result(job)
                console.info(f"{job.name} {job.rates}: {f'{result.last:.4f}' if result else f'failed: {error}'}")


def _name(job: Job) -> str:
    """Of the run's settings and the text."""
    return fingerprint(json.dumps([job.values, _text()], sort_keys=True).encode())


def _corpus(part: str) -> Path:
    folder = Path(os.environ.get("PCSCALE_CORPUS", ""))
    found = next((path for path in (folder / f"{part}.txt", folder / f"{part}.txt.gz") if path.is_file()), None)
    if found is None:
        raise SystemExit(f"PCSCALE_CORPUS names no folder with {part}.txt or {part}.txt.gz.")
    return found.absolute()


@cache
def _text() -> list[str]:
    """What the text is, packed or not."""
    paths = (_corpus("train"), _corpus("valid"))
    return [fingerprint(gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes()) for p in paths]


def _make(folder: Path, path: Path, job: Job) -> None:
    """Make one run, in a process of its own, and keep what it came to."""
    data = {"train": [str(_corpus("train"))], "validation": [str(_corpus("valid"))]}
    places = {"base": str(fetch_smollm2(cache_folder())), "output": str(folder), "data": data}
    folder.parent.mkdir(parents=True, exist_ok=True)
    yaml_file = folder.with_suffix(".yaml")
    write_text(yaml_file, yaml.safe_dump({**job.values, **places}))
    command = [sys.executable, "-m", "pcscale", "compress", str(yaml_file), "--resume", "--json", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.PIPE)
    report = json.loads(done.stdout)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluation = report["evaluation"]
    resolved = yaml.safe_load((folder / "run.yaml").read_text())
    curve = [{"tokens": 0, "loss": evaluation["start"]["loss"]}]
    curve += [{"tokens": step["tokens"], "loss": step["eval_loss"]} for step in steps if step.get("eval_loss")]
    document = {
        "name": job.name,
        "settings": job.values,
        "run_yaml": {key: value for key, value in resolved.items() if key not in places},
        "base_loss": evaluation["base"]["loss"],
        "parameters": evaluation["compressed"]["parameters"],
        "peak_bytes": report["peak"]["host_anonymous"]["measured_bytes"],
        "step_seconds": statistics.median(step["seconds"] for step in steps),
        "curve": curve,
        "machine": {**asdict(machine()), "runs_at_a_time": WORKERS},
    }
    write_json(path, document)
    shutil.rmtree(folder)
