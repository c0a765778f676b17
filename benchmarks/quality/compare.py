"""Held-out loss of SmolLM2-135M, cut and trained on prose, at equal parameters, tokens and data order
(`benchmarks/quality/arms.py`). `PCSCALE_CORPUS` names a folder with train.txt and valid.txt (or .txt.gz). What every
run came to is kept in `benchmarks/quality/results/`, by machine, and not run again; one that is cut off goes on from
its checkpoint. `PCSCALE_MINUTES` says after how many minutes no further run is begun: what is missing then says so.
`PCSCALE_WORKERS` runs share the machine; their seconds are then those of a shared one. Models run in bfloat16, over
float32 records."""

import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from benchmarks.quality.arms import (
    BRIEF,
    LONG,
    LONGEST,
    SHORT,
    TAUGHT,
    WIDTHS,
    Arm,
    Budget,
    Job,
    at,
    repetitions,
    seeded,
    sized,
    trials,
    variants,
    varied,
)
from benchmarks.quality.runs import Result, kept_result, run_jobs
from benchmarks.report import REPORTS, Row

MISSING = "not run"


def about(budget: Budget) -> str:
    """What stands above the rows of a report."""
    return f"{budget.about}\n\n{__doc__}"


def run_short(scratch: Path) -> list[Row]:
    return _run(scratch, SHORT, REPORTS / "quality.png")


def run_brief(scratch: Path) -> list[Row]:
    return _run(scratch, BRIEF, None)


def run_widths(scratch: Path) -> list[Row]:
    return _run(scratch, WIDTHS, None)


def run_long(scratch: Path) -> list[Row]:
    return _run(scratch, LONG, REPORTS / "quality-long.png")


def run_longest(scratch: Path) -> list[Row]:
    found = {arm.name: best_trial(LONG, arm) for arm in LONG.arms}
    rates = {name: best.job.rates for name, best in found.items() if best is not None}
    if len(rates) < len(found):
        return [("rates", MISSING, "quality-long finds them")]
    return _run(scratch, at(LONGEST, rates), REPORTS / "quality-longest.png")


def _run(scratch: Path, budget: Budget, plot: Path | None) -> list[Row]:
    ends = time.monotonic() + 60 * float(os.environ.get("PCSCALE_MINUTES", "inf"))
    run_jobs(scratch.absolute() / "quality", lambda: _wanted(budget), ends)
    if plot is not None:
        _plot(budget, plot)
    parts = (_best, _equal_time, _variations, _spread, _sizes, _trials)
    return [row for part in parts for row in part(budget)]


def _wanted(budget: Budget) -> Iterator[Job]:
    """What can be run now, the most urgent first."""
    for arm in budget.arms:
        yield from trials(budget, arm)
    ours = best_trial(budget, budget.ours)
    if ours is not None:
        yield from variants(budget, ours.job.rates)
    for arm in budget.arms:
        best = best_trial(budget, arm)
        if best is not None:
            yield from repetitions(budget, arm, best.job.rates)


def best_trial(budget: Budget, arm: Arm) -> Result | None:
    """The best of an arm's trials, once all of them are there: at half of the parameters, with the first seed."""
    found = [kept_result(job) for job in trials(budget, arm)]
    known = [result for result in found if result is not None]
    return min(known, key=lambda result: result.last) if len(known) == len(found) else None


def _best(budget: Budget) -> Iterator[Row]:
    control = best_trial(budget, budget.control) if budget.control else None
    for arm in budget.arms:
        result = best_trial(budget, arm)
        if result is None:
            yield f"50 %, {arm.name}", MISSING, ""
            continue
        curve = ", ".join(f"{loss:.3f}" for loss in result.losses.values())
        cost = f"; {result.step_seconds:.1f} s a step, {result.at_once} at once; {result.peak_bytes / 2**30:.1f} GiB"
        yield (
            f"50 %, {arm.name}: after {', '.join(f'{tokens:,}' for tokens in result.losses)} tokens",
            f"{curve} (base {result.base:.3f}; rate {_said(result.job)}{cost})",
            _against(result, control) if control and result.job != control.job else "",
        )


def _against(result: Result, control: Result) -> str:
    """How far ahead at the end, and since when."""
    ahead = None
    for tokens, loss in result.losses.items():
        if loss >= control.losses[tokens]:
            ahead = None
        elif ahead is None:
            ahead = tokens
    text = f"{result.last - control.last:+.3f} against the control"
    return text if ahead is None else f"{text}, ahead from {ahead:,} tokens on"


def _equal_time(budget: Budget) -> Iterator[Row]:
    """Where every arm is once the fastest one has ended: on a straight line between two evaluations. Seconds compare
    only where as many runs shared the machine."""
    results = [result for arm in budget.arms if (result := best_trial(budget, arm))]
    if len(results) < 2 or len({result.at_once for result in results}) > 1:
        return
    fastest = min(results, key=lambda result: result.seconds)
    for result in results:
        if result is not fastest:
            share = fastest.seconds / result.seconds
            tokens = share * max(result.losses)
            loss = np.interp(tokens, list(result.losses), list(result.losses.values()))
            what = f"50 %, {result.job.name}: in the {fastest.seconds:.0f} s of {fastest.job.name}"
            yield what, f"{loss:.3f}, after {tokens:,.0f} tokens", f"{loss - fastest.last:+.3f}"


def _said(job: Job) -> str:
    return " and ".join(f"{rate:g}" for rate in job.rates.values())


def _spread(budget: Budget) -> Iterator[Row]:
    if not budget.seeds:
        return
    for arm in budget.arms:
        best = best_trial(budget, arm)
        found = [kept_result(seeded(budget, arm, best.job.rates, seed)) for seed in budget.seeds] if best else []
        losses = [result.last for result in (best, *found) if result is not None]
        if len(losses) < 1 + len(budget.seeds):
            yield f"50 %, {arm.name}: seeds", MISSING, ""
            continue
        text = ", ".join(f"{loss:.3f}" for loss in losses)
        yield f"50 %, {arm.name}: seeds", text, f"mean {statistics.mean(losses):.3f}"


def _sizes(budget: Budget) -> Iterator[Row]:
    for share in budget.sizes:
        for arm in budget.arms:
            best = best_trial(budget, arm)
            found = kept_result(sized(budget, arm, best.job.rates, share)) if best else None
            if found is None:
                yield f"{share}, {arm.name}", MISSING, ""
                continue
            text = f"{found.start:.3f} at the start, {found.last:.3f}"
            yield f"{share}, {arm.name}", text, f"{found.parameters:,} parameters"


def _trials(budget: Budget) -> Iterator[Row]:
    for arm in budget.arms:
        for job in trials(budget, arm):
            result = kept_result(job)
            yield f"trial: {arm.name}, rate {_said(job)}", MISSING if result is None else f"{result.last:.3f}", ""


def _variations(budget: Budget) -> Iterator[Row]:
    best = best_trial(budget, budget.ours)
    for name, changes in budget.variations.items():
        found = kept_result(varied(budget, best.job.rates, name, changes)) if best else None
        if found is None or best is None:
            yield f"our recipe, {name}", MISSING, ""
            continue
        text = f"{found.start:.3f} at the start, {found.last:.3f}"
        yield f"our recipe, {name}", text, f"{found.last - best.last:+.3f} against our recipe"


def _plot(budget: Budget, path: Path) -> None:
    """Held-out loss by tokens, from the first evaluation after the start on: what a start is at would hide the rest."""
    found = [best_trial(budget, arm) for arm in budget.arms]
    ours = best_trial(budget, budget.ours)
    if ours is not None:
        found += [kept_result(job) for job in variants(budget, ours.job.rates) if job.name.endswith(TAUGHT)]
    results = [result for result in found if result is not None]
    if not results:
        return
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for result in results:
        tokens, losses = list(result.losses)[1:], list(result.losses.values())[1:]
        axes.plot(tokens, losses, marker="o", markersize=4, label=f"{result.job.name}: {result.last:.3f}")
    axes.axhline(results[0].base, color="gray", linestyle=":", label=f"base: {results[0].base:.3f}")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("tokens")
    axes.set_ylabel("held-out loss (nats a token)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)
