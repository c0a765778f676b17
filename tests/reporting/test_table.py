"""Rows of text that the page and the terminal share."""

from pcscale.reporting.table import comparison_rows, memory_rows, phase_rows, plan_rows, task_rows
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


def test_the_plan_names_trainable_state_flops_and_homes() -> None:
    assert ["trainable state", "2.2 GiB"] in plan_rows(PLAN)[1]
    assert ["FLOPs, train per token", "412.0 M"] in plan_rows(PLAN)[1]
    assert ["frozen base", "disk", "256.6 MiB"] in memory_rows(PLAN)[1]
