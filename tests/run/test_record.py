"""Reading a run folder: every part that is whole becomes a typed value, every one that is broken is named."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pcscale.common.errors import RequestError
from pcscale.run.documents import read_document, write_document
from pcscale.run.record import MERGE_KEYS, PLAN_KEYS, Evaluation, GeneratedText, MemorySamples, RunRecord, RunUsage
from tests.reporting.run_folder import EVALUATION, FINISHED, MEMORY, MERGE, PLAN, STEPS, USAGE, write_run

SAMPLE = {"seconds": 1.5, "phase": "train", "stage": None, "host": {"records": 5}, "device": {}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", FINISHED)


def _put(run: Path, name: str, value: Any) -> None:
    (run / name).write_text(json.dumps(value), encoding="utf-8")


def _refusal(run: Path) -> str:
    with pytest.raises(RequestError) as caught:
        RunRecord.read(run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_finished_run_is_read_whole(run: Path) -> None:
    record = RunRecord.read(run)
    assert (record.path, len(record.steps)) == (run, STEPS)
    assert record.config.base == "acme/tiny-llm"
    assert record.settings_text == (run / "run.yaml").read_text(encoding="utf-8")
    assert (record.plan, record.merge) == (PLAN, MERGE)
    assert asdict(record.evaluation) == EVALUATION
    assert list(record.evaluation.models) == ["base", "start", "compressed"]
    assert record.evaluation.sample == GeneratedText("Once upon a time", "there was a <fox> & a crow.")
    assert record.usage is not None
    assert asdict(record.usage) == USAGE
    assert record.usage.phases["train"].stages["sweep"].seconds == 1200.0
    assert [asdict(sample) for sample in record.samples] == MEMORY["samples"]
    assert record.samples[20].stage == "backward"
    assert record.samples[20].total == sum(MEMORY["samples"][20]["host"].values())


def test_parts_that_a_run_has_not_reached_are_absent(tmp_path: Path) -> None:
    record = RunRecord.read(write_run(tmp_path / "run", {}))
    assert (record.plan, record.evaluation, record.merge, record.usage) == (None, Evaluation(), None, None)
    assert record.samples == []
    assert record.evaluation.models == {}


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [("evaluation", Evaluation, EVALUATION), ("usage", RunUsage, USAGE), ("memory", MemorySamples, MEMORY)],
)
def test_a_part_is_written_as_it_is_read(name: str, kind: type, value: Any, run: Path) -> None:
    path = run / f"{name}.json"
    write_document(path, read_document(path, kind))
    assert json.loads(path.read_text(encoding="utf-8")) == value


def test_a_model_that_is_not_evaluated_yet_is_not_written(tmp_path: Path) -> None:
    write_document(tmp_path / "evaluation.json", Evaluation(sample=GeneratedText("a", "b")))
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"sample": {"prompt": "a", "compressed": "b"}}


def test_keys_that_nobody_reads_are_passed_over(run: Path) -> None:
    _put(run, "usage.json", USAGE | {"colour": "blue"})
    _put(run, "plan.json", PLAN | {"colour": "blue"})
    record = RunRecord.read(run)
    assert record.plan is not None
    assert record.plan["colour"] == "blue"


# Broken files


@pytest.mark.parametrize(
    ("samples", "problem"),
    [
        ("many", "samples is 'many', expected a valid list"),
        ([SAMPLE, 12], "samples[1] is 12, expected a JSON object"),
        ([SAMPLE | {"seconds": "late"}], "samples[0].seconds is 'late', expected a valid number"),
        ([SAMPLE | {"seconds": float("nan")}], "samples[0].seconds is nan, expected a finite number"),
        ([SAMPLE, SAMPLE | {"phase": 3}], "samples[1].phase is 3, expected a valid string"),
        ([SAMPLE | {"host": [5]}], "samples[0].host is [5], expected a JSON object"),
        ([SAMPLE | {"device": {"records": "5"}}], "samples[0].device.records is '5', expected a valid integer"),
        ([SAMPLE | {"host": {"records": None}}], "samples[0].host.records is None, expected a valid integer"),
    ],
)
def test_a_broken_series_is_refused_by_its_sample(run: Path, samples: object, problem: str) -> None:
    _put(run, "memory.json", {"samples": samples})
    remedy = "Restore or remove the file: a report does without it."
    assert _refusal(run) == f"{run / 'memory.json'}: {problem}. {remedy}"


@pytest.mark.parametrize("key", SAMPLE)
def test_a_sample_without_a_key_is_refused(run: Path, key: str) -> None:
    _put(run, "memory.json", {"samples": [{name: value for name, value in SAMPLE.items() if name != key}]})
    assert _refusal(run).startswith(f"{run / 'memory.json'} has no 'samples[0].{key}'. Restore or remove")


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("usage", {"phases": [1]}, "phases is [1], expected a JSON object"),
        ("usage", {"phases": {"train": 3}}, "phases.train is 3, expected a JSON object"),
        (
            "usage",
            {"phases": {"train": {"peak": {"host_anonymous": "much"}}}},
            "phases.train.peak.host_anonymous is 'much', expected a valid integer",
        ),
        (
            "usage",
            {"phases": {"train": {"stages": {"sweep": {"seconds": -1.0}}}}},
            "phases.train.stages.sweep.seconds is -1.0, expected greater than or equal to 0",
        ),
        ("usage", {"machine": None}, "machine is None, expected a JSON object"),
        (
            "usage",
            {"limits": {**USAGE["limits"], "host_bytes": 0.5}},
            "limits.host_bytes is 0.5, expected a valid inte",
        ),
        ("evaluation", {"start": 3}, "start is 3, expected a JSON object"),
        (
            "evaluation",
            {"start": EVALUATION["start"] | {"loss": "low"}},
            "start.loss is 'low', expected a valid number",
        ),
        (
            "evaluation",
            {"base": EVALUATION["base"] | {"parameters": 0}},
            "base.parameters is 0, expected greater than 0",
        ),
        ("evaluation", {"base": EVALUATION["base"] | {"tokens": 10**400}}, "base.tokens is 1000000"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_place(
    run: Path, name: str, change: dict[str, Any], problem: str
) -> None:
    _put(run, f"{name}.json", FINISHED[name] | change)
    found = _refusal(run)
    assert found.startswith(f"{run / name}.json: {problem}")
    assert found.endswith(". Restore the file.")
    assert len(found) < 300 + len(str(run))


def _cases() -> list[tuple[str, str]]:
    keys = {"plan": PLAN_KEYS, "merge": MERGE_KEYS, "usage": ("phases", "machine", "limits"), "memory": ("samples",)}
    return [(name, key) for name, found in keys.items() for key in found]


@pytest.mark.parametrize(("name", "key"), _cases())
def test_a_document_without_a_key_is_refused(run: Path, name: str, key: str) -> None:
    _put(run, f"{name}.json", {found: value for found, value in FINISHED[name].items() if found != key})
    assert _refusal(run).startswith(f"{run / name}.json has no '{key}'. Restore ")


@pytest.mark.parametrize("name", ["plan.json", "evaluation.json", "merge.json", "usage.json", "memory.json"])
@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda path: path.write_text('{"base": ', encoding="utf-8"), " is not JSON ("),
        (lambda path: path.write_text("[1]", encoding="utf-8"), " is [1], expected a JSON object. Restore "),
        (lambda path: (path.unlink(), path.mkdir()), " is not JSON ([Errno 21] Is a directory"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(
    run: Path, name: str, spoil: Callable[[Path], object], problem: str
) -> None:
    spoil(run / name)
    assert _refusal(run).startswith(f"{run / name}{problem}")


# No run


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"absent is not a folder\. Name the output folder of a run\.$"):
        RunRecord.read(tmp_path / "absent")


@pytest.mark.parametrize("name", ["run.yaml", "metrics.jsonl"])
def test_a_folder_without_settings_or_metrics_is_no_run(run: Path, name: str) -> None:
    (run / name).unlink()
    message = f"is not a run folder: it has no {re.escape(name)}, expected run.yaml and metrics.jsonl. Name the output"
    with pytest.raises(RequestError, match=message):
        RunRecord.read(run)
