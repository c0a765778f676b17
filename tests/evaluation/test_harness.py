"""Tasks on stock models, run by the harness: against log-likelihoods from plain logits, and what is refused."""

import math
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pcscale.common.console import console
from pcscale.common.errors import RequestError, RunError
from pcscale.evaluation.tasks import TASK_SETS, TaskRequest, task_specs
from tests.evaluation.task_files import LAST_WORD, WRITTEN, documents, write_task
from tests.tiny import build_base

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
from pcscale.evaluation.harness import load_tasks, run_tasks

if TYPE_CHECKING:
    from lm_eval.api.task import Task

LOG_LIKELIHOOD_TOLERANCE = 1e-4  # nats of an answer; batches are padded, the reference takes one answer at a time


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("model"), tokenizer=True)


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def _request(*names: Path | str, num_fewshot: int | None = None, limit: int | None = None) -> TaskRequest:
    return TaskRequest(task_specs(str(name) for name in names), num_fewshot, limit, batch_size=4)


def _refused(*names: Path | str) -> str:
    with pytest.raises(RequestError) as caught:
        load_tasks(_request(*names))
    return str(caught.value)


def _prompts(tasks: "dict[str, Task]", name: str = "mine") -> list[Any]:
    return [instance.args for instance in tasks[name].instances]


def _log_likelihoods(tasks: "dict[str, Task]", name: str = "mine") -> list[float]:
    return [instance.resps[0][0] for instance in tasks[name].instances]


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


def test_multiple_choice_agrees_with_plain_logits(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    request = _request(write_task(tmp_path, count=40))
    tasks = load_tasks(request)
    found = run_tasks(tasks, request, model, tokenizer, "test")
    rows = documents(40)
    expected = [
        [_expected(model, tokenizer, row["question"], f" {answer}")[0] for answer in row["answers"]] for row in rows
    ]
    flat = [value for values in expected for value in values]
    assert _log_likelihoods(tasks) == pytest.approx(flat, abs=LOG_LIKELIHOOD_TOLERANCE)
    hits, normalised = [], []
    for row, values in zip(rows, expected, strict=True):
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


def test_a_last_word_is_scored_like_plain_logits_do(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    request = _request(write_task(tmp_path, **LAST_WORD))
    tasks = load_tasks(request)
    result = run_tasks(tasks, request, model, tokenizer, "test")["tasks"]["mine"]
    words = [row["question"].split(" ") for row in documents(12)]
    answers = [_expected(model, tokenizer, " ".join(words_of[:-1]), f" {words_of[-1]}") for words_of in words]
    values, greedy = zip(*answers, strict=True)
    assert _log_likelihoods(tasks) == pytest.approx(values, abs=LOG_LIKELIHOOD_TOLERANCE)
    assert result["perplexity"] == pytest.approx(math.exp(-statistics.mean(values)), rel=LOG_LIKELIHOOD_TOLERANCE)
    assert result["perplexity_stderr"] > 0
    assert result["acc"] == statistics.mean(greedy)


@pytest.mark.parametrize(
    ("length", "settings"),
    [
        ("max_gen_toks", {"do_sample": False}),
        ("max_new_tokens", {"num_beams": 2, "repetition_penalty": 1.5}),
        ("max_tokens", {}),
        ("max_completion_tokens", {}),
    ],
)
def test_answers_are_those_that_the_stock_model_writes(
    length: str, settings: dict[str, Any], tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    path = write_task(tmp_path, **{**WRITTEN, "generation_kwargs": {"until": ["\n"], length: 6, **settings}})
    request = replace(_request(path, limit=5), batch_size=1)
    tasks = load_tasks(request)
    assert run_tasks(tasks, request, model, tokenizer, "test")["tasks"]["mine"]["samples"] == 5
    for row, instance in zip(documents(5), tasks["mine"].instances, strict=True):
        asked = tokenizer(row["question"], return_tensors="pt")
        written = model.generate(**asked, max_new_tokens=6, **{"do_sample": False, **settings})
        text = tokenizer.decode(written[0, asked.input_ids.shape[1] :])
        assert instance.resps == [text.split("\n")[0].split(tokenizer.eos_token)[0]]


def test_a_limit_takes_the_first_documents(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    request = _request(write_task(tmp_path), limit=1)
    tasks = load_tasks(request)
    result = run_tasks(tasks, request, model, tokenizer, "test")["tasks"]["mine"]
    assert {prompt for prompt, _ in _prompts(tasks)} == {documents(1)[0]["question"]}
    assert set(result) == {"acc", "acc_norm", "samples"}  # One sample has no standard error.
    assert result["samples"] == 1


@pytest.mark.parametrize(("own", "asked", "shots"), [(None, None, 0), (None, 2, 2), (1, None, 1), (1, 3, 3), (0, 2, 0)])
def test_the_examples_of_a_prompt_are_those_asked_for_else_the_tasks_own(
    own: int | None, asked: int | None, shots: int, tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    path = write_task(tmp_path, num_fewshot=own, fewshot_split="test", fewshot_delimiter=" ### ")
    request = _request(path, num_fewshot=asked, limit=2)
    tasks = load_tasks(request)
    run_tasks(tasks, request, model, tokenizer, "test")
    assert {prompt.count(" ### ") for prompt, _ in _prompts(tasks)} == {shots}


def test_a_second_model_is_asked_the_same(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    request = _request(write_task(tmp_path, fewshot_split="test"), num_fewshot=2)
    tasks = load_tasks(request)
    first = run_tasks(tasks, request, model, tokenizer, "test")
    asked, said = _prompts(tasks), _log_likelihoods(tasks)
    assert run_tasks(tasks, request, model, tokenizer, "test") == first
    assert (_prompts(tasks), _log_likelihoods(tasks)) == (asked, said)


def _scramble() -> None:
    """As what ran before may have left the generators."""
    random.seed()
    np.random.seed()
    torch.seed()


def test_what_a_template_draws_is_the_same_for_every_model_and_every_time(
    tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    request = _request(write_task(tmp_path, doc_to_text="{{question.split(' ')|random}}"))
    drawn = []
    for _ in range(2):
        _scramble()
        tasks = load_tasks(request)
        for _ in range(2):
            _scramble()
            run_tasks(tasks, request, model, tokenizer, "test")
            drawn.append(_prompts(tasks))
    assert drawn == [drawn[0]] * 4


def test_sampled_answers_are_the_same_every_time(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    sampled = {"do_sample": True, "temperature": 2.0, "top_p": 0.9, "top_k": 50, **WRITTEN["generation_kwargs"]}
    request = _request(write_task(tmp_path, **{**WRITTEN, "generation_kwargs": sampled}))
    tasks, answers = load_tasks(request), []
    for _ in range(2):
        _scramble()
        run_tasks(tasks, request, model, tokenizer, "test")
        answers.append([instance.resps for instance in tasks["mine"].instances])
    assert answers[0] == answers[1]


def test_what_is_drawn_while_data_is_read_is_the_harness_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    read, drawn = datasets.load_dataset, []

    def shuffled(**arguments: Any) -> Any:
        drawn.append((random.random(), np.random.random(), torch.rand(()).item()))
        return read(**arguments)

    monkeypatch.setattr("datasets.load_dataset", shuffled)
    _scramble()
    load_tasks(_request(write_task(tmp_path)))
    # simple_evaluate's own seeds.
    generators = random.Random(0), np.random.RandomState(1234), torch.Generator().manual_seed(1234)
    expected = generators[0].random(), generators[1].random(), torch.rand((), generator=generators[2]).item()
    assert drawn == [expected]


def test_a_model_whose_outputs_are_not_finite_is_refused(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    request = _request(write_task(tmp_path))
    with pytest.raises(RequestError, match="a log-likelihood is nan: the model's outputs are not finite"):
        run_tasks(load_tasks(request), request, model, tokenizer, "test")


def test_what_the_harness_fails_on_is_said_in_a_line(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    request = _request(write_task(tmp_path), num_fewshot=50)
    with pytest.raises(RunError, match="lm_eval failed on mine: ValueError: Sample larger than population"):
        run_tasks(load_tasks(request), request, model, tokenizer, "test")


def test_warnings_of_the_harness_are_counted_and_nothing_else_of_it_is_seen(
    tmp_path: Path, model: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    console.configure(quiet=True)
    request = _request(write_task(tmp_path, doc_to_target="nobody"))
    run_tasks(load_tasks(request), request, model, tokenizer, "test")
    said, errors = capfd.readouterr()
    assert said == ""
    assert errors.startswith("warning: test: lm_eval warned 12 times, first: Label index was not in within range")
    assert errors.count("\n") == 1


def test_a_template_that_reaches_for_python_is_refused_and_never_run(tmp_path: Path) -> None:
    attack = f"{{{{cycler.__init__.__globals__.os.mkdir({str(tmp_path / 'ran')!r})}}}}"
    said = _refused(write_task(tmp_path, doc_to_text=attack))
    assert said.startswith(f"The task {tmp_path / 'mine.yaml'} cannot be read (SecurityError: ")
    assert not (tmp_path / "ran").exists()


def test_code_that_transformers_would_write_answers_with_is_refused_and_never_run(
    tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    code = tmp_path / "code" / "custom_generate" / "generate.py"
    code.parent.mkdir(parents=True)
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef generate(model, input_ids, **_): return input_ids\n")
    attack = {"max_gen_toks": 6, "custom_generate": str(tmp_path / "code"), "trust_remote_code": True}
    path = write_task(tmp_path, **{**WRITTEN, "generation_kwargs": attack})
    with pytest.raises(RequestError, match=r"generation_kwargs has \['custom_generate', 'trust_remote_code'\]"):
        run_tasks(load_tasks(_request(path)), _request(path), model, tokenizer, "test")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "metric", ["owner/metric", {"metric": "owner/metric"}, {"metric": "acc", "hf_evaluate": True}, {}]
)
def test_a_metric_that_would_be_fetched_as_code_is_refused(metric: Any, tmp_path: Path) -> None:
    path = write_task(tmp_path, metric_list=[metric])
    name = metric.get("metric") if isinstance(metric, dict) else metric
    assert _refused(path).startswith(f"{path}: {name!r} is no metric of lm_eval. Known are ")


def test_an_aggregation_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    path = write_task(tmp_path, metric_list=[{"metric": "acc", "aggregation": "sum", "higher_is_better": True}])
    assert _refused(path) == "mine: the aggregation of acc is none of lm_eval. Write mean."


def test_a_task_that_runs_what_the_model_writes_is_refused(tmp_path: Path) -> None:
    said = _refused(write_task(tmp_path, unsafe_code=True))
    assert said == "mine runs code that the model writes. Use lm_eval itself for it."


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    first, second = write_task(tmp_path / "a"), write_task(tmp_path / "b")
    assert _refused(first, second) == f"{second}: another task is named 'mine' too. Rename one of them."


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"boqqus": 1}, "TypeError: "),
        ({"test_split": "tset"}, "KeyError: 'tset'"),
        ({"output_type": "nope"}, "ValueError: Got invalid output_type 'nope'"),
        ({"dataset_kwargs": {"data_files": {"test": "/nowhere/none.jsonl"}}}, "FileNotFoundError: "),
        ({"doc_to_text": "{{nobody}}"}, "UndefinedError: 'nobody' is undefined"),
    ],
)
def test_a_task_that_cannot_be_read_is_said_in_a_line(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = write_task(tmp_path, **changes)
    said = _refused(path)
    assert said.startswith(f"The task {path} cannot be read ({reason}")
    assert said.endswith("). Check the network, or the task's file and its data.")


def test_data_that_cannot_be_fetched_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(**arguments: Any) -> None:
        raise ConnectionError(f"Couldn't reach '{arguments['path']}' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    path = write_task(tmp_path, dataset_path="owner/data", dataset_kwargs=None)
    assert _refused(path) == (
        f"The task {path} cannot be read (ConnectionError: Couldn't reach 'owner/data' on the Hub). "
        "Check the network, or the task's file and its data."
    )


@pytest.mark.slow  # The harness reads thousands of files to know its own tasks.
def test_the_harness_knows_the_tasks_of_the_paper_and_the_nearest_of_another_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr("pcscale.evaluation.harness._load", lambda name, *_: loaded.append(name) or [])
    assert _refused("paper", "arc_esay") == (
        "arc_esay is no task of lm_eval. Did you mean 'arc_easy'? A file ends in .yaml, a folder has a slash."
    )
    assert tuple(loaded) == TASK_SETS["paper"]
