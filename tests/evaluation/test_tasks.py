"""What `--tasks` stands for, and task files that are refused because they are broken or more than data."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pcscale.common.errors import RequestError
from pcscale.evaluation.tasks import TASK_SETS, main_metric, mean_accuracy, task_specs
from tests.evaluation.task_files import write_task


def _refused(*names: str | Path) -> str:
    with pytest.raises(RequestError) as caught:
        task_specs([str(name) for name in names])
    return str(caught.value)


def test_names_are_taken_in_their_order_each_once_by_commas_or_repeated() -> None:
    assert list(task_specs(["b,a", " c ,", "a"])) == ["b", "a", "c"]


def test_the_set_of_the_paper_stands_for_its_nine_tasks() -> None:
    assert len(TASK_SETS["paper"]) == 9
    assert list(task_specs(["piqa,paper"])) == ["piqa", *(name for name in TASK_SETS["paper"] if name != "piqa")]


@pytest.mark.parametrize("names", ["", ",", " , "])
def test_no_name_at_all_is_refused(names: str) -> None:
    assert _refused(names) == "--tasks names no task. Write for instance --tasks arc_easy,piqa or --tasks paper."


def test_a_task_file_is_its_content(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    assert task_specs([str(path)]) == {str(path): yaml.safe_load(path.read_text())}


def test_a_folder_is_its_task_files_without_those_that_others_include(tmp_path: Path) -> None:
    first, second = (write_task(tmp_path, name) for name in ("b", "a"))
    (tmp_path / "_shared.yaml").write_text("num_fewshot: 2\n")
    assert list(task_specs([f"{tmp_path}/"])) == [str(second), str(first)]


def test_what_a_file_includes_lies_below_its_own_keys(tmp_path: Path) -> None:
    write_task(tmp_path, "below", doc_to_text="theirs", num_fewshot=3)
    (tmp_path / "above.yaml").write_text("include: below.yaml\ntask: above\ndoc_to_text: ours\n")
    (spec,) = task_specs([str(tmp_path / "above.yaml")]).values()
    assert isinstance(spec, dict)
    assert (spec["task"], spec["doc_to_text"], spec["num_fewshot"]) == ("above", "ours", 3)
    assert "include" not in spec


def test_a_file_that_includes_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("include: [b.yaml]\n")
    (tmp_path / "b.yaml").write_text("include: a.yaml\n")
    assert _refused(tmp_path / "a.yaml") == f"{tmp_path / 'a.yaml'} includes itself. Remove one `include`."


@pytest.mark.parametrize("name", ["task.yaml", "above.yaml"])
def test_a_function_in_a_task_file_or_in_what_it_includes_is_refused_and_never_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef run(document): return ''\n")
    (tmp_path / "task.yaml").write_text("task: mine\ndoc_to_text: !function code.run\n")
    (tmp_path / "above.yaml").write_text("include: task.yaml\ntask: above\n")
    assert _refused(tmp_path / name) == (
        f"{tmp_path / 'task.yaml'}: line 2 has !function, which would run code. "
        "A task file is read as data: write a template, or run the task with lm_eval itself."
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"a: [",
        b"\xff\xfe\xfa",
        b"a: 2020-99-99",
        b"a: !!python/object/apply:os.system [ls]",
        pytest.param(b"[" * 9000, id="nested"),
    ],
)
def test_a_file_that_is_no_yaml_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_bytes(content)
    assert _refused(path).startswith(f"{path} cannot be read as YAML: ")


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    said = _refused(tmp_path / "none.yaml")
    assert said.startswith(f"{tmp_path / 'none.yaml'} cannot be read as YAML: ")
    assert "No such file" in said


@pytest.mark.parametrize("content", ["- a\n", "", "word"])
def test_a_file_without_keys_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(content)
    assert _refused(tmp_path / "task.yaml") == f"{tmp_path / 'task.yaml'} holds no task. Write one `key: value` a line."


@pytest.mark.parametrize("task", [None, 3, ["a", "b"]])
def test_a_file_that_is_not_one_task_is_refused(task: Any, tmp_path: Path) -> None:
    path = write_task(tmp_path, task=task)
    assert _refused(path) == f"{path} has no name in `task`. Name one task there; groups are for the harness's own."


@pytest.mark.parametrize("source", [None, "pandas", 3])
def test_data_that_is_not_read_as_data_is_refused(source: Any, tmp_path: Path) -> None:
    path = write_task(tmp_path, dataset_path=source)
    assert _refused(path) == (
        f"{path}: dataset_path is {source!r}, expected json, csv, parquet, text or a Hub data set (owner/name)."
    )


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"until": ["."], "custom_generate": "owner/code"}, "['custom_generate']"),
        ({"trust_remote_code": True, "top_k": 5, None: 1}, "['trust_remote_code', None]"),
        (["until"], "['until']"),
        ("until", "'until'"),
        (3, "3"),
    ],
)
def test_what_transformers_would_be_told_beyond_how_to_write_is_refused(found: Any, named: str, tmp_path: Path) -> None:
    path = write_task(tmp_path, generation_kwargs=found)
    assert _refused(path) == (
        f"{path}: generation_kwargs has {named}, expected a mapping with no other keys than until, do_sample, "
        "temperature, top_p, top_k, num_beams, repetition_penalty, max_gen_toks, max_new_tokens, max_tokens, "
        "max_completion_tokens. Leave it out, or run the task with lm_eval itself."
    )


def test_a_folder_that_is_missing_is_refused(tmp_path: Path) -> None:
    said = _refused(tmp_path / "none")
    assert said == f"{tmp_path / 'none'} is no folder. Name a task, a .yaml file or a folder of .yaml files."


def test_a_folder_without_tasks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shared.yaml").write_text("num_fewshot: 2\n")
    assert _refused(tmp_path) == f"{tmp_path} holds no task: no .yaml file in it has the key `task`."


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
