"""Reading a run folder: what is whole is read, what is broken is named."""

import re
from pathlib import Path

import pytest

from pcscale.common.errors import RequestError
from pcscale.reporting.run_data import read_run
from tests.reporting.run_folder import (
    EVALUATION,
    MEMORY,
    SKIPPED_STEP,
    STEPS,
    TOKENS_PER_STEP,
    metrics,
    write_document,
    write_metrics,
)


def test_a_finished_run_is_read_whole(run: Path) -> None:
    data = read_run(run)
    assert len(data.steps) == STEPS
    assert data.steps[-1].tokens == STEPS * TOKENS_PER_STEP
    assert data.steps[SKIPPED_STEP - 1].skipped
    assert data.steps[SKIPPED_STEP - 1].loss is None
    assert [step.loss for step in data.steps] == [step["loss"] for step in metrics(STEPS)]
    assert data.config.base == "acme/tiny-llm"
    assert data.evaluation == EVALUATION


def test_what_a_run_has_not_reached_is_absent(bare_run: Path) -> None:
    data = read_run(bare_run)
    assert (data.plan, data.evaluation, data.merge, data.usage, data.memory) == (None, {}, None, None, None)


def test_the_series_of_memory_is_read(run: Path) -> None:
    samples = read_run(run).memory
    assert samples is not None
    assert len(samples) == len(MEMORY["samples"])
    assert samples[-1].phase == "evaluate"
    assert samples[20].moment == "backward"
    assert samples[20].host == MEMORY["samples"][20]["host"]
    assert samples[20].device == {}


SAMPLE = {"seconds": 1.5, "phase": "train", "moment": None, "host": {"records": 5}, "device": {}}


@pytest.mark.parametrize(
    ("samples", "problem"),
    [
        ("many", "has a str under 'samples', expected a list."),
        ([SAMPLE, 12], "sample 2 is 12, expected seconds, phase, moment, host, device."),
        (
            [{"seconds": 1.5, "phase": "train"}],
            "sample 1 has only seconds, phase, expected seconds, phase, moment, host",
        ),
        ([{}], "sample 1 has only nothing, expected seconds"),
        ([SAMPLE | {"seconds": "late"}], "sample 1: seconds is 'late', expected a number."),
        ([SAMPLE | {"seconds": float("nan")}], "sample 1: seconds is nan, expected a number."),
        ([SAMPLE | {"phase": 3}], "sample 1: phase is 3 and moment None, expected a name and a name or null."),
        ([SAMPLE | {"host": [5]}], "sample 1: host is [5], expected bytes by component."),
        ([SAMPLE | {"device": {"records": "5"}}], "sample 1: device is {'records': '5'}, expected bytes by component."),
        ([SAMPLE | {"host": {"records": None}}], "sample 1: host is {'records': None}, expected bytes by component."),
    ],
)
def test_a_broken_series_is_refused_by_its_sample(run: Path, samples: object, problem: str) -> None:
    write_document(run, "memory.json", {"samples": samples})
    with pytest.raises(RequestError) as caught:
        read_run(run)
    assert str(caught.value).startswith(f"{run / 'memory.json'} {problem}")
    assert str(caught.value).endswith("Restore the file, or delete it for a report without memory over time.")


def test_a_series_without_samples_is_refused(run: Path) -> None:
    write_document(run, "memory.json", {})
    with pytest.raises(RequestError, match=r"memory\.json has no 'samples', expected samples\. Restore the file\."):
        read_run(run)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"absent is not a folder\. Name the output folder of a run"):
        read_run(tmp_path / "absent")


@pytest.mark.parametrize("name", ["run.yaml", "metrics.jsonl"])
def test_a_folder_without_settings_or_metrics_is_no_run(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(RequestError, match=f"is not a run folder: it has no {re.escape(name)}, expected run.yaml and"):
        read_run(run)


@pytest.mark.parametrize("name", ["plan.json", "evaluation.json", "merge.json", "usage.json", "memory.json"])
def test_broken_json_is_refused_by_name(run: Path, name: str) -> None:
    (run / name).write_text('{"base": ', encoding="utf-8")
    with pytest.raises(RequestError, match=f"{re.escape(name)} is not JSON"):
        read_run(run)


def test_json_that_is_no_object_is_refused(run: Path) -> None:
    write_document(run, "merge.json", [1])
    with pytest.raises(RequestError, match=r"merge\.json holds a list, expected a JSON object"):
        read_run(run)


def test_a_document_without_an_expected_key_is_refused(run: Path) -> None:
    write_document(run, "usage.json", {"phases": {}})
    with pytest.raises(RequestError, match=r"usage\.json has no 'machine', expected phases, machine"):
        read_run(run)


def test_a_broken_last_metrics_line_is_ignored(run: Path) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 25, "tok')
    assert len(read_run(run).steps) == STEPS


def test_a_broken_metrics_line_in_the_middle_is_refused(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines[6] = lines[6][:20]
    (run / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(RequestError, match=r"metrics\.jsonl line 7 is not JSON"):
        read_run(run)


@pytest.mark.parametrize(
    ("line", "problem"), [('{"step": 1}', "it has no 'tokens'"), ("12", "it is not a JSON object")]
)
def test_a_metrics_line_that_is_no_step_is_refused(run: Path, line: str, problem: str) -> None:
    (run / "metrics.jsonl").write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(RequestError, match=f"line 1 is not a step: {problem}"):
        read_run(run)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("tokens", "many", "its tokens is 'many', expected a number"),
        ("seconds", None, "its seconds is None, expected a number"),
        ("learning_rate", True, "its learning_rate is True, expected a number"),
        ("tokens", 10**400, "its tokens is 10+, expected a number"),
        ("eval_loss", float("inf"), "its eval_loss is inf, expected a number"),
        ("eval_loss", float("nan"), "its eval_loss is nan, expected a number"),
        ("loss", [3.0], r"its loss is \[3\.0\], expected a number"),
    ],
)
def test_a_metrics_line_with_a_value_that_is_no_number_is_refused(
    run: Path, key: str, value: object, problem: str
) -> None:
    rows = metrics(STEPS)
    rows[3][key] = value
    write_metrics(run, rows)
    with pytest.raises(RequestError, match=rf"metrics\.jsonl line 4 is not a step: {problem}\. Restore the file\.$"):
        read_run(run)


def test_a_folder_in_place_of_a_document_is_refused(run: Path) -> None:
    (run / "evaluation.json").unlink()
    (run / "evaluation.json").mkdir()
    with pytest.raises(RequestError, match=r"evaluation\.json is not JSON \(\[Errno 21\] Is a directory"):
        read_run(run)
