"""EleutherAI's lm-evaluation-harness around a stock model, with our console. Needs the extra `eval`."""

import difflib
import logging
import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.api.metrics  # It registers them.
import lm_eval.utils
import numpy as np
import torch
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import metric_registry
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from pcscale.common.console import Tracker, console
from pcscale.common.errors import PcscaleError, RequestError, RunError
from pcscale.data.text import silence_datasets
from pcscale.evaluation.tasks import TaskRequest, mean_accuracy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BOOTSTRAPS = 1000
"""Resamples behind the standard error of a metric that has no formula for it, such as perplexity."""

_LOGGERS = ("lm_eval", "transformers", "datasets", "huggingface_hub")
"""Those that write to standard error by handlers of their own, and the harness's."""


def load_tasks(request: TaskRequest) -> dict[str, Task]:
    """The tasks with their data, read from their files or fetched from the Hub into its own cache.

    A group or a tag of the harness stands for its tasks.

    Raises:
        RequestError: the harness has no such task, two have one name, its data cannot be read or it would run code.
    """
    console.say(f"reading {', '.join(request.specs)}")
    _seed()
    silence_datasets()
    _render_in_a_sandbox()
    with _silenced():
        # Its own tasks are thousands of files, read in some ten seconds: only where one of them is named.
        manager = TaskManager(include_defaults=any(isinstance(spec, str) for spec in request.specs.values()))
        tasks: dict[str, Task] = {}
        sources: dict[str, str] = {}
        for name, spec in request.specs.items():
            if isinstance(spec, str):
                _check_name(spec, manager)
            else:
                _check_metrics(spec, name)
            for task in _load(name, spec, manager):
                _prepare(task, request.num_fewshot)
                source = _source(task) if isinstance(spec, str) else name
                if sources.setdefault(task.task_name, source) != source:
                    raise RequestError(f"{name}: another task is named '{task.task_name}' too. Rename one of them.")
                tasks[task.task_name] = task
    return tasks


def run_tasks(
    tasks: dict[str, Task],
    request: TaskRequest,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    label: str,
) -> dict[str, Any]:
    """The results of a stock model that is in memory.

    Returns:
        `tasks`: by name the metrics, their standard errors as `<metric>_stderr` where there is one, and `samples`;
        and `mean_accuracy`, None where no task has an accuracy.

    Raises:
        RequestError: the model's outputs are not finite.
        RunError: the harness failed.
    """
    _seed()
    os.environ["DISABLE_MULTIPROC"] = "1"  # It would fork a process that has threads, to bootstrap for a second.
    for task in tasks.values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # The same examples for every model.
    try:
        with _silenced():
            adapter = _Adapter(model, tokenizer, request.batch_size, label)
        with _silenced() as warnings:
            found: Any = evaluate(
                lm=adapter,
                task_dict={"tasks": tasks},
                limit=request.limit,
                bootstrap_iters=_BOOTSTRAPS,
                log_samples=False,
            )
    except PcscaleError:
        raise
    except Exception as error:
        raise RunError(f"lm_eval failed on {', '.join(tasks)}: {_reason(error)}.") from error
    if warnings.count:  # Of prompts that were cut, or answers that are none of the choices.
        console.warn(f"{label}: lm_eval warned {warnings.count} times, first: {warnings.first}")
    results = {name: _figures(found["results"][name], found["n-samples"][name]["effective"]) for name in tasks}
    return {"tasks": results, "mean_accuracy": mean_accuracy(results)}


class _Adapter(HFLM):
    """The harness's own adapter; its progress is shown as ours."""

    def __init__(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int, label: str
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)  # pyright: ignore[reportCallIssue]
        self._label = label

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._answer(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._answer(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._answer(super().generate_until, requests)

    def _answer(self, method: Callable[[list[Any]], list[Any]], requests: list[Any]) -> list[Any]:
        # Muted once more inside: a bar on a terminal takes the standard streams.
        with console.progress(self._label, len(requests), "requests") as progress, _muted():
            self.set_cache_hook(_Watch(progress))
            return method(requests)


class _Watch(CacheHook):
    """Is told of every answer as it comes."""

    def __init__(self, progress: Tracker) -> None:
        super().__init__(None)
        self._progress = progress

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        value = res[0] if isinstance(res, tuple) else res
        if isinstance(value, float) and math.isnan(value):
            raise RequestError("a log-likelihood is nan: the model's outputs are not finite. Check its weights.")
        self._progress.advance(1)


def _check_name(name: str, manager: TaskManager) -> None:
    if name not in manager.task_index:
        nearest = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.0)[0]
        raise RequestError(
            f"{name} is no task of lm_eval. Did you mean '{nearest}'? A file ends in .yaml, a folder has a slash."
        )


def _check_metrics(values: dict[str, Any], path: str) -> None:
    """The harness fetches a metric that it does not have as code."""
    metrics = values.get("metric_list") or []
    for metric in metrics if isinstance(metrics, list) else [metrics]:
        name = metric.get("metric") if isinstance(metric, dict) else metric
        if not isinstance(metric, dict) or str(name) not in metric_registry or metric.get("hf_evaluate"):
            raise RequestError(f"{path}: {name!r} is no metric of lm_eval. Known are {', '.join(metric_registry)}.")


def _load(name: str, spec: str | dict[str, Any], manager: TaskManager) -> list[Task]:
    try:
        return list(manager.load([spec])["tasks"].values())
    except StopIteration:
        raise RequestError(f"The task {name} has a data file without a line. Give it documents.") from None
    except Exception as error:  # datasets, the Hub's client and the harness raise many types.
        raise RequestError(
            f"The task {name} cannot be read ({_reason(error)}). Check the network, or the task's file and its data."
        ) from error


def _prepare(task: Task, num_fewshot: int | None) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise RequestError(f"{task.task_name} runs code that the model writes. Use lm_eval itself for it.")
    if unknown := [metric for metric, aggregation in (task.aggregation() or {}).items() if not callable(aggregation)]:
        raise RequestError(f"{task.task_name}: the aggregation of {unknown[0]} is none of lm_eval. Write mean.")
    own = task.get_config("num_fewshot")
    # A task that says 0 cannot do with more: the harness's own rule.
    task.set_config("num_fewshot", own or 0 if num_fewshot is None or own == 0 else num_fewshot)


def _source(task: Task) -> str:
    """The file that defines a task of the harness."""
    return str((task.get_config("metadata") or {}).get("config_source"))


def _figures(result: dict[str, Any], samples: int) -> dict[str, Any]:
    """Numbers alone; `acc,none` is `acc`, and a filter that has a name stays: `exact_match,strict-match`."""
    numbers = {
        key.removesuffix(",none"): float(value)
        for key, value in result.items()
        if "," in key and isinstance(value, int | float) and math.isfinite(value)
    }
    return {**numbers, "samples": samples}


def _seed() -> None:
    """What tasks draw, in choosing documents or in sampled answers, is the same each time, and the harness's own."""
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # The generator that tasks use.
    torch.manual_seed(DEFAULT_OTHER_SEED)


def _render_in_a_sandbox() -> None:
    """Templates come with task files; outside of a sandbox they can reach all of Python."""
    plain = lm_eval.utils.env
    if not isinstance(plain, SandboxedEnvironment):
        sandbox = SandboxedEnvironment(undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline)
        sandbox.filters.update(plain.filters)
        lm_eval.utils.env = sandbox


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class _Warnings(logging.Handler):
    """How many there were, and the first."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0
        self.first = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        self.first = self.first or " ".join(record.getMessage().split())[:200]


@contextmanager
def _muted() -> Iterator[None]:
    """What prints or draws bars is not seen; the console keeps the stream that it has."""
    with Path(os.devnull).open("w") as sink, redirect_stdout(sink), redirect_stderr(sink):
        yield


@contextmanager
def _silenced() -> Iterator[_Warnings]:
    """Nothing of the harness and what it calls is seen; its own warnings are kept."""
    warnings = _Warnings()
    loggers = {name: logging.getLogger(name) for name in _LOGGERS}
    before = {name: (logger.handlers, logger.propagate) for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.handlers, logger.propagate = [logging.NullHandler()], False
    loggers["lm_eval"].handlers = [warnings]
    try:
        with _muted():
            yield warnings
    finally:
        for name, logger in loggers.items():
            logger.handlers, logger.propagate = before[name]
