"""The jobs behind `calibrate`, `evaluate` and `verify`: parts of the whole, each on its own."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import resolve_base
from pcscale.calibration.collect import collect_scores, write_scores
from pcscale.common.console import console
from pcscale.common.errors import RequestError
from pcscale.common.files import read_json
from pcscale.config.load import check_values, read_values
from pcscale.config.schema import TEXT_FREE, RunConfig
from pcscale.data.tokens import count_text_bytes, load_tokenizer, read_sequences
from pcscale.evaluation.perplexity import HeldOut, evaluate_base, evaluate_model
from pcscale.evaluation.tasks import TaskRequest
from pcscale.families.hf_config import read_config
from pcscale.families.plan import Plan
from pcscale.jobs.compress import calibration_batches
from pcscale.memory.process import AnonymousPeak
from pcscale.merging.verify import check_bytes, check_models
from pcscale.model.compressed import load_stock
from pcscale.run.folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def calibrate(config: RunConfig) -> dict[str, Any]:
    """Write the scores of a base into `config.output`; returns what was done."""
    output = Path(config.output)
    if output.is_dir() or not output.parent.is_dir():
        raise RequestError(f"{output} is no file that can be written: name one in a folder that exists.")
    source = resolve_base(config.base)
    base = MappedBase(source)
    whole = Plan.whole(base.family, base.config)
    batches: list[torch.Tensor] = []
    if config.importance not in TEXT_FREE:
        tokenizer = load_tokenizer(source.folder, config.trust_remote_code)
        count = max(1, config.calibration_tokens // config.sequence_length)
        ids_NT = read_sequences("--data", config.data.train, tokenizer, config.sequence_length, count, _vocab(base))
        batches = calibration_batches(ids_NT, config)
    with AnonymousPeak() as peak:
        scores = collect_scores(whole, base, config.importance, batches, config.seed, _device(), torch.float32)
    tokens = sum(batch.numel() for batch in batches)
    write_scores(Path(config.output), scores, config.importance, tokens)
    return {
        "output": config.output,
        "importance": config.importance,
        "tokens": tokens,
        "scores": {name: list(score.shape) for name, score in scores.items()},
        "peak_anonymous_bytes": peak.peak_bytes,
    }


def evaluate(
    model_folder: Path, base_name: str | None, text: RunConfig | None, request: TaskRequest | None = None
) -> dict[str, Any]:
    """The results of a checkpoint folder, with the base's under `base` where one is named.

    Args:
        text: the held-out text, in `data.train`; None: none is asked for.
        request: downstream tasks; None likewise. For these the base is held in memory whole, as every model is.

    Raises:
        RequestError: the two do not share a vocabulary, so that their losses could not be compared; or tasks are
            asked for and lm_eval is not installed.
    """
    model_config = read_config(model_folder)
    base = MappedBase(resolve_base(base_name)) if base_name else None
    vocab_size = model_config.get("vocab_size", 0)
    if base and _vocab(base) != vocab_size:
        raise RequestError(
            f"{model_folder} has a vocabulary of {vocab_size}, {base_name} one of {_vocab(base)}. Name its own base."
        )
    tokenizer = load_tokenizer(model_folder, trust_remote_code=False)
    held_out = _held_out(text, tokenizer, vocab_size) if text else None
    run = _task_runner(request) if request else None
    model = load_stock(model_folder, _device(), torch.float32)
    result: dict[str, Any] = {}
    if text and held_out:
        result |= asdict(evaluate_model(model, held_out, text.per_device_train_batch_size, "evaluate"))
    if run:
        result |= run(model, tokenizer, "tasks")
    del model
    if base:
        result["base"] = {}
        if text and held_out:
            whole = Plan.whole(base.family, base.config)
            batch = text.per_device_train_batch_size
            found = evaluate_base(base, whole.base_parameters, held_out, batch, _device(), torch.float32)
            result["base"] |= asdict(found)
        if run:
            stock = load_stock(base.folder, _device(), torch.float32)
            result["base"] |= run(stock, load_tokenizer(base.folder, trust_remote_code=False), "tasks, base")
    return result


def _held_out(text: RunConfig, tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> HeldOut:
    count = max(1, text.eval_tokens // text.sequence_length)
    ids_MT = read_sequences("--data", text.data.train, tokenizer, text.sequence_length, count, vocab_size)
    return HeldOut(ids_MT, count_text_bytes(ids_MT[:, 1:].flatten(), tokenizer))


def _task_runner(request: TaskRequest) -> Callable[["PreTrainedModel", "PreTrainedTokenizerBase", str], dict[str, Any]]:
    """What runs the tasks on a model; their data is read now."""
    if find_spec("lm_eval") is None:
        raise RequestError("--tasks needs the package lm_eval. Run `pip install 'pcscale[eval]'`.")
    from pcscale.evaluation.harness import load_tasks, run_tasks

    tasks = load_tasks(request)
    return partial(run_tasks, tasks, request)


def verify(run: Path) -> dict[str, Any]:
    """Check what a run left behind against what it was made from.

    Returns:
        `passed`, and `rows` of (check, found, allowed).

    Raises:
        RequestError: no run, no checkpoint, or a changed file.
    """
    folder = RunFolder(run)
    if not folder.settings.exists():
        raise RequestError(f"{run} is not a run folder: it has no run.yaml.")
    checkpoint = folder.latest_checkpoint()
    if checkpoint is None:
        raise RequestError(f"{run} has no checkpoint yet. Train first.")
    config = check_values(read_values(folder.settings), str(folder.settings))
    merged = folder.merged if folder.merged.exists() and _merged_step(folder) in (None, checkpoint.name) else None
    if merged is None:
        console.warn(f"{folder.merged} is not of the last checkpoint: merged weights were not compared")
    manifest, base, checks = check_bytes(checkpoint, lambda expected: MappedBase(resolve_base(config.base), expected))
    checks += check_models(checkpoint, manifest, base, merged)
    return {
        "checkpoint": str(checkpoint),
        "passed": all(check.passed for check in checks),
        "checks": {check.name: {"found": check.found, "allowed": check.allowed} for check in checks},
        "rows": [[check.name, f"{check.found:.3g}", f"{check.allowed:.3g}"] for check in checks],
    }


def _merged_step(folder: RunFolder) -> str | None:
    """The checkpoint that `merged` was made from; None: nobody wrote it down."""
    return read_json(folder.merge_result).get("checkpoint") if folder.merge_result.exists() else None


def _vocab(base: MappedBase) -> int:
    return base.config["vocab_size"]
