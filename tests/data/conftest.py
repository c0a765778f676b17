"""What the tests of tokens share: a small tokenizer and token sets made with it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pcscale.config.schema import DataConfig, RunConfig
from pcscale.data.tokens import TokenSets, prepare_tokens
from tests.data.small_tokenizer import build_tokenizer

EOS_ID = 0
VOCAB_SIZE = 300
SENTENCE = "The quick brown fox sells sea shells by the river. "


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder, VOCAB_SIZE)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


Prepare = Callable[..., TokenSets]


@pytest.fixture
def prepare(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Prepare:
    """`prepare(train="text", validation=None, train_sequences=20, …settings)`, into the folder `run`."""

    def run(
        train: str,
        validation: str | None = None,
        train_sequences: int = 20,
        vocab_size: int = VOCAB_SIZE,
        sequence_length: int = 16,
        eval_tokens: int = 64,
    ) -> TokenSets:
        sources = {"train": train, "validation": validation}
        for name, text in sources.items():
            path = tmp_path / f"{name}.txt"
            if text is not None and not (path.exists() and path.read_text() == text):
                path.write_text(text)
        data = DataConfig(
            train=[str(tmp_path / "train.txt")],
            validation=None if validation is None else [str(tmp_path / "validation.txt")],
        )
        sizes = {"sequence_length": sequence_length, "eval_tokens": eval_tokens}
        config = RunConfig(base="base", output="run", data=data, **sizes)
        return prepare_tokens(config, train_sequences, vocab_size, tokenizer, tmp_path / "run")

    return run
