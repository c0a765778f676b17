"""The header of a run's token file, which tells what two runs have in common. Needs no torch.

Shapes: N train sequences, M held-out sequences, T tokens in a sequence.
"""

import mmap
from dataclasses import dataclass
from pathlib import Path

from pcscale.common.errors import RequestError
from pcscale.storage.hashing import fingerprint
from pcscale.storage.index import TensorEntry, read_header

TOKENS_NAME = "tokens.safetensors"
TRAIN, VALIDATION = "train", "validation"
KEY, TOKENIZER = "key", "tokenizer"
"""Keys of its header beside the tensors: what they were made of, and whose ids they are, both as fingerprints."""


@dataclass(frozen=True)
class TokenFile:
    """The token file of a run.

    Attributes:
        train: int32 `[N, T]`.
        validation: int32 `[M, T]`.
        tokenizer: fingerprint of the vocabulary and the end of a document. With it and the ids the text is the same.
    """

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
    with (
        entry.file.open("rb") as handle,
        mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as whole,
        whole[entry.start : entry.start + num_bytes] as part,
    ):
        return fingerprint(part)
