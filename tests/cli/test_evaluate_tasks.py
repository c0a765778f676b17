"""`pcscale evaluate --tasks`: one document, tables, and what is refused."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.task_files import LAST_WORD, know_only, write_task
from tests.runs import World, invoke, refusal
from tests.tiny import build_base

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra `eval` is not installed")


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with all tasks that the harness knows."""
    (tmp_path / "tasks").mkdir()
    know_only(tmp_path / "tasks", monkeypatch)
    return tmp_path / "tasks"


@pytest.fixture
def evaluate(world: World) -> Callable[..., Any]:
    """Evaluate the tiny base; returns the document."""

    def ask(*arguments: str | Path) -> Any:
        outcome = invoke("evaluate", world.base, *arguments, "--json", "--quiet")
        assert (outcome.exit_code, outcome.stderr) == (0, "")
        return json.loads(outcome.stdout)

    return ask


@needs_harness
def test_tasks_alone_need_no_text(evaluate: Callable[..., Any], tasks: Path) -> None:
    document = evaluate("--tasks", write_task(tasks), "--limit", "5")
    assert set(document) == {"tasks", "mean_accuracy"}
    assert set(document["tasks"]["mine"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "samples"}
    assert document["tasks"]["mine"]["samples"] == 5


@needs_harness
def test_text_tasks_and_a_base_go_together(
    world: World, evaluate: Callable[..., Any], tasks: Path, tmp_path: Path
) -> None:
    other = build_base(tmp_path / "other", tokenizer=True, seed=1)
    text = ["--data", world.text, "--sequence-length", "24", "--tokens", "240"]
    asked = ["--tasks", write_task(tasks, "first"), "--tasks", write_task(tasks, "second")]
    both = evaluate(*text, *asked, "--base", other)
    base = both.pop("base")
    for found in (both, base):
        found.pop("tokens_per_second")
    alone = [evaluate(*text), evaluate(*asked)]
    alone[0].pop("tokens_per_second")
    assert both == alone[0] | alone[1]
    assert list(both["tasks"]) == list(base["tasks"]) == ["first", "second"]
    assert set(both) == set(base)
    assert base != both


@needs_harness
def test_the_tables_lay_model_and_base_side_by_side(world: World, tasks: Path) -> None:
    names = f"{write_task(tasks, 'choice')},{write_task(tasks, 'word', **LAST_WORD)}"
    outcome = invoke("evaluate", world.base, "--tasks", names, "--base", world.base)
    assert outcome.exit_code == 0
    assert outcome.stderr.splitlines() == ["tasks: choice, word", "tasks, base: choice, word"]
    rows = [line.split() for line in outcome.stdout.splitlines()]
    assert [row[:2] for row in rows if row and row[0] in ("choice", "word", "mean")] == [
        ["choice", "acc"],
        ["choice", "acc_norm"],
        ["word", "perplexity"],
        ["word", "acc"],
        ["mean", "acc_norm,"],
    ]
    assert "+0.0000" in outcome.stdout
    assert "Held-out text" not in outcome.stdout


def test_nothing_to_evaluate_on_is_refused(world: World) -> None:
    assert refusal("evaluate", world.base) == (
        "there is nothing to evaluate on. Name text with --data, tasks with --tasks, or both."
    )


def test_without_the_extra_the_line_says_how_to_install_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcscale.evaluation.tasks.find_spec", lambda name: None)
    assert refusal("evaluate", world.base, "--tasks", "piqa") == (
        "--tasks needs the package lm_eval. Run `pip install 'pcscale[eval]'`."
    )


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--limit", "0", "limit is 0, expected at least 1."),
        ("--num-fewshot", "-1", "num_fewshot is -1, expected at least 0."),
        ("--batch-size", "0", "Invalid value for '--batch-size': "),
    ],
)
def test_a_number_out_of_range_is_refused(flag: str, value: str, message: str, world: World) -> None:
    assert refusal("evaluate", world.base, "--tasks", "piqa", flag, value).startswith(message)


@needs_harness
def test_an_unknown_task_is_refused_before_any_model_is_loaded(world: World, tasks: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(world.base, tmp_path / "base"))
    (base / "model.safetensors").unlink()
    write_task(tasks, "rivers")
    text = ["--data", world.text, "--sequence-length", "24"]
    assert refusal("evaluate", base, *text, "--tasks", "river") == (
        "river is no task of lm_eval. Did you mean 'rivers'?"
    )
