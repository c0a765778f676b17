"""Downstream tasks: which ones `--tasks` asks for, and task files of one's own, read as data. Needs no lm_eval."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pcscale.common.errors import RequestError

TASK_SETS = {
    "paper": (
        *("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande"),
        *("openbookqa", "sciq", "social_iqa", "lambada_openai"),
    ),
}
"""Names that stand for several tasks of the harness. `paper`: those of Stefaniak et al., 2025."""

MAIN_METRICS = ("acc_norm", "acc")
"""What a task adds to the mean: the first of these that it has."""

_DATA_FORMATS = ("json", "csv", "parquet", "text")
_GENERATION_KEYS = (
    *("until", "do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty"),
    *("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"),
)
"""What a task file may say of how answers are written. All goes to `generate` of transformers, which runs code that
some other keys name."""

TaskSpec = str | dict[str, Any]
"""A name that the harness knows, or the content of a task file."""


@dataclass(frozen=True)
class TaskRequest:
    """What is asked of every model.

    Attributes:
        specs: by name or, of a task file, by path.
        num_fewshot: solved examples in a prompt; None: the task's own number, which is 0 where it has none.
        limit: at most so many documents of a task, the first ones; None: all.
        batch_size: prompts at a time.
    """

    specs: dict[str, TaskSpec]
    num_fewshot: int | None
    limit: int | None
    batch_size: int


def task_specs(names: Iterable[str]) -> dict[str, TaskSpec]:
    """What the values of `--tasks` stand for, in their order, each once.

    Args:
        names: one or several with commas between: a key of `TASK_SETS`, a `.yaml` file, a folder of them (written
            with a slash, as `./tasks`), or what the harness knows: a task, a group or a tag.

    Raises:
        RequestError: nothing is named, or a file is missing, broken or not data alone.
    """
    specs: dict[str, TaskSpec] = {}
    for name in (part.strip() for value in names for part in value.split(",")):
        path = Path(name).expanduser()
        if name in TASK_SETS:
            specs |= {task: task for task in TASK_SETS[name]}
        elif path.suffix == ".yaml":
            specs[str(path)] = _read_task(path)
        elif "/" in name:
            specs |= _read_folder(path)
        elif name:
            specs[name] = name
    if not specs:
        raise RequestError("--tasks names no task. Write for instance --tasks arc_easy,piqa or --tasks paper.")
    return specs


def mean_accuracy(results: dict[str, dict[str, Any]]) -> float | None:
    """The mean over tasks of each one's main metric; None: no task has one."""
    scores = [task[metric] for task in results.values() if (metric := main_metric(task)) is not None]
    return sum(scores) / len(scores) if scores else None


def main_metric(result: dict[str, Any]) -> str | None:
    """The metric that stands for a task; None: it has no accuracy."""
    return next((metric for metric in MAIN_METRICS if result.get(metric) is not None), None)


def _read_folder(folder: Path) -> dict[str, TaskSpec]:
    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder. Name a task, a .yaml file or a folder of .yaml files.")
    # A file without `task` is what others include.
    found = {str(path): values for path in sorted(folder.glob("*.yaml")) if "task" in (values := _read_yaml(path, ()))}
    if not found:
        raise RequestError(f"{folder} holds no task: no .yaml file in it has the key `task`.")
    return {path: _check(values, path) for path, values in found.items()}


def _read_task(path: Path) -> dict[str, Any]:
    return _check(_read_yaml(path, ()), str(path))


def _check(values: dict[str, Any], path: str) -> dict[str, Any]:
    """The content of a task file that is one task, on data that is read and never run."""
    if not isinstance(values.get("task"), str):
        raise RequestError(f"{path} has no name in `task`. Name one task there; groups are for the harness's own.")
    source = values.get("dataset_path")
    if not isinstance(source, str) or (source not in _DATA_FORMATS and "/" not in source):
        raise RequestError(
            f"{path}: dataset_path is {source!r}, expected {', '.join(_DATA_FORMATS)} or a Hub data set (owner/name)."
        )
    generation = values.get("generation_kwargs") or {}
    unknown = [key for key in generation if key not in _GENERATION_KEYS] if isinstance(generation, dict) else generation
    if unknown:
        raise RequestError(
            f"{path}: generation_kwargs has {unknown!r}, expected a mapping with no other keys than "
            f"{', '.join(_GENERATION_KEYS)}. Leave it out, or run the task with lm_eval itself."
        )
    return values


class _DataLoader(yaml.SafeLoader):
    """The safe loader; what the harness would import and run is named as such."""


def _refuse_code(loader: _DataLoader, node: yaml.Node) -> None:
    raise RequestError(
        f"{node.start_mark.name}: line {node.start_mark.line + 1} has !function, which would run code. "
        "A task file is read as data: write a template, or run the task with lm_eval itself."
    )


_DataLoader.add_constructor("!function", _refuse_code)


def _read_yaml(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping in a file, on top of those that it includes, as the harness has it."""
    try:
        with path.open(encoding="utf-8") as stream:
            values = yaml.load(stream, Loader=_DataLoader)
    except RequestError:
        raise
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise RequestError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise RequestError(f"{path} holds no task. Write one `key: value` a line.")
    if path.resolve() in including:
        raise RequestError(f"{path} includes itself. Remove one `include`.")
    includes = values.pop("include", [])
    merged: dict[str, Any] = {}
    for name in includes if isinstance(includes, list) else [includes]:
        merged |= _read_yaml(path.parent / str(name), (*including, path.resolve()))
    return merged | values
