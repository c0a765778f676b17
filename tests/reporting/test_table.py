"""Rows of text that the page and the terminal share."""

from pathlib import Path
from typing import Any

import pytest

from pcscale.reporting.summary import summarize
from pcscale.reporting.table import (
    alternative_rows,
    byte_rows,
    comparison_rows,
    component_rows,
    device_rows,
    memory_tables,
    phase_rows,
    plan_rows,
    stage_component_rows,
    step_time_rows,
    task_rows,
)
from pcscale.run.record import RunRecord
from tests.reporting.run_folder import EVALUATION, PLAN


def test_three_models_are_compared_with_the_base() -> None:
    columns, rows = comparison_rows(EVALUATION)
    assert all(len(row) == len(columns) for row in rows)
    assert rows[0] == ["base", "134.5 M", "100.0%", "2.9137", "+0.0000", "18.42", "0.9399", "812"]
    assert rows[1][:6] == ["start", "67.0 M", "49.8%", "8.2718", "+5.3581", "3,912"]
    assert rows[2][:6] == ["compressed", "67.0 M", "49.8%", "3.4412", "+0.5275", "31.22"]


def test_without_the_base_nothing_is_relative_to_it() -> None:
    _, rows = comparison_rows({"compressed": EVALUATION["compressed"]})
    assert [row[:5] for row in rows] == [["compressed", "67.0 M", "–", "3.4412", "–"]]


def test_without_models_there_are_no_rows() -> None:
    assert comparison_rows({})[1] == []


TASKS = {
    "tasks": {
        "arc_easy": {"acc": 0.5, "acc_stderr": 0.01, "acc_norm": 0.6, "acc_norm_stderr": 0.02, "samples": 2376},
        "gsm8k": {"exact_match,strict": 0.1, "exact_match_stderr,strict": 0.03, "samples": 7},
    },
    "mean_accuracy": 0.6,
}


def test_tasks_are_compared_with_the_base_metric_by_metric() -> None:
    one_less = {"arc_easy": TASKS["tasks"]["arc_easy"] | {"acc": 0.75}, "gsm8k": {"samples": 7}}
    columns, rows = task_rows({"compressed": TASKS, "base": {"tasks": one_less, "mean_accuracy": 0.625}})
    assert all(len(row) == len(columns) for row in rows)
    assert rows == [
        ["arc_easy", "acc", "0.5000", "0.0100", "0.7500", "0.0100", "-0.2500", "2,376"],
        ["arc_easy", "acc_norm", "0.6000", "0.0200", "0.6000", "0.0200", "+0.0000", "2,376"],
        ["gsm8k", "exact_match,strict", "0.1000", "0.0300", "–", "–", "–", "7"],
        ["mean", "acc_norm, or acc", "0.6000", "–", "0.6250", "–", "-0.0250", ""],
    ]


def test_tasks_without_a_base_stand_alone_and_one_task_has_no_mean() -> None:
    _, rows = task_rows({"compressed": TASKS | {"tasks": {"arc_easy": TASKS["tasks"]["arc_easy"]}}})
    assert rows[0] == ["arc_easy", "acc", "0.5000", "0.0100", "–", "–", "–", "2,376"]
    assert len(rows) == 2


def test_a_phase_shows_predicted_beside_measured() -> None:
    host = {"predicted_bytes": 2 * 2**30, "measured_bytes": 3 * 2**30}
    device = {"predicted_bytes": 2**30, "measured_bytes": 2**29}
    planned = {"predicted_bytes": 2**20, "measured_bytes": None}
    columns, rows = phase_rows(
        {
            "train": {"seconds": 3725.0, "host_anonymous": host, "device": device},
            "merge": {"seconds": None, "host_anonymous": planned, "device": None},
        }
    )
    assert columns[2] == "peak host memory"
    assert columns[5] == "peak device memory"
    assert rows[0] == ["train", "1:02:05", "3.0 GiB", "2.0 GiB", "+50.0%", "512.0 MiB", "1.0 GiB", "-50.0%"]
    assert rows[1] == ["merge", "–", "–", "1.0 MiB", "–", "–", "–", "–"]


def test_a_run_without_a_device_has_no_device_columns() -> None:
    host = {"predicted_bytes": 1, "measured_bytes": 1}
    assert len(phase_rows({"train": {"seconds": 1.0, "host_anonymous": host, "device": None}})[0]) == 5


def test_the_plan_names_trainable_state_and_flops() -> None:
    assert ["trainable state", "2.2 GiB"] in plan_rows(PLAN)[1]
    assert ["FLOPs, train per token", "412.0 M"] in plan_rows(PLAN)[1]


# Memory, bytes and seconds


@pytest.fixture
def report(run: Path) -> dict[str, Any]:
    return summarize(RunRecord.read(run))


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


def test_parts_by_stages_are_measured_and_predicted(report: dict[str, Any]) -> None:
    columns, rows = stage_component_rows(report["phases"]["train"]["stages"])
    assert columns == ["part", "home", "start", "forward", "backward", "sweep", "evaluate", "checkpoint"]
    by_name = {row[0]: row[2:] for row in rows}
    assert by_name["gradients"] == ["–", "–", "0.25 / 0.25", "0.25 / 0.25", "–", "–"]
    assert by_name["working memory"][2] == "0.74 / 0.49"
    assert by_name["working memory"][5] == "0.01 / –"


def test_ways_to_train_are_relative_to_what_this_run_took(report: dict[str, Any]) -> None:
    _, rows = alternative_rows(report["alternatives"])
    assert [row[:4] for row in rows] == [
        ["published form", "4.6 GiB", "predicted", "1.44 ×"],
        ["hard pruning", "1.6 GiB", "predicted", "0.50 ×"],
        ["this run", "3.1 GiB", "predicted", "0.97 ×"],
        ["this run", "3.2 GiB", "measured", "1.00 ×"],
    ]
    assert rows[1][4] == "model, gradients and moments, activations"


def test_devices_say_what_would_have_to_change() -> None:
    devices = [
        {"device_bytes": 8 * 10**9, "fits": False, "change": "does not fit"},
        {"device_bytes": 16 * 10**9, "fits": True, "change": "residency: disk"},
        {"device_bytes": 24 * 10**9, "fits": True, "change": ""},
    ]
    assert device_rows(devices)[1] == [
        ["8 GB", "no", "no setting makes it fit"],
        ["16 GB", "after a change", "residency: disk"],
        ["24 GB", "as it is", "nothing"],
    ]


def test_bytes_of_a_step_without_anyone_to_talk_to_have_no_such_row(report: dict[str, Any]) -> None:
    assert byte_rows(report)[1] == [
        ["moved", "257.5 MiB", "256.5 MiB", "+0.4%"],
        ["written", "200.3 MiB", "190.7 MiB", "+5.0%"],
    ]


def test_seconds_of_a_step_are_shown_by_stage(report: dict[str, Any]) -> None:
    assert step_time_rows(report)[1] == [
        ["forward", "40 s"],
        ["backward", "1:00"],
        ["sweep", "50 s"],
        ["evaluate", "2.5 s"],
        ["checkpoint", "1.5 s"],
    ]


def test_every_table_of_a_finished_run_has_rows_as_wide_as_its_columns(report: dict[str, Any]) -> None:
    tables = memory_tables(report)
    assert len(tables) == 11
    assert all(len(row) == len(columns) for columns, rows in tables.values() for row in rows)


def test_a_run_that_has_hardly_begun_has_none(bare_run: Path) -> None:
    assert list(memory_tables(summarize(RunRecord.read(bare_run)))) == ["Bytes of a step"]
