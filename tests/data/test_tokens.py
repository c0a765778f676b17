"""Tokens: what a document becomes, and how many bytes it stood for."""

import itertools
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pcscale.common.errors import RequestError
from pcscale.data import tokens
from pcscale.data.tokens import count_text_bytes, load_tokenizer, tokenize
from tests.data.conftest import EOS_ID, SENTENCE


def test_a_saved_tokenizer_is_loaded(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code=False)
    assert tokenizer.decode(tokenizer("sea shells")["input_ids"]) == "sea shells"


@pytest.mark.parametrize("content", [None, "broken"])
def test_missing_and_unreadable_tokenizer_files_are_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(RequestError) as caught:
        load_tokenizer(tmp_path, trust_remote_code=False)
    assert str(caught.value).startswith(f"{tmp_path}: the tokenizer files are missing or unreadable (")
    assert str(caught.value).endswith("Copy tokenizer.json and tokenizer_config.json of the base there.")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_has_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="the tokenizer files are missing or unreadable"):
        load_tokenizer(tmp_path / "nowhere", trust_remote_code=False)


def test_a_tokenizer_without_eos_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(RequestError, match=r"has no EOS token, .* Set eos_token in tokenizer_config\.json\."):
        load_tokenizer(tmp_path, trust_remote_code=False)


# tokenize


def test_every_document_is_followed_by_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["sea shells", "Grüße", "the river"]
    expected = [token for text in texts for token in [*tokenizer.backend_tokenizer.encode(text).ids, EOS_ID]]
    tokens_N = tokenize(texts, tokenizer, limit=1000)
    assert tokens_N.dtype == torch.int32
    assert tokens_N.tolist() == expected


def test_special_tokens_of_the_tokenizer_are_not_added(tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers.processors import TemplateProcessing

    plain = tokenize(["sea"], tokenizer, limit=100).tolist()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", EOS_ID)]
    )
    assert tokenizer("sea")["input_ids"][0] == EOS_ID
    assert tokenize(["sea"], tokenizer, limit=100).tolist() == plain


def test_no_documents_are_no_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens_N = tokenize([], tokenizer, limit=10)
    assert (tokens_N.dtype, tuple(tokens_N.shape)) == (torch.int32, (0,))


def test_reading_stops_at_the_limit(tokenizer: PreTrainedTokenizerFast) -> None:
    taken = []

    def endless() -> Iterator[str]:
        for number in itertools.count():
            taken.append(number)
            yield "sea shells"

    one = tokenize(["sea shells"], tokenizer, limit=100).tolist()
    for limit in (1, len(one), len(one) + 1, 5 * len(one)):
        taken.clear()
        assert tokenize(endless(), tokenizer, limit).tolist() == (one * 5)[:limit]
        assert len(taken) == -(-limit // len(one))


def test_a_document_longer_than_the_context_raises_no_warning(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.model_max_length = 4
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        assert len(tokenize([SENTENCE * 3], tokenizer, limit=1000)) > 4
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize(
    ("document", "pieces"),
    [
        ("short", ["short"]),
        ("ab cd\n\nef gh\nij klm", ["ab cd\n\n", "ef gh\n", "ij klm"]),  # blank line, then newline
        ("abc def ghi jkl", ["abc def", " ghi jkl"]),  # a space opens the next piece
        ("abcdefg hijklmnopqrstuv", ["abcdefg", " hijklmnop", "qrstuv"]),  # a space that opens a piece cuts no more
        ("abcdefghijklmnopqrstu", ["abcdefghij", "klmnopqrst", "u"]),  # nothing to cut at
        ("\n\nabcdefghijkl", ["\n\n", "abcdefghij", "kl"]),
        (" abcdefghijkl", [" abcdefghi", "jkl"]),  # never an empty piece
        ("abcdefgh\n\nxyz", ["abcdefgh\n\n", "xyz"]),
    ],
)
def test_a_long_document_is_cut_where_it_shows_least(
    document: str, pieces: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_PIECE_CHARACTERS", 10)
    assert list(tokens._pieces(document)) == pieces
    assert "".join(pieces) == document


def test_pieces_of_a_document_have_one_eos_at_the_end(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = "\n\n".join([SENTENCE * 2] * 5) + SENTENCE * 5
    whole = tokenize([document], tokenizer, limit=10_000)
    monkeypatch.setattr(tokens, "_PIECE_CHARACTERS", 120)
    cut = tokenize([document], tokenizer, limit=10_000)
    assert (cut == EOS_ID).nonzero().flatten().tolist() == [len(cut) - 1]
    assert tokenizer.decode(cut.tolist(), skip_special_tokens=True) == document
    assert abs(len(cut) - len(whole)) <= 10


# count_text_bytes


def test_bytes_are_those_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["sea shells , by the sea .", "Grüße, 世界 🐚", "\n\n  indented\n"]
    tokens_N = tokenize(texts, tokenizer, limit=1000)
    assert count_text_bytes(tokens_N, tokenizer) == sum(len(text.encode("utf-8")) for text in texts)


def test_bytes_are_counted_in_pieces(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens_N = tokenize([SENTENCE * 4, SENTENCE], tokenizer, limit=1000)
    monkeypatch.setattr(tokens, "_PIECE_TOKENS", 7)
    assert count_text_bytes(tokens_N, tokenizer) == 5 * len(SENTENCE)


def test_eos_and_no_tokens_at_all_have_no_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    assert count_text_bytes(torch.tensor([EOS_ID, EOS_ID], dtype=torch.int32), tokenizer) == 0
    assert count_text_bytes(torch.empty(0, dtype=torch.int32), tokenizer) == 0
