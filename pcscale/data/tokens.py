"""Text to packed token sequences, kept in one mapped file of the run folder.

Shapes: N train sequences, M held-out sequences, T tokens in a sequence; `tokens_N` is flat, N tokens.
"""

import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from pcscale.common.console import console
from pcscale.common.errors import RequestError, kind_and_reason
from pcscale.config.schema import RunConfig
from pcscale.data.text import describe, documents
from pcscale.run.token_file import KEY, TOKENIZER, TOKENS_NAME, TRAIN, VALIDATION
from pcscale.storage.hashing import fingerprint
from pcscale.storage.index import read_header
from pcscale.storage.reader import TensorReader
from pcscale.storage.writer import write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PIECE_CHARACTERS = 1_000_000
_PIECE_TOKENS = 262_144
# Places to cut a long document, best first, and how many of these characters stay on the left. A space goes with the
# word that follows it, as in tokenizers.
_CUTS = (("\n\n", 2), ("\n", 1), (" ", 0))


@dataclass(frozen=True)
class TokenSets:
    """Packed sequences of token ids, int32, on the host. Memory: file-backed."""

    train_NT: Tensor
    validation_MT: Tensor
    fingerprint: str  # of both, shapes and ids: 128 bits in hexadecimal


def load_tokenizer(folder: Path, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """The tokenizer whose files lie in `folder`. Nothing is fetched.

    Raises:
        RequestError: its files are missing or unreadable, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        raise RequestError(
            f"{folder}: the tokenizer files are missing or unreadable ({kind_and_reason(error)}). "
            "Copy tokenizer.json and tokenizer_config.json of the base there."
        ) from error
    if tokenizer.eos_token_id is None:
        raise RequestError(
            f"{folder}: the tokenizer has no EOS token, and one ends every document. "
            "Set eos_token in tokenizer_config.json."
        )
    return tokenizer


def tokenize(documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase", limit: int) -> Tensor:
    """The tokens of all documents, int32, each followed by EOS; no other special token is added.

    Documents are read only as far as the limit needs, which may cut the last one.

    Memory: 4 bytes a token, and the tokenizer's for a piece of a million characters.
    """
    tokens = array("i")
    with console.progress("tokenise", total=limit, unit="tokens") as progress:
        for ids in _token_lists(documents, tokenizer):
            ids = ids[: limit - len(tokens)]
            tokens.extend(ids)
            progress.advance(len(ids))
            if len(tokens) == limit:
                break
    return torch.frombuffer(tokens, dtype=torch.int32) if tokens else torch.empty(0, dtype=torch.int32)


def _eos(tokenizer: "PreTrainedTokenizerBase") -> int:
    return cast(int, tokenizer.eos_token_id)


def _token_lists(documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase") -> Iterator[list[int]]:
    for document in documents:
        for piece in _pieces(document):
            # Not verbose: a document may be longer than the model's context, it is cut into sequences afterwards.
            yield tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        yield [_eos(tokenizer)]


def _pieces(document: str) -> Iterator[str]:
    """Cut a document into pieces of bounded length, where a cut changes tokens least."""
    start = 0
    while len(document) - start > _PIECE_CHARACTERS:
        limit = start + _PIECE_CHARACTERS
        cuts = ((document.rfind(sign, start + 1, limit), kept) for sign, kept in _CUTS)
        end = next((position + kept for position, kept in cuts if position >= 0), limit)
        yield document[start:end]
        start = end
    yield document[start:]


def count_text_bytes(tokens_N: Tensor, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Number of UTF-8 bytes in the text of these tokens, for bits per byte.

    Documents, ended by EOS, are decoded one by one, as they were tokenised; special tokens stand for no text.
    """
    document_ends = (tokens_N == _eos(tokenizer)).nonzero().flatten() + 1
    num_bytes = 0
    for document_tokens in torch.tensor_split(tokens_N, document_ends.tolist()):
        for piece in document_tokens.split(_PIECE_TOKENS):
            text = tokenizer.decode(piece.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            num_bytes += len(str(text).encode())
    return num_bytes


def read_sequences(
    setting: str,
    sources: list[str],
    tokenizer: "PreTrainedTokenizerBase",
    sequence_length: int,
    count: int,
    vocab_size: int,
    least: int = 1,
) -> Tensor:
    """The first sequences of the sources, packed; text is read only as far as they need.

    Args:
        setting: the user's name for the sources, for errors.
        sources: files, globs or Hub data set ids, as for `documents`.
        count: most sequences.
        vocab_size: the model's; every token id is below it.
        least: fewest sequences; 2 where the caller holds one of them out.

    Returns:
        int32 `[N, T]`, least ≤ N ≤ count; the ragged tail is dropped.

    Raises:
        RequestError: a source cannot be read or holds too little text, or a token id is outside the vocabulary.
    """
    tokens_N = tokenize(documents(sources), tokenizer, count * sequence_length)
    if not len(tokens_N):
        raise RequestError(f"{setting}: {', '.join(sources)} holds no text. Name files that do.")
    if len(tokens_N) < least * sequence_length:
        raise RequestError(
            f"{setting} holds {len(tokens_N)} tokens, expected {least * sequence_length} at least: {least} × "
            f"sequence_length{', one of them held out' * (least > 1)}. Give more text or set a smaller sequence_length."
        )
    largest = int(tokens_N.max())
    if largest >= vocab_size:
        raise RequestError(
            f"{setting}: the tokenizer gives token {largest}, the model's vocabulary ends at {vocab_size - 1}. "
            "Use the tokenizer that came with the base."
        )
    full = len(tokens_N) // sequence_length
    return tokens_N[: full * sequence_length].view(full, sequence_length)


def prepare_tokens(
    config: RunConfig, train_sequences: int, vocab_size: int, tokenizer: "PreTrainedTokenizerBase", folder: Path
) -> TokenSets:
    """The run's train and held-out sequences, from `folder/tokens.safetensors` where that fits the settings and text.

    Text is read as far as the run can use it. At most `eval_tokens` (but one sequence at least) are held out, from
    `data.validation`; where that is absent, from the end of the text read of `data.train`, at most a tenth of it.

    Args:
        train_sequences: the most that the run can see without repeating one.
        vocab_size: the model's; every token id is below it.

    Raises:
        RequestError: a source cannot be read, holds too little text, or a token id is outside the vocabulary.
    """
    file = folder / TOKENS_NAME
    key = _key(config, vocab_size, tokenizer)
    try:
        stored = read_header(file)[1].get(KEY)
    except RequestError:  # There is no usable file.
        stored = None
    if stored != key:
        train_NT, validation_MT = _make_sequences(config, train_sequences, vocab_size, tokenizer)
        # Runs with equal vocabularies over the same ids are over the same text.
        vocabulary = fingerprint(json.dumps([_eos(tokenizer), tokenizer.get_vocab()], sort_keys=True).encode())
        write_tensors(file, {TRAIN: train_NT, VALIDATION: validation_MT}, {KEY: key, TOKENIZER: vocabulary})
    reader = TensorReader(read_header(file)[0])
    tensors = {name: reader.tensor(name) for name in (TRAIN, VALIDATION)}
    parts = [[name, list(tensor.shape), fingerprint(reader.data(name))] for name, tensor in tensors.items()]
    return TokenSets(tensors[TRAIN], tensors[VALIDATION], fingerprint(json.dumps(parts).encode()))


def _key(config: RunConfig, vocab_size: int, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A hash of the text, tokenizer and sizes behind the sequences. A run that is made longer repeats its sequences."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # absent: a slow tokenizer, written in Python
    identity = backend.to_str() if backend else [type(tokenizer).__name__, tokenizer.get_vocab()]
    sources = [sources and describe(sources) for sources in (config.data.train, config.data.validation)]
    sizes = [config.sequence_length, config.eval_tokens, vocab_size]
    return fingerprint(json.dumps([sources, sizes, _eos(tokenizer), identity], sort_keys=True).encode())


def _make_sequences(
    config: RunConfig, train_sequences: int, vocab_size: int, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Tensor, Tensor]:
    def read(setting: str, sources: list[str], count: int, least: int = 1) -> Tensor:
        return read_sequences(setting, sources, tokenizer, config.sequence_length, count, vocab_size, least)

    train, validation = config.data.train, config.data.validation
    held_out = max(1, config.eval_tokens // config.sequence_length)
    if validation is not None:
        return read("data.train", train, train_sequences), read("data.validation", validation, held_out)
    # A ninth on top of train is a tenth of the whole.
    held_out = min(held_out, max(1, train_sequences // 9))
    both_NT = read("data.train", train, train_sequences + held_out, least=2)
    held_out = min(held_out, max(1, len(both_NT) // 10))
    return both_NT[:-held_out], both_NT[-held_out:]
