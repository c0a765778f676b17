"""Held-out loss of SmolLM2-135M cut to 50, 70 and 30 % of its parameters and trained on 102,400 tokens of prose, arm
by arm, at equal parameters, tokens and data order (`benchmarks/quality/arms.py`). Each arm has its own best of at least
three rates. `PCSCALE_CORPUS` names a folder with train.txt and valid.txt. Every run is kept in the scratch folder and
not made again; one that is cut off goes on from its checkpoint. `PCSCALE_MINUTES` says after how many minutes no
further run is begun: what is missing then says so."""

import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.quality.arms import ARMS, Arm, Job, others, trials
from benchmarks.quality.runs import Result, kept_result, run_job
from benchmarks.report import REPORTS, Row

PLOT_NAME = "quality.png"
MISSING = "not run"


def run(scratch: Path) -> list[Row]:
    scratch = scratch.absolute() / "quality"
    scratch.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * float(os.environ.get("PCSCALE_MINUTES", "inf"))
    for wanted in (trials, others):
        for arm in ARMS:
            for job in _jobs(scratch, arm, wanted is others):
                if time.monotonic() < ends:
                    run_job(scratch, job)
    _plot(scratch)
    return [*_best(scratch), *_spread(scratch), *_sizes(scratch), *_trials(scratch)]


def _jobs(scratch: Path, arm: Arm, rest: bool) -> Iterator[Job]:
    if not rest:
        yield from trials(arm)
        return
    best = best_trial(scratch, arm)
    if best is not None:
        yield from others(arm, _rates(best.job))


def best_trial(scratch: Path, arm: Arm) -> Result | None:
    """The best of an arm's trials, once all of them are there: at half of the parameters, with the first seed."""
    found = [kept_result(scratch, job) for job in trials(arm)]
    known = [result for result in found if result is not None]
    return min(known, key=lambda result: result.last) if len(known) == len(found) else None


def _rates(job: Job) -> dict[str, float]:
    return {key: job.values[key] for key in ("learning_rate", "aux_learning_rate") if key in job.values}


def _best(scratch: Path) -> list[Row]:
    rows: list[Row] = []
    control = best_trial(scratch, ARMS[0])
    for arm in ARMS:
        result = best_trial(scratch, arm)
        if result is None or control is None:
            rows.append((f"50 %, {arm.name}", MISSING, ""))
            continue
        curve = ", ".join(f"{loss:.3f}" for loss in result.losses.values())
        rates = " and ".join(f"{rate:g}" for rate in _rates(result.job).values())
        seconds = next(reversed(result.seconds.values()))
        rows.append(
            (
                f"50 %, {arm.name}: after {', '.join(f'{tokens:,}' for tokens in result.losses)} tokens",
                f"{curve} (base {result.base:.3f}; rate {rates}; {seconds:.0f} s; {result.peak_bytes / 2**30:.1f} GiB)",
                f"{result.last - control.last:+.3f} against the control",
            )
        )
    return rows


def _spread(scratch: Path) -> list[Row]:
    rows: list[Row] = []
    for arm in (arm for arm in ARMS if arm.seeds):
        best = best_trial(scratch, arm)
        results = [best]
        if best is not None:
            jobs = [job for job in others(arm, _rates(best.job)) if job.values["seed"] in arm.seeds]
            results += [kept_result(scratch, job) for job in jobs]
        losses = [result.last for result in results if result is not None]
        text = ", ".join(f"{loss:.3f}" for loss in losses) if len(losses) == 1 + len(arm.seeds) else MISSING
        rows.append((f"50 %, {arm.name}: seeds", text, f"mean {statistics.mean(losses):.3f}" if losses else ""))
    return rows


def _sizes(scratch: Path) -> list[Row]:
    rows: list[Row] = []
    for arm in ARMS:
        best = best_trial(scratch, arm)
        for keep in arm.keeps:
            jobs = others(arm, _rates(best.job)) if best is not None else []
            found = next((kept_result(scratch, job) for job in jobs if job.values["keep"] == keep), None)
            text = MISSING if found is None else f"{found.start:.3f} at the start, {found.last:.3f}"
            rows.append((f"{keep:.0%}, {arm.name}", text, "" if found is None else f"{found.parameters:,} parameters"))
    return rows


def _trials(scratch: Path) -> list[Row]:
    rows: list[Row] = []
    for arm in ARMS:
        for job in trials(arm):
            result = kept_result(scratch, job)
            rates = " and ".join(f"{rate:g}" for rate in _rates(job).values())
            rows.append((f"trial: {arm.name}, rate {rates}", MISSING if result is None else f"{result.last:.3f}", ""))
    return rows


def _plot(scratch: Path) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for arm in ARMS:
        result = best_trial(scratch, arm)
        if result is not None:
            axes.plot(list(result.losses), list(result.losses.values()), marker="o", markersize=4, label=arm.name)
    axes.set_xlabel("tokens")
    axes.set_ylabel("held-out loss (nats a token)")
    if axes.lines:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(REPORTS / PLOT_NAME, dpi=110)
