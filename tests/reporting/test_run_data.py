"""Reading a run folder: what is whole is read, what is broken is named."""

import re
from pathlib import Path

import pytest

from pcscale.common.errors import RequestError
from pcscale.reporting.run_data import read_run
from tests.reporting.run_folder import EVALUATION, SKIPPED_STEP, STEPS, TOKENS_PER_STEP, metrics, write_document


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
    assert (data.plan, data.evaluation, data.merge, data.usage) == (None, {}, None, None)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"absent is not a folder\. Name the output folder of a run"):
        read_run(tmp_path / "absent")


@pytest.mark.parametrize("name", ["run.yaml", "metrics.jsonl"])
def test_a_folder_without_settings_or_metrics_is_no_run(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(RequestError, match=f"is not a run folder: it has no {re.escape(name)}, expected run.yaml and"):
        read_run(run)


@pytest.mark.parametrize("name", ["plan.json", "evaluation.json", "merge.json", "usage.json"])
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
