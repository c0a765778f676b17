"""Whether the losses of several runs may be compared: the same tokenizer, held-out text and training text."""

from collections.abc import Sequence

from pcscale.common.console import console
from pcscale.common.errors import RequestError
from pcscale.reporting.run_data import RunData
from pcscale.run.token_file import TokenFile, read_token_file, sequences_fingerprint


def check_same_data(runs: Sequence[RunData]) -> None:
    """Refuse runs whose held-out losses say nothing of each other.

    A run reads as much training text as it has steps for, so the shorter text must be the beginning of the longer one.

    Raises:
        RequestError: tokenizers, sequence lengths, held-out tokens or training tokens differ, or a run's are unknown.
    """
    files = [read_token_file(data.run) for data in runs]
    for data, file in zip(runs[1:], files[1:], strict=True):
        _check_held_out(runs[0], files[0], data, file)
    longest, longest_file = max(zip(runs, files, strict=True), key=lambda pair: pair[1].train.shape[0])
    for data, file in zip(runs, files, strict=True):
        _check_training(longest, longest_file, data, file)
        if file.train.shape[0] < longest_file.train.shape[0]:
            tokens = [f"{each.train.shape[0] * each.sequence_length:,}" for each in (file, longest_file)]
            console.warn(
                f"{data.run} drew on {tokens[0]} tokens of the training text, {longest.run} on {tokens[1]}: they saw "
                "it in another order, and may have calibrated on other parts of it"
            )


def _check_held_out(first: RunData, first_file: TokenFile, data: RunData, file: TokenFile) -> None:
    pair = f"{first.run} and {data.run}"
    if file.tokenizer != first_file.tokenizer:
        raise RequestError(
            f"{pair} have different tokenizers, so a token of one is not a token of the other. "
            "Compare runs with one tokenizer."
        )
    if file.sequence_length != first_file.sequence_length:
        raise RequestError(
            f"{pair} have sequences of {first_file.sequence_length} and {file.sequence_length} tokens, so their "
            "held-out losses are over different contexts. Compare runs with one sequence_length."
        )
    if _held_out(file) == _held_out(first_file):
        return
    sizes = [f"{each.validation.shape[0] * each.sequence_length:,}" for each in (first_file, file)]
    found = f"{sizes[0]} and {sizes[1]} tokens" if sizes[0] != sizes[1] else f"different text of {sizes[0]} tokens"
    from_train = any(each.config.data.validation is None for each in (first, data))
    remedy = "Set data.validation: without it the end of what is trained on is held out, which depends on max_steps"
    remedy = remedy if from_train else "Compare runs with one data.validation and one eval_tokens"
    raise RequestError(f"{pair} hold out {found}. {remedy}.")


def _held_out(file: TokenFile) -> tuple[int, str]:
    count = file.validation.shape[0]
    return count, sequences_fingerprint(file.validation, count)


def _check_training(longest: RunData, longest_file: TokenFile, data: RunData, file: TokenFile) -> None:
    """A run that repeated a shorter text might have gone on in the longer one."""
    count, pair = file.train.shape[0], f"{longest.run} and {data.run}"
    if sequences_fingerprint(file.train, count) != sequences_fingerprint(longest_file.train, count):
        raise RequestError(f"{pair} were trained on different text. Compare runs with one data.train.")
    num_tokens, longest_tokens = (each.train.shape[0] * each.sequence_length for each in (file, longest_file))
    if data.steps[-1].tokens > num_tokens < longest_tokens:
        raise RequestError(
            f"{data.run} repeated its {num_tokens:,} tokens of training text, {longest.run} had {longest_tokens:,}, "
            "so they were trained on different text. Compare runs with one data.train."
        )
