"""`pcscale compare` over real tiny runs: its numbers against their files, its document, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from pcscale.jobs.compress import compress
from tests.runs import World, invoke, metrics, refusal, report_without_plots, run_config, snapshot
from tests.tiny import build_base, write_text

RUN_KEYS = {"label", "run", "base", "parameters", "base_parameters", "seed", "steps", "tokens", "seconds"} | {
    "peak",
    "loss",
    "difference",
    "curve",
}
AT_EQUAL = {"at_equal_tokens": "tokens", "at_equal_seconds": "seconds"}


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs over one training and one held-out text, and some over others. Read only."""
    folder = tmp_path_factory.mktemp("compared")
    validation = write_text(folder / "valid.txt", num_words=400, seed=9)
    data = {"train": [str(world.text)], "validation": [str(validation)]}
    short = write_text(folder / "short.txt", num_words=300, seed=1)  # as the other text begins
    other_base = build_base(folder / "other-base", tokenizer=True, hidden_size=48, seed=3)
    changes: dict[str, dict[str, Any]] = {
        "half/run": {},
        "control/run": {"method": "hard_prune", "max_steps": 15, "eval_steps": 4, "seed": 2},
        "other base": {"base": str(other_base)},
        "no validation": {"data": {"train": [str(world.text)]}},
        "other text": {"data": data | {"train": [str(validation)]}},
        "short text": {"data": data | {"train": [str(short)]}, "max_steps": 40},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcscale.jobs.compress.write_report", report_without_plots)
        for name, changed in changes.items():
            compress(run_config(world, folder / name, **({"data": data} | changed)))
    return {name: folder / name for name in changes}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "compare.png"


def _compare(output: Path, *runs: Path) -> Any:
    outcome = invoke("compare", *runs, "--output", output, "--json")
    assert outcome.exit_code == 0, outcome
    assert all(" drew on " in warning for warning in _warnings(outcome))
    return json.loads(outcome.stdout)


def _warnings(outcome: Result) -> list[str]:
    """What standard error holds, and that it holds nothing else; lines that were wrapped as one."""
    before, *warnings = " ".join(outcome.stderr.split()).split("warning: ")
    assert before == ""
    return [warning.strip() for warning in warnings]


def _evaluations(run: Path) -> dict[str, list[float]]:
    """Start and evaluations, read anew."""
    rows = metrics(run)
    seconds = np.cumsum([row["seconds"] for row in rows])
    start = json.loads((run / "evaluation.json").read_text())["start"]["loss"]
    points = [(0, 0.0, start)]
    points += [
        (row["tokens"], float(at), row["eval_loss"])
        for row, at in zip(rows, seconds, strict=True)
        if "eval_loss" in row
    ]
    return dict(zip(("tokens", "seconds", "loss"), map(list, zip(*points, strict=True)), strict=True))


def test_the_document_agrees_with_the_files_of_the_runs(runs: dict[str, Path], output: Path) -> None:
    chosen = [runs["half/run"], runs["control/run"]]
    before = [snapshot(run) for run in chosen]
    document = _compare(output, *chosen)
    assert set(document) == {"equal", "runs", "settings", "machine", "plot"}
    assert document["plot"] == str(output)
    assert document["machine"] == {}
    assert document["settings"] == {
        "method": ["projected", "hard_prune"],
        "aux_learning_rate": [0.03, None],
        "max_steps": [10, 15],
        "seed": [0, 2],
        "eval_steps": [5, 4],
    }
    evaluations = [_evaluations(run) for run in chosen]
    equal = document["equal"]
    # Evaluated at steps 5 and 10, and at 4, 8, 12 and 15, of 96 tokens.
    assert equal["tokens"] == 960
    assert equal["seconds"] == pytest.approx(min(found["seconds"][-1] for found in evaluations))
    for run, folder, found in zip(document["runs"], chosen, evaluations, strict=True):
        assert set(run) == RUN_KEYS
        assert run["curve"] == {key: pytest.approx(values) for key, values in found.items()}
        report = report_without_plots(folder)
        assert run["peak"]["host_anonymous_bytes"] == report["peak"]["host_anonymous"]["measured_bytes"]
        assert run["parameters"] == report["evaluation"]["compressed"]["parameters"]
        assert run["loss"]["final"] == found["loss"][-1]
        assert run["loss"]["merged"] == report["evaluation"]["compressed"]["loss"]
        assert run["loss"]["merged"] == pytest.approx(run["loss"]["final"], abs=1e-5)
        for key, axis in AT_EQUAL.items():
            assert run["loss"][key] == pytest.approx(np.interp(equal[axis], found[axis], found["loss"]))
    first, second = (run["loss"] for run in document["runs"])
    assert document["runs"][1]["difference"] == {key: second[key] - first[key] for key in ("final", *AT_EQUAL)}
    assert [snapshot(run) for run in chosen] == before
    assert output.read_bytes().startswith(b"\x89PNG")


def test_the_tables_name_runs_apart_and_hold_what_differs(runs: dict[str, Path], output: Path) -> None:
    outcome = invoke("compare", runs["half/run"], runs["control/run"], "--output", output, "--quiet")
    assert outcome.exit_code == 0
    lines = [line.split() for line in outcome.stdout.splitlines()]
    assert ["setting", "half/run", "control/run"] in lines
    assert ["method", "projected", "hard_prune"] in lines
    assert ["seed", "0", "2"] in lines
    named = [line for line in lines if line and line[0] == "half/run"]
    assert len(named) == 2
    assert named[0][-2:][1] == "MiB"
    assert outcome.stdout.rstrip().endswith(f"plot: {output}")


def test_runs_alike_in_all_settings_are_said_to_be(runs: dict[str, Path], output: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(runs["half/run"], tmp_path / "copy")
    outcome = invoke("compare", runs["half/run"], copy, "--output", output)
    assert "All settings are the same." in outcome.stdout
    assert "setting " not in outcome.stdout


def test_runs_that_drew_on_more_or_less_text_are_said_to_differ_in_its_order(
    runs: dict[str, Path], output: Path, tmp_path: Path
) -> None:
    half, control = runs["half/run"], runs["control/run"]
    # Ten and fifteen steps of four sequences of 24 tokens.
    assert _warnings(invoke("compare", half, control, "--output", output, "--json")) == [
        f"{half} drew on 960 tokens of the training text, {control} on 1,440: they saw it in another order, and may "
        "have calibrated on other parts of it"
    ]
    copy = shutil.copytree(half, tmp_path / "copy")
    assert _warnings(invoke("compare", half, copy, "--output", output, "--json")) == []


def test_another_base_with_the_same_tokenizer_is_compared_and_said(runs: dict[str, Path], output: Path) -> None:
    document = _compare(output, runs["half/run"], runs["other base"])
    assert set(document["settings"]) == {"base"}
    first, second = document["runs"]
    assert first["loss"]["base"] != second["loss"]["base"]
    assert first["base_parameters"] < second["base_parameters"]


def test_text_that_was_enough_for_its_run_is_compared(runs: dict[str, Path], output: Path) -> None:
    document = _compare(output, runs["half/run"], runs["short text"])
    assert set(document["settings"]) == {"data.train", "max_steps"}


def _other_tokenizer(folder: Path, world: World) -> Path:
    base = build_base(folder / "base", tokenizer=True, vocab_size=310)
    data = {"train": [str(world.text)], "validation": [str(world.text)]}
    compress(run_config(world, folder / "run", base=str(base), data=data, max_steps=1))
    return folder / "run"


def test_what_must_not_be_compared_is_refused_and_no_picture_is_written(
    runs: dict[str, Path], world: World, output: Path, tmp_path: Path, no_plots: None
) -> None:
    half = runs["half/run"]

    def said(*others: Path) -> str:
        return refusal("compare", half, *others, "--output", output)

    assert said() == "a comparison takes two runs at least, found 1. Name more run folders."
    assert said(world.base).startswith(f"{world.base} is not a run folder: it has no run.yaml")
    assert said(tmp_path / "none") == f"{tmp_path / 'none'} is not a folder. Name the output folder of a run."
    other = runs["no validation"]
    assert said(other).startswith(f"{half} and {other} hold out different text, of 480 and 96 tokens. ")
    other = runs["other text"]
    assert said(other) == f"{half} and {other} were trained on different text. Compare runs with one data.train."
    other = _other_tokenizer(tmp_path, world)
    assert said(other).startswith(f"{half} and {other} have different tokenizers, so a token of one is not a token of")
    assert not output.exists()


def test_no_run_at_all_is_a_wrong_command_line() -> None:
    assert refusal("compare") == "Missing argument 'RUN RUN'. `pcscale compare --help` lists what there is."


def test_a_stopped_run_is_refused_with_the_way_to_go_on(
    world: World, runs: dict[str, Path], output: Path, tmp_path: Path, no_plots: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pcscale.training import loop

    take_step: Callable[..., Any] = loop._take_step

    def stop_in_step_7(training: Any) -> Any:
        if training.state.step == 6:
            raise KeyboardInterrupt
        return take_step(training)

    monkeypatch.setattr(loop, "_take_step", stop_in_step_7)
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        compress(run_config(world, stopped))
    assert refusal("compare", stopped, runs["half/run"], "--output", output) == (
        f"{stopped} is not finished: 6 of 10 steps are done. "
        f"Go on with: pcscale compress {stopped / 'run.yaml'} --resume"
    )


def test_the_help_says_how_losses_are_compared() -> None:
    text = " ".join(invoke("compare", "--help").stdout.split())
    assert "Between two evaluations the loss lies on a straight line" in text
    assert "The start counts as 0 tokens, 0 seconds" in text
