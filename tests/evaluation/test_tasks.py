"""Downstream tasks on stock models, run by the harness: against plain logits, and what is refused."""

import math
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pcscale.common.console import console
from pcscale.common.errors import RequestError, RunError
from pcscale.evaluation.tasks import TASK_SETS, DownstreamTasks, TaskRequest, main_metric, mean_accuracy, task_names
from tests.evaluation.task_files import LAST_WORD, WRITTEN, documents, know_only, write_task
from tests.tiny import build_base

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

PERPLEXITY_TOLERANCE = 1e-4  # relative; batches are padded, the reference takes one answer at a time


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("model"), tokenizer=True)


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with all tasks that the harness knows."""
    (tmp_path / "tasks").mkdir()
    know_only(tmp_path / "tasks", monkeypatch)
    return tmp_path / "tasks"


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All prompts that the harness asks, as it asks them."""
    from lm_eval.models.huggingface import HFLM

    original: Any = HFLM.loglikelihood
    seen: list[str] = []

    def recorded(adapter: Any, requests: list[Any], disable_tqdm: bool = False) -> Any:
        seen.extend(request.args[0] for request in requests)
        return original(adapter, requests, disable_tqdm=disable_tqdm)

    monkeypatch.setattr(HFLM, "loglikelihood", recorded)
    return seen


def _run(model: Any, tokenizer: Any, name: str, **settings: Any) -> dict[str, Any]:
    return DownstreamTasks(TaskRequest((name,), **settings)).run(model, tokenizer, "test")


@torch.no_grad()
def _expected(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, bool]:
    """The log-likelihood of an answer after a prompt, and whether it is the likeliest one, from one plain forward."""
    ids_T = tokenizer(prompt + answer, return_tensors="pt").input_ids[0]
    start = len(tokenizer(prompt).input_ids)
    logits_TV = model.eval()(ids_T[None]).logits[0, start - 1 : -1]
    logs_TV, answer_T = logits_TV.double().log_softmax(-1), ids_T[start:]
    return logs_TV.gather(1, answer_T[:, None]).sum().item(), bool((logits_TV.argmax(-1) == answer_T).all())


def _standard_error(hits: list[float]) -> float:
    return statistics.stdev(hits) / math.sqrt(len(hits))


def test_names_are_taken_in_their_order_each_once_by_commas_or_repeated() -> None:
    assert task_names(["b,a", " c ,", "a"]) == ("b", "a", "c")


def test_the_set_of_the_paper_stands_for_its_nine_tasks() -> None:
    assert len(TASK_SETS["paper"]) == 9
    assert task_names(["piqa,paper"]) == ("piqa", *(name for name in TASK_SETS["paper"] if name != "piqa"))


@pytest.mark.parametrize("names", ["", ",", " , "])
def test_no_name_at_all_is_refused(names: str) -> None:
    with pytest.raises(RequestError, match=r"^--tasks names no task\. Write for instance --tasks arc_easy,piqa or"):
        TaskRequest(task_names([names]))


@pytest.mark.parametrize(("name", "value", "least"), [("num_fewshot", -1, 0), ("limit", 0, 1), ("batch_size", 0, 1)])
def test_a_number_out_of_range_is_refused(name: str, value: int, least: int) -> None:
    with pytest.raises(RequestError, match=f"^{name} is {value}, expected at least {least}.$"):
        TaskRequest(("piqa",), **{name: value})


def test_the_mean_takes_the_normalised_accuracy_where_there_is_one() -> None:
    results = {
        "a": {"acc": 0.2, "acc_norm": 0.4, "samples": 5},
        "b": {"perplexity": 9.0, "acc": 0.6, "samples": 5},
        "c": {"exact_match": 0.9, "samples": 5},
    }
    assert [main_metric(result) for result in results.values()] == ["acc_norm", "acc", None]
    assert mean_accuracy(results) == pytest.approx(0.5)


def test_without_an_accuracy_there_is_no_mean() -> None:
    assert mean_accuracy({"c": {"exact_match": 0.9, "samples": 5}}) is None


def test_multiple_choice_agrees_with_plain_logits(tasks: Path, model: Any, tokenizer: Any) -> None:
    found = _run(model, tokenizer, write_task(tasks, count=40))
    hits, normalised = [], []
    for row in documents(40):
        values = [_expected(model, tokenizer, row["question"], f" {answer}")[0] for answer in row["answers"]]
        per_character = [value / len(answer) for value, answer in zip(values, row["answers"], strict=True)]
        hits.append(float(values.index(max(values)) == row["right"]))
        normalised.append(float(per_character.index(max(per_character)) == row["right"]))
    assert hits != normalised
    assert 0 < sum(hits) < 40
    assert found["tasks"] == {
        "mine": {
            "acc": pytest.approx(statistics.mean(hits)),
            "acc_stderr": pytest.approx(_standard_error(hits)),
            "acc_norm": pytest.approx(statistics.mean(normalised)),
            "acc_norm_stderr": pytest.approx(_standard_error(normalised)),
            "samples": 40,
        }
    }
    assert found["mean_accuracy"] == found["tasks"]["mine"]["acc_norm"]


def test_a_last_word_is_scored_like_plain_logits_do(tasks: Path, model: Any, tokenizer: Any) -> None:
    result = _run(model, tokenizer, write_task(tasks, **LAST_WORD))["tasks"]["mine"]
    words = [row["question"].split(" ") for row in documents(12)]
    answers = [_expected(model, tokenizer, " ".join(words_of[:-1]), f" {words_of[-1]}") for words_of in words]
    values, greedy = zip(*answers, strict=True)
    assert result["perplexity"] == pytest.approx(math.exp(-statistics.mean(values)), rel=PERPLEXITY_TOLERANCE)
    assert result["perplexity_stderr"] > 0
    assert result["acc"] == statistics.mean(greedy)


def test_answers_are_those_that_the_stock_model_writes(tasks: Path, model: Any, tokenizer: Any) -> None:
    row = documents(1)[0]
    asked = tokenizer(row["question"], return_tensors="pt")
    written = model.generate(**asked, max_new_tokens=6, do_sample=False)
    text = tokenizer.decode(written[0, asked.input_ids.shape[1] :])
    answer = text.split("\n")[0].split(tokenizer.eos_token)[0]
    name = write_task(tasks, count=1, **{**WRITTEN, "doc_to_target": f"{{{{{answer!r}}}}}"})
    assert _run(model, tokenizer, name) == {
        "tasks": {"mine": {"exact_match": 1.0, "samples": 1}},
        "mean_accuracy": None,
    }


def test_a_limit_takes_the_first_documents(tasks: Path, model: Any, tokenizer: Any, prompts: list[str]) -> None:
    result = _run(model, tokenizer, write_task(tasks), limit=1)["tasks"]["mine"]
    assert set(prompts) == {documents(1)[0]["question"]}
    assert set(result) == {"acc", "acc_norm", "samples"}  # One sample has no standard error.
    assert result["samples"] == 1


@pytest.mark.parametrize(("own", "asked", "shots"), [(None, None, 0), (None, 2, 2), (1, None, 1), (1, 3, 3), (0, 2, 0)])
def test_the_examples_of_a_prompt_are_those_asked_for_else_the_tasks_own(
    own: int | None, asked: int | None, shots: int, tasks: Path, model: Any, tokenizer: Any, prompts: list[str]
) -> None:
    name = write_task(tasks, num_fewshot=own, fewshot_split="test", fewshot_delimiter=" ### ")
    _run(model, tokenizer, name, num_fewshot=asked, limit=2)
    assert {prompt.count(" ### ") for prompt in prompts} == {shots}


def test_a_group_stands_for_its_tasks(tasks: Path, model: Any, tokenizer: Any) -> None:
    names = [write_task(tasks, name) for name in ("first", "second")]
    (tasks / "both.yaml").write_text(f"group: both\ntask: [{', '.join(names)}]\n")
    assert list(_run(model, tokenizer, "both", limit=2)["tasks"]) == names


def test_every_model_is_asked_the_same_every_time(tasks: Path, model: Any, tokenizer: Any, prompts: list[str]) -> None:
    drawn = "{{question.split(' ')|random}}"
    name = write_task(tasks, doc_to_text=drawn, fewshot_split="test", num_fewshot=2)
    found = DownstreamTasks(TaskRequest((name,)))
    results, asked = [], []
    for _ in range(2):
        random.seed()
        np.random.seed()
        torch.seed()
        prompts.clear()
        results.append(found.run(model, tokenizer, "test"))
        asked.append(list(prompts))
    assert results[0] == results[1]
    assert asked[0] == asked[1] != []


def test_a_model_whose_outputs_are_not_finite_is_refused(tasks: Path, model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(RequestError, match="a log-likelihood is nan: the model's outputs are not finite"):
        _run(model, tokenizer, write_task(tasks))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"test_split": "tset"}, "KeyError: 'tset'"),
        ({"dataset_kwargs": {"data_files": {"test": "/nowhere/none.jsonl"}}}, "FileNotFoundError: "),
        ({"num_fewshot": 50, "fewshot_split": "test"}, "ValueError: Sample larger than population"),
        ({"unsafe_code": True}, "ValueError: Attempted to run task: mine which is marked as unsafe"),
    ],
)
def test_a_failure_of_the_harness_is_one_line(
    changes: dict[str, Any], reason: str, tasks: Path, model: Any, tokenizer: Any
) -> None:
    with pytest.raises(RunError) as caught:
        _run(model, tokenizer, write_task(tasks, **changes))
    assert str(caught.value).startswith(f"lm_eval failed on mine ({reason}")
    assert "\n" not in str(caught.value)


def test_a_warning_of_the_harness_appears_once_and_nothing_else_of_it(
    tasks: Path, model: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tasks)  # No git repository, of which git would tell.
    console.configure(quiet=True)
    _run(model, tokenizer, write_task(tasks, doc_to_target="nobody"))
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.startswith("warning: lm_eval: Label index was not in within range")
    assert errors.count("\n") == 1


def test_an_unknown_task_is_refused_with_the_nearest_known_one(tasks: Path) -> None:
    write_task(tasks, "rivers")
    with pytest.raises(RequestError, match=r"^river is no task of lm_eval. Did you mean 'rivers'\?$"):
        DownstreamTasks(TaskRequest(("rivers", "river")))


@pytest.mark.slow  # The harness reads thousands of files to know its own tasks.
def test_the_harness_knows_the_tasks_of_the_paper() -> None:
    DownstreamTasks(TaskRequest(TASK_SETS["paper"]))
