"""The job behind `pcscale calibrate`: importance scores of a base, into a file."""

from pathlib import Path
from typing import Any

import torch

from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import resolve_base
from pcscale.calibration.collect import collect_scores, write_scores
from pcscale.common.errors import RequestError
from pcscale.config.schema import TEXT_FREE, CalibrateSettings
from pcscale.data.tokens import load_tokenizer, read_sequences
from pcscale.families.plan import Plan
from pcscale.jobs.compress import calibration_batches
from pcscale.memory.process import AnonymousPeak


def calibrate(settings: CalibrateSettings) -> dict[str, Any]:
    """Write the scores of a base into a file; returns what was done.

    Raises:
        RequestError: the base, the text or the file is not usable.
    """
    output = Path(settings.output)
    if output.is_dir() or not output.parent.is_dir():
        raise RequestError(f"{output} is no file that can be written: name one in a folder that exists.")
    base = MappedBase(resolve_base(settings.base))
    batches: list[torch.Tensor] = []
    if settings.importance not in TEXT_FREE:
        tokenizer = load_tokenizer(base.folder, trust_remote_code=False)
        length = settings.sequence_length
        count = max(1, settings.tokens // length)
        ids_NT = read_sequences("--data", settings.data, tokenizer, length, count, base.config["vocab_size"])
        batches = calibration_batches(ids_NT, settings.tokens // length, settings.batch_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole = Plan.whole(base.family, base.config)
    with AnonymousPeak() as peak:
        scores = collect_scores(whole, base, settings.importance, batches, settings.seed, device, torch.float32)
    tokens = sum(batch.numel() for batch in batches)
    write_scores(output, scores, settings.importance, tokens)
    return {
        "output": settings.output,
        "importance": settings.importance,
        "tokens": tokens,
        "scores": {name: list(score.shape) for name, score in scores.items()},
        "peak_anonymous_bytes": peak.peak_bytes,
    }
