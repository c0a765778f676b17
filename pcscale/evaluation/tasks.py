"""Downstream tasks of EleutherAI's lm-evaluation-harness (`lm_eval`, the extra `eval`) on stock models in memory."""

import difflib
import logging
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcscale.common.console import ProgressTask, console
from pcscale.common.errors import PcscaleError, RequestError, RunError
from pcscale.data.text import silence_datasets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASK_SETS = {
    "paper": (
        *("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande"),
        *("openbookqa", "sciq", "social_iqa", "lambada_openai"),
    ),
}
"""Names that stand for several tasks of the harness. `paper`: those of Stefaniak et al., 2025."""

_MAIN_METRICS = ("acc_norm", "acc")
_BOOTSTRAPS = 1000
"""Resamples behind the standard error of a metric that has no formula for it, such as perplexity."""

_LOGGERS = ("lm_eval", "transformers", "datasets", "huggingface_hub")
_EXPECTED_WARNINGS = (
    *("`pretrained` model kwarg", "Passed an already-initialized model", "Overwriting default num_fewshot"),
)


@dataclass(frozen=True)
class TaskRequest:
    """Tasks to run, alike on every model.

    Raises:
        RequestError: no task is named, or a number is out of range.
    """

    names: tuple[str, ...]  # tasks, groups or tags of the harness
    num_fewshot: int | None = None  # solved examples in a prompt; None: the task's own number, or 0
    limit: int | None = None  # at most so many documents of a task, the first ones; None: all
    batch_size: int = 4  # prompts at a time

    def __post_init__(self) -> None:
        if not self.names:
            raise RequestError("--tasks names no task. Write for instance --tasks arc_easy,piqa or --tasks paper.")
        for name, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RequestError(f"{name} is {value}, expected at least {least}.")


def task_names(values: Iterable[str]) -> tuple[str, ...]:
    """The tasks that `values` name, in their order, each once: several with commas between, a key of `TASK_SETS`."""
    names = (part.strip() for value in values for part in value.split(","))
    return tuple(dict.fromkeys(task for name in names if name for task in TASK_SETS.get(name, (name,))))


def mean_accuracy(results: dict[str, dict[str, Any]]) -> float | None:
    """The mean over tasks of each one's main metric; None: no task has one."""
    scores = [task[metric] for task in results.values() if (metric := main_metric(task)) is not None]
    return sum(scores) / len(scores) if scores else None


def main_metric(result: dict[str, Any]) -> str | None:
    """The metric that stands for a task: `acc_norm`, else `acc`; None: it has no accuracy."""
    return next((metric for metric in _MAIN_METRICS if result.get(metric) is not None), None)


class DownstreamTasks:
    """The tasks of a request, found in the harness; `run` asks them of one model.

    Raises:
        RequestError: lm_eval is not installed, or has no task of a name.
    """

    def __init__(self, request: TaskRequest) -> None:
        if find_spec("lm_eval") is None:
            raise RequestError("--tasks needs the package lm_eval. Run `pip install 'pcscale[eval]'`.")
        from lm_eval.tasks import TaskManager

        self.request = request
        self.manager = TaskManager()
        for name in request.names:
            if name not in self.manager.task_index:
                nearest = difflib.get_close_matches(name, self.manager.all_tasks, n=1, cutoff=0.0)[0]
                raise RequestError(f"{name} is no task of lm_eval. Did you mean '{nearest}'?")

    def run(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", label: str) -> dict[str, Any]:
        """Ask a stock model in memory. Data is read from the Hub's cache; draws begin at the harness's own seeds.

        Returns:
            `tasks`: by name the metrics, their standard errors as `<metric>_stderr` where there is one, and `samples`,
            with the tasks of a group or tag in its place; and `mean_accuracy`, None where no task has an accuracy.

        Raises:
            RequestError: the model's outputs are not finite.
            RunError: a task's data cannot be read, or the harness failed.
        """
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM

        evaluator.get_git_commit_hash = lambda: None  # git complains on standard error where there is no repository.
        os.environ["DISABLE_MULTIPROC"] = "1"  # It would fork a process that has threads, to resample for a second.
        names = ", ".join(self.request.names)
        console.info(f"{label}: {names}")
        try:
            with console.progress(label, None, "answers") as progress, _silenced():
                adapter: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.request.batch_size)  # pyright: ignore[reportCallIssue]
                adapter.set_cache_hook(_AnswerHook(progress))
                found: Any = evaluator.simple_evaluate(
                    model=adapter,
                    tasks=list(self.request.names),  # pyright: ignore[reportArgumentType]
                    task_manager=self.manager,
                    num_fewshot=self.request.num_fewshot,
                    limit=self.request.limit,
                    bootstrap_iters=_BOOTSTRAPS,
                    log_samples=False,
                )
        except PcscaleError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise RunError(f"lm_eval failed on {names} ({reason}).") from error
        samples = found["n-samples"]
        results = {name: _figures(found["results"][name], samples[name]["effective"]) for name in samples}
        return {"tasks": results, "mean_accuracy": mean_accuracy(results)}


class _AnswerHook:
    """The harness's hook for a cache of answers, called with every answer as it comes."""

    def __init__(self, progress: ProgressTask) -> None:
        self._progress = progress

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        value = res[0] if isinstance(res, tuple) else res
        if isinstance(value, float) and math.isnan(value):
            raise RequestError("a log-likelihood is nan: the model's outputs are not finite. Check its weights.")
        self._progress.advance(1)


def _figures(result: dict[str, Any], samples: int) -> dict[str, Any]:
    """Numbers alone; `acc,none` is `acc`, and a filter that has a name stays: `exact_match,strict-match`."""
    numbers = {
        key.removesuffix(",none"): float(value)
        for key, value in result.items()
        if "," in key and isinstance(value, int | float) and math.isfinite(value)
    }
    return {**numbers, "samples": samples}


class _Warnings(logging.Handler):
    """Show the harness's warnings on the console, each place in its source once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: set[tuple[str, int]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message, place = " ".join(record.getMessage().split())[:200], (record.pathname, record.lineno)
        if place not in self._seen and not message.startswith(_EXPECTED_WARNINGS):
            self._seen.add(place)
            console.warn(f"lm_eval: {message}")


@contextmanager
def _silenced() -> Iterator[None]:
    """Hide what the harness and the libraries below it print; its warnings go to the console."""
    silence_datasets()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [logging.NullHandler()], False
    loggers[0].handlers = [_Warnings()]
    try:
        with Path(os.devnull).open("w") as sink, redirect_stdout(sink), redirect_stderr(sink):
            yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
