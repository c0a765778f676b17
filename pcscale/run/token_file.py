"""The header of a run's token file: N train and M held-out sequences of T tokens. Needs no torch."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pcscale.common.errors import RequestError
from pcscale.storage.hashing import fingerprint
from pcscale.storage.index import TensorEntry, read_header

TOKENS_NAME = "tokens.safetensors"
TRAIN, VALIDATION = "train", "validation"
KEY, TOKENIZER = "key", "tokenizer"
"""Keys of the header beside the tensors: fingerprints of the text and settings, and of vocabulary and end token."""


@dataclass(frozen=True)
class TokenFile:
    """The sequences of a run, int32 `[N, T]` and `[M, T]`, and a fingerprint of the tokenizer whose ids they are."""

    train: TensorEntry
    validation: TensorEntry
    tokenizer: str

    @property
    def sequence_length(self) -> int:
        """Tokens in a sequence."""
        return self.train.shape[1]


def read_token_file(run: Path) -> TokenFile:
    """The header of the token file in a run folder.

    Raises:
        RequestError: it is missing or broken.
    """
    file = run / TOKENS_NAME
    entries, metadata = read_header(file)
    train, validation = entries.get(TRAIN), entries.get(VALIDATION)
    if train is None or validation is None or any(len(entry.shape) != 2 for entry in (train, validation)):
        raise RequestError(f"{file} does not hold the sequences {TRAIN} and {VALIDATION}. Restore the file.")
    if TOKENIZER not in metadata:
        raise RequestError(f"{file} does not say which tokenizer made it. Restore the file.")
    return TokenFile(train, validation, metadata[TOKENIZER])


def sequences_fingerprint(entry: TensorEntry, count: int) -> str:
    """A fingerprint of the first `count` sequences of a tensor of the token file. Memory: file-backed."""
    num_bytes = entry.num_bytes * count // max(entry.shape[0], 1)
    return fingerprint(np.memmap(entry.file, np.uint8, "r")[entry.start : entry.start + num_bytes].data)
