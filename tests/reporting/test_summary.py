"""Predicted beside measured: every sum and every pair is of the right things."""

import copy
from pathlib import Path
from typing import Any

import pytest

from pcscale.common.ledger import COMPONENTS
from pcscale.reporting import summary
from pcscale.run.record import RunRecord
from tests.reporting.memory_run import MB, MEASURED_STAGES, PREDICTED_STAGES, TRAIN_SECONDS
from tests.reporting.run_folder import PLAN, STEPS, USAGE, write_document


def pair(predicted: float | None, measured: float | None) -> dict[str, float | None]:
    return {"predicted_bytes": predicted, "measured_bytes": measured}


def reread(run: Path, **documents: dict[str, Any]) -> RunRecord:
    for name, document in documents.items():
        write_document(run, f"{name}.json", document)
    return RunRecord.read(run)


def test_parts_of_working_memory_are_summed(run: Path) -> None:
    parts = summary.phases(RunRecord.read(run))["train"]["components"]
    assert parts["working memory"] == {"home": "host", **pair((320 + 210 + 44 + 110) * MB, 799 * MB)}
    assert set(parts) <= set(COMPONENTS)
    assert sum(part["predicted_bytes"] for part in parts.values()) == PLAN["peak"]["train"]["host_bytes"]


def test_each_named_part_stands_beside_itself(run: Path) -> None:
    parts = summary.phases(RunRecord.read(run))["train"]["components"]
    assert parts["libraries"] == {"home": "host", **pair(470 * MB, 455 * MB)}
    assert parts["records"] == {"home": "host", **pair(804 * MB, 804 * MB)}
    assert "frozen base" not in parts  # In files.
    assert list(parts) == sorted(parts, key=COMPONENTS.index)


def test_pinned_memory_is_the_hosts() -> None:
    parts = summary.components(
        {"pinned buffers": {"home": "pinned", "bytes": 7}}, {"host": {"pinned buffers": 8}, "device": {}}
    )
    assert parts == {"pinned buffers": {"home": "host", **pair(7, 8)}}


def test_a_part_on_device_and_host_has_two_entries() -> None:
    predicted = {
        "records": {"home": "host", "bytes": 30},
        "activations": {"home": "device", "bytes": 5},
        "logits": {"home": "device", "bytes": 6},
    }
    measured = {"host": {"records": 31, "working memory": 2}, "device": {"working memory": 12, "records": 0}}
    assert summary.components(predicted, measured) == {
        "records": {"home": "host", **pair(30, 31)},
        "working memory": {"home": "device", **pair(11, 12)},
        "working memory (host)": {"home": "host", **pair(None, 2)},
    }


def test_memory_that_was_predicted_elsewhere_is_not_compared() -> None:
    predicted = {"gradients": {"home": "host", "bytes": 4}}
    assert summary.components(predicted, {"host": {}, "device": {"gradients": 4}}) == {
        "gradients": {"home": "device", **pair(None, 4)},
        "gradients (host)": {"home": "host", **pair(4, None)},
    }


def test_a_measured_part_that_nobody_knows_keeps_its_name() -> None:
    parts = summary.components({"new": {"home": "host", "bytes": 3}}, {"host": {"new": 4}, "device": {}})
    assert parts == {"new": {"home": "host", **pair(3, 4)}}


def test_a_devices_context_is_no_working_memory() -> None:
    predicted = {"device context": {"home": "device", "bytes": 640}, "logits": {"home": "device", "bytes": 9}}
    assert summary.components(predicted, {"host": {}, "device": {"working memory": 8}}) == {
        "device context": {"home": "device", **pair(640, None)},
        "working memory": {"home": "device", **pair(9, 8)},
    }


def test_stages_have_sums_of_their_own(run: Path) -> None:
    stages = summary.phases(RunRecord.read(run))["train"]["stages"]
    assert list(stages) == list(PREDICTED_STAGES)
    for name, stage in stages.items():
        predicted, measured = sum(PREDICTED_STAGES[name].values()) * MB, sum(MEASURED_STAGES[name].values()) * MB
        assert stage["host_anonymous"] == pair(predicted, measured)
        assert stage["seconds"] == TRAIN_SECONDS[name]
        assert stage["device"] is None
        assert "stages" not in stage
    assert stages["backward"]["components"]["working memory"] == {"home": "host", **pair(530 * MB, 799 * MB)}
    assert summary.phases(RunRecord.read(run))["merge"]["stages"] == {}


def test_the_hosts_and_the_devices_sums_are_kept_apart(gpu_run: Path) -> None:
    backward = summary.phases(RunRecord.read(gpu_run))["train"]["stages"]["backward"]
    assert backward["host_anonymous"] == pair(470 * MB, 455 * MB)
    assert backward["device"] == pair(2_676 * MB, 2_945 * MB)
    assert backward["components"]["records"]["home"] == "device"


def test_a_stage_that_was_not_predicted_is_only_measured(run: Path) -> None:
    plan = copy.deepcopy(PLAN)
    del plan["phases"]["train"]["stages"]["sweep"]
    sweep = summary.phases(reread(run, plan=plan))["train"]["stages"]["sweep"]
    assert sweep["host_anonymous"]["predicted_bytes"] is None
    assert sweep["components"]["records"] == {"home": "host", **pair(None, 804 * MB)}


def test_seconds_of_a_step_are_those_of_its_stages(run: Path) -> None:
    recurring = ("forward", "backward", "sweep", "evaluate", "checkpoint")
    assert summary.step_seconds(RunRecord.read(run)) == {
        name: pytest.approx(TRAIN_SECONDS[name] / STEPS) for name in recurring
    }


def test_bytes_of_a_step(run: Path) -> None:
    assert summary.step_bytes(RunRecord.read(run)) == {
        "moved": pair(269 * MB, 270 * MB),
        "written": pair(200 * MB, 210 * MB),
        "communicated": pair(0, None),
    }


def test_only_this_run_is_measured_among_the_ways_to_train(gpu_run: Path) -> None:
    ways = summary.summarize(RunRecord.read(gpu_run))["alternatives"]
    assert {name: way["measured_bytes"] for name, way in ways.items()} == {
        "published form": None,
        "hard pruning": None,
        "this run": (455 + 2_945) * MB,
    }
    assert {name: way["bytes"] for name, way in ways.items()} == {
        name: way["bytes"] for name, way in PLAN["alternatives"].items()
    }


def test_pinned_memory_is_not_counted_twice(run: Path) -> None:
    usage = copy.deepcopy(USAGE)
    usage["phases"]["train"]["peak"]["pinned"] = 500 * MB
    ways = summary.summarize(reread(run, usage=usage))["alternatives"]
    assert ways["this run"]["measured_bytes"] == 3_400 * MB


@pytest.mark.parametrize(
    ("predicted", "measured", "expected"),
    [(100, 110, 0.1), (100, 75, -0.25), (0, 5, None), (None, 5, None), (5, None, None), (100, 0, -1.0)],
)
def test_a_difference_is_measured_against_predicted(
    predicted: int | None, measured: int | None, expected: float | None
) -> None:
    assert summary.difference(predicted, measured) == (None if expected is None else pytest.approx(expected))
