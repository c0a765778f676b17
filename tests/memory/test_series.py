"""Samples of memory over time: bounded, the highest survive, and they outlive a process."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pcscale.common.errors import RequestError
from pcscale.memory.measure import MAX_SAMPLES, Series
from pcscale.run.record import Sample


def sample(seconds: float, num_bytes: int, **changes: Any) -> Sample:
    values = {"phase": "train", "stage": None, "host": {"a": num_bytes}, "device": {}, **changes}
    return Sample(seconds, **values)


def filled(count: int, peak_at: int | None = None) -> Series:
    """Heights go up and down, and are nowhere as high as at one place."""
    series = Series()
    for number in range(count):
        series.add(sample(float(number), 10**9 if number == peak_at else 1 + number * 7919 % 1000))
    return series


def test_the_total_is_that_of_host_and_device() -> None:
    assert sample(0, 3, host={"a": 3, "b": 4}, device={"a": 50}).total == 57


@pytest.mark.parametrize("count", [0, 1, MAX_SAMPLES - 1, MAX_SAMPLES, MAX_SAMPLES + 1, 100_000])
def test_samples_stay_bounded_and_in_order(count: int) -> None:
    series = filled(count)
    assert min(count, MAX_SAMPLES // 2) <= len(series.samples) <= MAX_SAMPLES
    seconds = [kept.seconds for kept in series.samples]
    assert seconds == sorted(set(seconds))


def test_below_the_bound_every_sample_is_kept() -> None:
    series = filled(MAX_SAMPLES - 1)
    assert [kept.seconds for kept in series.samples] == [float(number) for number in range(MAX_SAMPLES - 1)]


def test_the_whole_run_is_covered_evenly() -> None:
    seconds = [0.0, *(kept.seconds for kept in filled(100_000).samples), 100_000.0]
    gaps = [after - before for before, after in pairwise(seconds)]
    assert max(gaps) < 3 * 100_000 / len(seconds)


@pytest.mark.parametrize("peak_at", [0, 1, 998, 999, 1000, 1001, 1999, 2000, 54_321, 99_998, 99_999])
def test_the_highest_sample_survives(peak_at: int) -> None:
    (highest,) = (kept for kept in filled(100_000, peak_at).samples if kept.total == 10**9)
    assert highest.seconds == peak_at


def test_each_kept_sample_is_the_highest_of_its_stretch() -> None:
    series = filled(4 * MAX_SAMPLES)
    stretch = 4 * MAX_SAMPLES // len(series.samples)
    heights = [1 + number * 7919 % 1000 for number in range(4 * MAX_SAMPLES)]
    assert {kept.total for kept in series.samples} <= set(heights)
    assert min(kept.total for kept in series.samples) >= sorted(heights)[stretch - 2]


def test_what_was_written_is_read_back_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    series = filled(3)
    series.add(sample(5.5, 1, phase="merge", stage="sweep", host={"libraries": 7}, device={"records": 8}))
    series.write(path)
    read = Series.read(path)
    assert read.samples == series.samples
    read.add(sample(6, 1))
    assert [kept.seconds for kept in read.samples] == [0, 1, 2, 5.5, 6]


def test_a_series_that_is_gone_on_with_stays_bounded(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    peak = 3
    filled(10 * MAX_SAMPLES, peak).write(path)
    for part in range(1, 6):
        series = Series.read(path)
        for number in range(10 * MAX_SAMPLES):
            series.add(sample(part * 10 * MAX_SAMPLES + number, 1))
        series.write(path)
    assert len(Series.read(path).samples) <= MAX_SAMPLES
    assert max(kept.total for kept in Series.read(path).samples) == 10**9


def test_where_nothing_was_written_there_is_an_empty_series(tmp_path: Path) -> None:
    assert Series.read(tmp_path / "memory.json").samples == []


BROKEN: dict[str, Any] = {
    "no samples": {"other": []},
    "a list": [],
    "null": {"samples": None},
    "a sample without its phase": {"samples": [{"seconds": 1, "stage": None, "host": {}, "device": {}}]},
    "a sample that is a number": {"samples": [3]},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_holds_something_else_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    path.write_text(json.dumps(BROKEN[name]))
    with pytest.raises(RequestError, match=r"memory\.json( has no|:| is) .*\. Restore or remove the file\.$"):
        Series.read(path)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    filled(10).write(path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(RequestError, match=r"memory\.json"):
        Series.read(path)
