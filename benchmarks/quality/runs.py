"""Runs of the comparison: each is kept as one JSON file, and a run that was cut off goes on from its checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quality.arms import Job
from pcscale.common.cache import cache_folder
from pcscale.common.files import read_json, write_json, write_text
from pcscale.storage.hashing import fingerprint
from pcscale.training.demo import fetch_smollm2

REPOSITORY = Path(__file__).parents[2]


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


def run_job(scratch: Path, job: Job) -> Result:
    """The result of a run, which is made unless it is there."""
    path = _path(scratch, job)
    if not path.exists():
        folder = path.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        corpus = os.environ["PCSCALE_CORPUS"]
        data = {"train": [f"{corpus}/train.txt"], "validation": [f"{corpus}/valid.txt"]}
        values = {"base": str(fetch_smollm2(cache_folder())), "output": str(folder / "run"), "data": data, **job.values}
        write_text(folder / "run.yaml", yaml.safe_dump(values))
        command = [
            sys.executable,
            "-m",
            "pcscale",
            "compress",
            str(folder / "run.yaml"),
            "--resume",
            "--json",
            "--quiet",
        ]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.PIPE)
        steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        write_json(path, {"report": json.loads(done.stdout), "steps": steps})
        shutil.rmtree(folder)
    return _result(job, read_json(path))


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
