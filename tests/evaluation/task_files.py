"""Small tasks in the harness's own form, with their data beside them."""

import functools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

_WORDS = ("fox", "dog", "river", "valley", "sea", "shells", "shore", "lazy", "brown", "jumps", "runs", "sells", "over")


def know_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the harness know the tasks in `folder` instead of its own, and keep its data there."""
    from lm_eval.tasks import TaskManager

    own = functools.partial(TaskManager, include_path=folder, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", own)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
    monkeypatch.setattr(
        "lm_eval.evaluator.add_env_info", lambda results: None
    )  # It asks a dozen programs, for seconds.


def documents(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions with three answers of different lengths, one of them called right."""
    chance = random.Random(seed)
    return [
        {
            "question": " ".join(chance.choices(_WORDS, k=chance.randint(3, 8))),
            "answers": [" ".join(chance.sample(_WORDS, k=length)) for length in chance.sample((1, 2, 4), k=3)],
            "right": chance.randrange(3),
        }
        for _ in range(count)
    ]


def write_task(folder: Path, name: str = "mine", count: int = 12, **changes: Any) -> str:
    """Write a multiple-choice task and its data; returns its name.

    Args:
        changes: keys of the file that differ; None leaves one out.
    """
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in documents(count)))
    values = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "right",
        "doc_to_choice": "answers",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
    } | changes
    known = {key: value for key, value in values.items() if value is not None}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(known))
    return name


LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{question.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' ' + question.split(' ')[-1]}}",
    "doc_to_choice": None,
    "target_delimiter": "",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
"""Changes that make it a task like lambada."""

WRITTEN = {
    "output_type": "generate_until",
    "doc_to_target": "{{answers[right]}}",
    "doc_to_choice": None,
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
}
"""Changes that make it a task whose answers the model writes."""
