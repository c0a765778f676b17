"""The job behind `pcscale evaluate`: a checkpoint folder on held-out text and downstream tasks, beside its base."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import resolve_base
from pcscale.common.errors import RequestError
from pcscale.config.schema import EvaluateSettings
from pcscale.data.tokens import count_text_bytes, load_tokenizer, read_sequences
from pcscale.evaluation.perplexity import HeldOut, evaluate_base, evaluate_model
from pcscale.evaluation.tasks import DownstreamTasks, TaskRequest
from pcscale.families.hf_config import read_config
from pcscale.families.plan import Plan
from pcscale.model.compressed import load_stock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluate(
    model_folder: Path, base_name: str | None, text: EvaluateSettings | None, request: TaskRequest | None = None
) -> dict[str, Any]:
    """The results of a checkpoint folder, with the base's under `base` where one is named.

    Args:
        text: the held-out text; None: none is asked for.
        request: downstream tasks; None likewise. For these the base is held in memory whole, as every model is.

    Raises:
        RequestError: the two do not share a vocabulary, so that their losses could not be compared; or tasks are
            asked for and lm_eval is not installed.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model_config = read_config(model_folder)
    base = MappedBase(resolve_base(base_name)) if base_name else None
    vocab_size = model_config.get("vocab_size", 0)
    if base and (known := base.config["vocab_size"]) != vocab_size:
        raise RequestError(
            f"{model_folder} has a vocabulary of {vocab_size}, {base_name} one of {known}. Name its own base."
        )
    tokenizer = load_tokenizer(model_folder, trust_remote_code=False)
    held_out = _held_out(text, tokenizer, vocab_size) if text else None
    tasks = DownstreamTasks(request) if request else None
    model = load_stock(model_folder, device, torch.float32)
    result: dict[str, Any] = {}
    if text and held_out:
        result |= asdict(evaluate_model(model, held_out, text.batch_size, "evaluate"))
    if tasks:
        result |= tasks.run(model, tokenizer, "tasks")
    del model
    if base:
        result["base"] = {}
        if text and held_out:
            whole = Plan.whole(base.family, base.config)
            batch = text.batch_size
            found = evaluate_base(base, whole.base_parameters, held_out, batch, device, torch.float32)
            result["base"] |= asdict(found)
        if tasks:
            stock = load_stock(base.folder, device, torch.float32)
            result["base"] |= tasks.run(stock, load_tokenizer(base.folder, trust_remote_code=False), "tasks, base")
    return result


def _held_out(text: EvaluateSettings, tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> HeldOut:
    count = max(1, text.tokens // text.sequence_length)
    ids_MT = read_sequences("--data", text.data, tokenizer, text.sequence_length, count, vocab_size)
    return HeldOut(ids_MT, count_text_bytes(ids_MT[:, 1:].flatten(), tokenizer))
