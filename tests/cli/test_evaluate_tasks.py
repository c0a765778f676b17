"""`pcscale evaluate --tasks`: one document, tables, and what is refused."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.task_files import LAST_WORD, write_task
from tests.runs import World, invoke, refusal
from tests.tiny import build_base

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra `eval` is not installed")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def evaluate(world: World) -> Callable[..., Any]:
    """Evaluate the tiny base; returns the document."""

    def ask(*arguments: str | Path) -> Any:
        outcome = invoke("evaluate", world.base, *arguments, "--json", "--quiet")
        assert (outcome.exit_code, outcome.stderr) == (0, "")
        return json.loads(outcome.stdout)

    return ask


@needs_harness
def test_tasks_alone_need_no_text(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    document = evaluate("--tasks", write_task(tmp_path), "--limit", "5")
    assert set(document) == {"tasks", "mean_accuracy"}
    assert set(document["tasks"]["mine"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "samples"}
    assert document["tasks"]["mine"]["samples"] == 5


@needs_harness
def test_text_tasks_and_a_base_go_together(world: World, evaluate: Callable[..., Any], tmp_path: Path) -> None:
    other = build_base(tmp_path / "other", tokenizer=True, seed=1)
    text = ["--data", world.text, "--sequence-length", "24", "--tokens", "240"]
    tasks = ["--tasks", write_task(tmp_path / "a", "first"), "--tasks", write_task(tmp_path / "b", "second")]
    both = evaluate(*text, *tasks, "--base", other)
    base = both.pop("base")
    for found in (both, base):
        found.pop("tokens_per_second")
    alone = [evaluate(*text), evaluate(*tasks)]
    alone[0].pop("tokens_per_second")
    assert both == alone[0] | alone[1]
    assert list(both["tasks"]) == list(base["tasks"]) == ["first", "second"]
    assert set(both) == set(base)
    assert base != both


@needs_harness
def test_the_tables_lay_model_and_base_side_by_side(world: World, tmp_path: Path) -> None:
    tasks = f"{write_task(tmp_path, 'choice')},{write_task(tmp_path, 'word', **LAST_WORD)}"
    outcome = invoke("evaluate", world.base, "--tasks", tasks, "--base", world.base)
    assert outcome.exit_code == 0
    assert outcome.stderr.splitlines() == [f"reading {tasks.replace(',', ', ')}"]
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


@needs_harness
def test_the_task_of_the_docs_runs_from_its_folder(
    evaluate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for language, name in (("yaml", "rivers.yaml"), ("json", "rivers.jsonl")):
        (tmp_path / name).write_text(page.partition(f"```{language}\n")[2].partition("```")[0])
    monkeypatch.chdir(tmp_path)
    assert evaluate("--tasks", "./rivers.yaml")["tasks"]["rivers"]["samples"] == 1


def test_nothing_to_evaluate_on_is_refused(world: World) -> None:
    assert refusal("evaluate", world.base) == (
        "there is nothing to evaluate on. Name text with --data, tasks with --tasks, or both."
    )


def test_without_the_extra_the_line_says_how_to_install_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pcscale.jobs.evaluate.find_spec", lambda name: None)
    assert refusal("evaluate", world.base, "--tasks", write_task(tmp_path)) == (
        "--tasks needs the package lm_eval. Run `pip install 'pcscale[eval]'`."
    )


@pytest.mark.parametrize(("flag", "value"), [("--limit", "0"), ("--num-fewshot", "-1"), ("--batch-size", "0")])
def test_a_number_out_of_range_is_refused(flag: str, value: str, world: World, tmp_path: Path) -> None:
    said = refusal("evaluate", world.base, "--tasks", write_task(tmp_path), flag, value)
    assert said.startswith(f"Invalid value for '{flag}': ")


@needs_harness
def test_broken_tasks_are_refused_before_any_model_is_loaded(world: World, tmp_path: Path) -> None:
    base = Path(shutil.copytree(world.base, tmp_path / "base"))
    (base / "model.safetensors").unlink()
    path = write_task(tmp_path, test_split="tset")
    text = ["--data", world.text, "--sequence-length", "24"]
    assert refusal("evaluate", base, *text, "--tasks", path).startswith(f"The task {path} cannot be read (KeyError: ")
