"""The comparison's rows, from results that are made up: which one is best, what is missing, and what follows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import compare, runs
from benchmarks.quality.arms import (
    BRIEF,
    CONTROL,
    LONG,
    LONGEST,
    OURS,
    SHORT,
    WIDTHS,
    Arm,
    Job,
    repetitions,
    trials,
    variants,
)
from benchmarks.quality.compare import MISSING, best_trial
from pcscale.common.files import write_json
from pcscale.config.schema import RunConfig

BUDGET = replace(SHORT, arms=(CONTROL, OURS), variations={"low-rank deltas, 32": {"projection_rank": 32}}, seeds=(1, 2))


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results are kept, and text that no folder holds."""
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    monkeypatch.setattr(runs, "_text", lambda: ["train", "valid"])
    return tmp_path


def keep(results: Path, job: Job, losses: dict[int, float], seconds: float = 1.0, at_once: int = 1) -> None:
    document: dict[str, Any] = {
        "base_loss": 3.0,
        "parameters": 67,
        "peak_bytes": 2**30,
        "step_seconds": seconds,
        "machine": {"runs_at_a_time": at_once},
        "curve": [{"tokens": tokens, "loss": loss} for tokens, loss in losses.items()],
    }
    write_json(results / f"{runs._name(job)}.json", document)


def keep_trials(results: Path, arm: Arm, lasts: tuple[float, ...], seconds: float = 1.0, at_once: int = 1) -> None:
    for job, last in zip(trials(BUDGET, arm), lasts, strict=True):
        keep(results, job, {0: 8.0, 200: 6.0, 400: last}, seconds, at_once)


def rows(part: Any) -> list[tuple[str, str, str]]:
    return list(part(BUDGET))


def test_the_best_rate_is_known_once_all_have_been_tried(results: Path) -> None:
    first, *others = trials(BUDGET, CONTROL)
    keep(results, first, {0: 8.0, 400: 5.0})
    assert best_trial(BUDGET, CONTROL) is None
    for job, last in zip(others, (4.0, 4.5), strict=True):
        keep(results, job, {0: 8.0, 400: last})
    best = best_trial(BUDGET, CONTROL)
    assert best is not None
    assert best.job.rates == CONTROL.rates[1]
    assert (best.start, best.last) == (8.0, 4.0)


def test_what_has_not_been_run_says_so(results: Path) -> None:
    for part in (compare._best, compare._variations, compare._spread, compare._sizes, compare._trials):
        found = rows(part)
        assert found
        assert {figure for _, figure, _ in found} == {MISSING}
    assert rows(compare._equal_time) == []
    with pytest.raises(StopIteration):
        next(compare._equal_time(WIDTHS))


def test_further_runs_take_the_rate_that_was_best(results: Path) -> None:
    keep_trials(results, OURS, (5.0, 4.5, 4.0, 6.0))
    keep_trials(results, CONTROL, (5.0, 4.6, 4.8))
    wanted = list(compare._wanted(BUDGET))
    for arm, rates in ((OURS, OURS.rates[2]), (CONTROL, CONTROL.rates[1])):
        further = list(repetitions(BUDGET, arm, rates))
        assert len(further) == len(BUDGET.seeds) + len(BUDGET.sizes)
        assert all(any(job.values == other.values for other in wanted) for job in further)
    assert all(any(job.values == other.values for other in wanted) for job in variants(BUDGET, OURS.rates[2]))


def test_an_arm_is_ahead_from_the_evaluation_after_which_it_stays_ahead(results: Path) -> None:
    keep_trials(results, CONTROL, (4.5, 5.0, 5.0))
    for job in trials(BUDGET, OURS):
        keep(results, job, {0: 7.0, 200: 6.5, 400: 4.25})
    assert rows(compare._best)[1][2] == "-0.250 against the control, ahead from 400 tokens on"


def test_at_equal_time_the_slower_arm_is_between_its_evaluations(results: Path) -> None:
    keep_trials(results, CONTROL, (4.5, 5.0, 5.0), seconds=1.0)
    keep_trials(results, OURS, (4.0, 4.1, 4.2, 4.3), seconds=4.0)
    # A quarter of 400 tokens: half way between 8.0 and 6.0.
    assert rows(compare._equal_time) == [
        (
            "50 %, Projected Compression, our recipe: in the 100 s of hard pruning, published start",
            "7.000, after 100 tokens",
            "+2.500",
        )
    ]


def test_seconds_are_not_compared_where_not_as_many_runs_shared_the_machine(results: Path) -> None:
    keep_trials(results, CONTROL, (4.5, 5.0, 5.0), at_once=3)
    keep_trials(results, OURS, (4.0, 4.1, 4.2, 4.3), at_once=5)
    assert rows(compare._equal_time) == []


def test_seeds_and_variations_stand_beside_the_best(results: Path) -> None:
    keep_trials(results, OURS, (4.0, 5.0, 5.0, 5.0))
    seeds, last = list(repetitions(BUDGET, OURS, OURS.rates[0])), {1: 4.3, 2: 4.6}
    for job in seeds[:2]:
        keep(results, job, {0: 8.0, 400: last[job.values["seed"]]})
    assert rows(compare._spread)[1] == (f"50 %, {OURS.name}: seeds", "4.000, 4.300, 4.600", "mean 4.300")
    (variation,) = variants(BUDGET, OURS.rates[0])
    keep(results, variation, {0: 8.0, 400: 4.05})
    (row,) = rows(compare._variations)
    assert row[1:] == ("8.000 at the start, 4.050", "+0.050 against our recipe")


def test_runs_of_other_settings_or_text_have_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [job for arm in SHORT.arms for job in trials(SHORT, arm)]
    jobs += [job for arm in SHORT.arms for job in repetitions(SHORT, arm, arm.rates[0])]
    jobs += list(variants(SHORT, OURS.rates[0]))
    names = {runs._name(job) for job in jobs}
    assert len(names) == len(jobs)
    monkeypatch.setattr(runs, "_text", lambda: ["other", "valid"])
    assert runs._name(jobs[0]) not in names


def test_every_run_is_one_that_compress_takes() -> None:
    places = {"base": "-", "output": "-", "data": {"train": ["-"]}}
    for budget in (SHORT, BRIEF, WIDTHS, LONG, LONGEST):
        for arm in budget.arms:
            for job in [*trials(budget, arm), *repetitions(budget, arm, arm.rates[0])]:
                RunConfig(**{**job.values, **places})
        for job in variants(budget, budget.ours.rates[0]):
            RunConfig(**{**job.values, **places})
