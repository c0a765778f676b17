"""Runs side by side: the numbers against numpy over the rows that were written, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcscale.common.errors import RequestError
from pcscale.reporting.compare import compare_runs, labels
from pcscale.reporting.table import difference_rows, loss_rows, run_rows
from tests.reporting.compared_runs import (
    FIRST,
    SECOND,
    START_LOSS,
    Rows,
    change_document,
    write_compared,
    write_rows,
)
from tests.reporting.run_folder import EVALUATION, USAGE, on_gpu, write_document
from tests.runs import snapshot

COARSE: Rows = [(150, 3.0, 6.75), (350, 6.0, 5.25)]
"""Evaluated where the others are not."""


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [write_compared(tmp_path / "first", FIRST), write_compared(tmp_path / "second", SECOND)]


def _by_hand(rows: Rows) -> tuple[list[float], list[float], list[float]]:
    """Tokens, seconds and losses of the start and of every evaluation."""
    seconds = np.cumsum([row[1] for row in rows])
    points = [(0, 0.0, START_LOSS)]
    points += [(row[0], float(at), row[2]) for row, at in zip(rows, seconds, strict=True) if row[2] is not None]
    tokens, times, losses = zip(*points, strict=True)
    return list(tokens), list(times), list(losses)


# The numbers


def test_a_curve_begins_with_the_start_and_has_every_evaluation(pair: list[Path]) -> None:
    first, second = compare_runs(pair)["runs"]
    assert first["curve"] == {"tokens": [0, 200, 400], "seconds": [0.0, 4.0, 12.0], "loss": [8.0, 6.0, 5.0]}
    assert second["curve"]["tokens"] == [0, 100, 200, 300, 400, 500]
    assert second["curve"]["seconds"] == [0.0, 1.0, 2.0, 3.0, 4.0, 9.0]
    assert (first["steps"], first["tokens"], first["seconds"]) == (4, 400, 12.0)
    assert (second["steps"], second["tokens"], second["seconds"]) == (5, 500, 9.0)


def test_equal_tokens_are_the_most_that_all_were_evaluated_at(pair: list[Path]) -> None:
    found = compare_runs(pair)
    assert found["equal"]["tokens"] == 400
    assert [run["loss"]["at_equal_tokens"] for run in found["runs"]] == [5.0, 4.75]
    assert [run["difference"]["at_equal_tokens"] for run in found["runs"]] == [0.0, -0.25]


def test_where_no_evaluation_meets_another_equal_tokens_are_the_most_that_all_have_reached(
    pair: list[Path], tmp_path: Path
) -> None:
    found = compare_runs([*pair, write_compared(tmp_path / "coarse", COARSE)])
    assert found["equal"]["tokens"] == 350
    expected = []
    for rows in (FIRST, SECOND, COARSE):
        tokens, _, losses = _by_hand(rows)
        expected.append(float(np.interp(350, tokens, losses)))
    assert [run["loss"]["at_equal_tokens"] for run in found["runs"]] == expected
    assert expected == [5.25, 5.125, 5.25]


def test_equal_time_is_the_longest_that_all_have_reached_with_straight_lines_between_evaluations(
    pair: list[Path],
) -> None:
    found = compare_runs(pair)
    assert found["equal"]["seconds"] == 9.0
    expected = []
    for rows in (FIRST, SECOND):
        _, seconds, losses = _by_hand(rows)
        expected.append(float(np.interp(9.0, seconds, losses)))
    assert [run["loss"]["at_equal_seconds"] for run in found["runs"]] == expected
    assert expected == [6.0 - 1.0 * 5 / 8, 4.5]
    assert found["runs"][1]["difference"]["at_equal_seconds"] == pytest.approx(4.5 - 5.375)


def test_random_runs_agree_with_numpy(tmp_path: Path) -> None:
    chance = np.random.default_rng(7)
    all_rows: list[Rows] = []
    for length in (17, 40, 29):
        evaluated = chance.random(length) < 0.3
        evaluated[-1] = True
        all_rows.append(
            [
                (int(64 * (step + 1)), float(chance.uniform(0.5, 2)), float(chance.uniform(3, 8)) if seen else None)
                for step, seen in enumerate(evaluated)
            ]
        )
    found = compare_runs([write_compared(tmp_path / str(number), rows) for number, rows in enumerate(all_rows)])
    curves = [_by_hand(rows) for rows in all_rows]
    assert found["equal"]["seconds"] == pytest.approx(min(curve[1][-1] for curve in curves))
    for run, (tokens, seconds, losses) in zip(found["runs"], curves, strict=True):
        assert run["loss"]["at_equal_tokens"] == pytest.approx(np.interp(found["equal"]["tokens"], tokens, losses))
        assert run["loss"]["at_equal_seconds"] == pytest.approx(np.interp(found["equal"]["seconds"], seconds, losses))


def test_differences_are_from_the_first_run(pair: list[Path]) -> None:
    forward, backward = compare_runs(pair), compare_runs(pair[::-1])
    assert [run["loss"]["final"] for run in forward["runs"]] == [5.0, 4.5]
    assert [run["difference"]["final"] for run in forward["runs"]] == [0.0, -0.5]
    assert [run["difference"]["final"] for run in backward["runs"]] == [0.0, 0.5]


def test_a_held_out_loss_that_was_not_finite_is_no_point_of_the_curve(tmp_path: Path, pair: list[Path]) -> None:
    write_rows(pair[1], [(100, 1.0, 7.0), (200, 1.0, None), (300, 1.0, 5.5), (400, 1.0, 4.75), (500, 5.0, 4.5)])
    assert compare_runs(pair)["runs"][1]["curve"]["tokens"] == [0, 100, 300, 400, 500]


def test_sizes_losses_of_base_and_start_and_seeds_are_given(tmp_path: Path) -> None:
    runs = [write_compared(tmp_path / "a", seed=3), write_compared(tmp_path / "b", seed=4)]
    found = compare_runs(runs)["runs"]
    assert [run["seed"] for run in found] == [3, 4]
    assert {run["parameters"] for run in found} == {67_000_000}
    assert {run["base_parameters"] for run in found} == {134_515_008}
    assert {(run["loss"]["base"], run["loss"]["start"]) for run in found} == {(2.9137, START_LOSS)}


def test_peaks_are_the_highest_of_all_phases_as_measured(pair: list[Path], tmp_path: Path) -> None:
    gpu = write_compared(tmp_path / "gpu")
    write_document(gpu, "usage.json", on_gpu()["usage"])
    (pair[1] / "usage.json").unlink()
    peaks = [run["peak"] for run in compare_runs([*pair, gpu])["runs"]]
    host = max(phase["peak"]["host_anonymous"] for phase in USAGE["phases"].values())
    device = max(phase["peak"]["device"] or 0 for phase in on_gpu()["usage"]["phases"].values())
    assert peaks[0] == {"host_anonymous_bytes": host, "device_bytes": None}
    assert peaks[1] == {"host_anonymous_bytes": None, "device_bytes": None}
    assert peaks[2]["device_bytes"] == device > 0


# What differs


def test_only_settings_that_differ_are_given_and_not_where_a_run_lies(tmp_path: Path) -> None:
    runs = [
        write_compared(tmp_path / "a", learning_rate=1e-3),
        write_compared(tmp_path / "b", learning_rate=2e-3, distill={"weight": 0.25}),
    ]
    assert compare_runs(runs)["settings"] == {
        "learning_rate": [1e-3, 2e-3],
        "distill.weight": [None, 0.25],
        "distill.temperature": [None, 1.0],
    }


def test_another_base_is_allowed_and_said(tmp_path: Path) -> None:
    found = compare_runs([write_compared(tmp_path / "a"), write_compared(tmp_path / "b", base="acme/other-llm")])
    assert found["settings"] == {"base": ["acme/tiny-llm", "acme/other-llm"]}
    assert ["base", "acme/tiny-llm", "acme/other-llm"] in difference_rows(found)[1]


def test_other_machines_are_said_since_times_depend_on_them(pair: list[Path]) -> None:
    change_document(pair[1], "usage.json", machine=USAGE["machine"] | {"cores": 64, "gpu": "Imaginary GPU"})
    found = compare_runs(pair)
    assert found["machine"] == {"cores": [2, 64], "gpu": [None, "Imaginary GPU"]}
    assert ["machine: gpu", "–", "Imaginary GPU"] in difference_rows(found)[1]


def test_a_run_that_has_measured_nothing_is_compared(pair: list[Path]) -> None:
    (pair[0] / "usage.json").unlink()
    assert compare_runs(pair)["machine"]["cores"] == [None, 2]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/runs/a", "/runs/b"], ["a", "b"]),
        (["/x/run", "/y/run"], ["x/run", "y/run"]),
        (["/x/run", "/y/run", "/y/other"], ["x/run", "y/run", "y/other"]),
        (["/1/x/run", "/2/x/run", "/2/y/run"], ["1/x/run", "2/x/run", "2/y/run"]),
        (["/run", "/x/run"], ["run", "x/run"]),
    ],
)
def test_labels_are_paths_below_the_nearest_common_folder(paths: list[str], names: list[str]) -> None:
    assert labels([Path(path) for path in paths]) == names


# Rows of text


def test_the_rows_hold_sizes_losses_and_what_differs(tmp_path: Path) -> None:
    settings = {"seed": 1, "bf16": True, "report_to": ["tensorboard", "wandb"]}
    found = compare_runs([write_compared(tmp_path / "a"), write_compared(tmp_path / "b", SECOND, **settings)])
    columns, rows = run_rows(found)
    assert columns == ["run", "params", "of base", "seed", "steps", "tokens", "training", "host memory"]
    assert [row[:7] for row in rows] == [
        ["a", "67.0 M", "49.8%", "0", "4", "400", "12 s"],
        ["b", "67.0 M", "49.8%", "1", "5", "500", "9 s"],
    ]
    assert rows[0][7] == rows[1][7] == "3.2 GiB"
    columns, rows = loss_rows(found)
    assert columns == ["run", "base", "start", "final", "vs first", "at 400 tokens", "vs first", "at 9 s", "vs first"]
    assert rows == [
        ["a", "2.9137", "8.0000", "5.0000", "+0.0000", "5.0000", "+0.0000", "5.3750", "+0.0000"],
        ["b", "2.9137", "8.0000", "4.5000", "-0.5000", "4.7500", "-0.2500", "4.5000", "-0.8750"],
    ]
    columns, rows = difference_rows(found)
    assert columns == ["setting", "a", "b"]
    assert rows == [
        ["max_steps", "4", "5"],
        ["bf16", "false", "true"],
        ["seed", "0", "1"],
        ["report_to", "", "tensorboard, wandb"],
    ]


def test_device_memory_has_a_column_where_one_run_measured_it(pair: list[Path], tmp_path: Path) -> None:
    gpu = write_compared(tmp_path / "gpu")
    write_document(gpu, "usage.json", on_gpu()["usage"])
    columns, rows = run_rows(compare_runs([*pair, gpu]))
    assert columns[-2:] == ["host memory", "device memory"]
    assert [row[-1] == "–" for row in rows] == [True, True, False]


def test_a_long_training_is_given_in_hours(pair: list[Path]) -> None:
    write_rows(pair[0], [(100, 2.0, None), (200, 2000.0, 6.0), (300, 1720.0, None), (400, 1.0, 5.0)])
    assert run_rows(compare_runs(pair))[1][0][6] == "1:02:03"


# What is refused


def _cut_metrics(run: Path) -> None:
    (run / "metrics.jsonl").write_text("", encoding="utf-8")


def _without(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def _without_model(name: str) -> Callable[[Path], None]:
    return lambda run: write_document(
        run, "evaluation.json", {key: value for key, value in EVALUATION.items() if key != name}
    )


def _with_model(name: str, value: Any) -> Callable[[Path], None]:
    return lambda run: change_document(run, "evaluation.json", **{name: value})


def _with_rows(*rows: tuple[int, float, float | None]) -> Callable[[Path], None]:
    return lambda run: write_rows(run, list(rows))


def _with_usage(phases: Any) -> Callable[[Path], None]:
    return lambda run: change_document(run, "usage.json", phases=phases)


def _without_a_line(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:1] + lines[2:]), encoding="utf-8")


GO_ON = "Go on with: pcscale compress {run}/run.yaml --resume"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without("run.yaml"), "{run} is not a run folder: it has no run.yaml, "),
        (_without("metrics.jsonl"), "{run} is not a run folder: it has no metrics.jsonl, "),
        (_cut_metrics, f"{{run}} is not finished: 0 of 5 steps are done. {GO_ON}"),
        (_with_rows(*SECOND[:3]), f"{{run}} is not finished: 3 of 5 steps are done. {GO_ON}"),
        (_without("evaluation.json"), f"{{run}} is not finished: evaluation.json has no 'base'. {GO_ON}"),
        (_without_model("start"), f"{{run}} is not finished: evaluation.json has no 'start'. {GO_ON}"),
        (_without_model("compressed"), f"{{run}} is not finished: evaluation.json has no 'compressed'. {GO_ON}"),
        (_with_model("start", 3), "{run}/evaluation.json: start is 3, expected a JSON object. Restore the file."),
        (
            _with_rows(*SECOND[:4], (500, 5.0, None)),
            f"{{run}}/metrics.jsonl has no eval_loss in its last line. {GO_ON} max_steps=6",
        ),
        (
            _with_rows(*SECOND[:4], (500, -1.0, 3.0)),
            "{run}/metrics.jsonl line 5: seconds is -1.0, expected greater than or equal to 0. Restore the file.",
        ),
        (_without_a_line, "{run}/metrics.jsonl line 2 is of step 3. Restore the file."),
        (_with_usage([1]), "{run}/usage.json: phases is [1], expected a JSON object. Restore the file."),
    ],
)
def test_a_folder_that_is_no_finished_run_is_refused(
    spoil: Callable[[Path], None], message: str, pair: list[Path]
) -> None:
    spoil(pair[1])
    for order in (pair, pair[::-1]):
        with pytest.raises(RequestError) as caught:
            compare_runs(order)
        assert str(caught.value).startswith(message.format(run=pair[1]))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_runs_are_refused(count: int, pair: list[Path]) -> None:
    with pytest.raises(
        RequestError, match=rf"^a comparison takes two runs at least, found {count}\. Name more run folders\.$"
    ):
        compare_runs(pair[:count])


def test_a_run_named_twice_is_refused(pair: list[Path], tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.symlink_to(pair[0])
    for other in (pair[0], pair[1] / ".." / "first", again):
        with pytest.raises(RequestError) as caught:
            compare_runs([*pair, other])
        assert str(caught.value) == f"{other} is named twice. Name different runs."


def test_a_missing_folder_is_refused(pair: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none is not a folder\. Name the output folder of a run\.$"):
        compare_runs([*pair, tmp_path / "none"])


def test_the_runs_are_left_as_they_are(pair: list[Path], tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    compare_runs(pair)
    assert snapshot(tmp_path) == before
