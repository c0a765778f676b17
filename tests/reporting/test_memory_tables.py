"""Rows about memory, bytes and seconds: the right figure in the right column."""

from pathlib import Path
from typing import Any

import pytest

from pcscale.reporting.memory_tables import (
    alternative_rows,
    byte_rows,
    component_rows,
    device_rows,
    memory_tables,
    moment_component_rows,
    step_time_rows,
)
from pcscale.reporting.report import summarize
from pcscale.reporting.run_data import read_run


@pytest.fixture
def report(run: Path) -> dict[str, Any]:
    return summarize(read_run(run))


def test_a_part_shows_its_home_and_its_difference(report: dict[str, Any]) -> None:
    columns, rows = component_rows(report, "train")
    assert columns == ["part", "home", "measured", "predicted", "difference"]
    assert rows[0] == ["libraries", "host", "433.9 MiB", "448.2 MiB", "-3.2%"]
    assert ["records", "host", "766.8 MiB", "766.8 MiB", "+0.0%"] in rows
    assert ["working memory", "host", "762.0 MiB", "652.3 MiB", "+16.8%"] in rows
    assert rows[-1] == ["frozen base", "files", "–", "256.6 MiB", "–"]


def test_a_difference_that_rounds_to_nothing_has_one_sign() -> None:
    pair = {"home": "host", "predicted_bytes": 1_000_000, "measured_bytes": 999_999}
    report = {"plan": None, "phases": {"merge": {"components": {"records": pair}}}}
    assert component_rows(report, "merge")[1][0][-1] == "+0.0%"


def test_a_part_that_is_nowhere_has_no_row() -> None:
    pair = {"home": "host", "predicted_bytes": 0, "measured_bytes": None}
    assert component_rows({"plan": None, "phases": {"merge": {"components": {"moments": pair}}}}, "merge")[1] == []


def test_parts_by_moments_are_measured_and_predicted(report: dict[str, Any]) -> None:
    columns, rows = moment_component_rows(report["phases"]["train"]["moments"])
    assert columns == ["part", "home", "start", "forward", "backward", "sweep", "evaluate", "checkpoint"]
    by_name = {row[0]: row[2:] for row in rows}
    assert by_name["gradients"] == ["–", "–", "0.25 / 0.25", "0.25 / 0.25", "–", "–"]
    assert by_name["working memory"][2] == "0.74 / 0.49"
    assert by_name["working memory"][5] == "0.01 / –"


def test_ways_to_train_are_relative_to_what_this_run_took(report: dict[str, Any]) -> None:
    _, rows = alternative_rows(report["alternatives"])
    assert [row[:4] for row in rows] == [
        ["the published form", "4.6 GiB", "predicted", "1.44 ×"],
        ["hard pruning", "1.6 GiB", "predicted", "0.50 ×"],
        ["this run", "3.1 GiB", "predicted", "0.97 ×"],
        ["this run", "3.2 GiB", "measured", "1.00 ×"],
    ]
    assert rows[1][4] == "model, gradients and moments, activations"


def test_devices_say_what_would_have_to_change() -> None:
    devices = [
        {"device_bytes": 8 * 10**9, "fits": False, "change": "does not fit"},
        {"device_bytes": 16 * 10**9, "fits": False, "change": "residency: disk"},
        {"device_bytes": 24 * 2**30, "fits": True, "change": ""},
    ]
    assert device_rows(devices)[1] == [
        ["8 GB", "no", "no setting makes it fit"],
        ["16 GB", "after a change", "residency: disk"],
        ["24.0 GiB", "as it is", "nothing"],
    ]


def test_bytes_of_a_step_without_anyone_to_talk_to_have_no_such_row(report: dict[str, Any]) -> None:
    assert byte_rows(report)[1] == [
        ["moved", "257.5 MiB", "256.5 MiB", "+0.4%"],
        ["written, with checkpoints", "200.3 MiB", "190.7 MiB", "+5.0%"],
    ]


def test_seconds_compare_what_can_be_compared(report: dict[str, Any]) -> None:
    assert step_time_rows(report)[1] == [
        ["forward and backward", "100 s", "95 s", "+5.3%"],
        ["sweep + motion not hidden", "50 s", "48 s", "+4.2%"],
        ["step", "150 s", "143 s", "+4.9%"],
        ["evaluations, shared out", "2.5 s", "–", "–"],
        ["checkpoints, shared out", "1.5 s", "–", "–"],
    ]


def test_seconds_that_nobody_predicted_are_shown_alone(report: dict[str, Any]) -> None:
    report["step_seconds"]["predicted"] = None
    assert [row[1:3] for row in step_time_rows(report)[1]][:3] == [["100 s", "–"], ["50 s", "–"], ["150 s", "–"]]


def test_every_table_of_a_finished_run_has_rows_as_wide_as_its_columns(report: dict[str, Any]) -> None:
    tables = memory_tables(report)
    assert len(tables) == 11
    assert all(len(row) == len(columns) for columns, rows in tables.values() for row in rows)


def test_an_old_run_has_the_tables_that_it_can_fill(old_run: Path) -> None:
    assert list(memory_tables(summarize(read_run(old_run)))) == ["Peak of each phase", "Bytes of a step"]


def test_a_run_that_has_hardly_begun_has_none(bare_run: Path) -> None:
    assert list(memory_tables(summarize(read_run(bare_run)))) == ["Bytes of a step"]
