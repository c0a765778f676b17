"""Token sets: how sequences are packed and held out, and when the stored file is used again."""

import gc
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from pcscale.common.errors import RequestError
from pcscale.config.schema import DataConfig, RunConfig
from pcscale.data import tokens
from pcscale.data.tokens import count_text_bytes, prepare_tokens, read_sequences, tokenize
from tests.data.conftest import EOS_ID, SENTENCE, VOCAB_SIZE, Prepare


def text_of(tokenizer: PreTrainedTokenizerFast, num_tokens: int) -> str:
    """Text of exactly so many tokens, EOS included."""
    ids = tokenizer(SENTENCE * num_tokens)["input_ids"][: num_tokens - 1]
    text = tokenizer.decode(ids)
    assert len(tokenizer(text)["input_ids"]) == num_tokens - 1
    return str(text)


def test_the_first_sequences_of_some_text_are_read_without_a_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = tmp_path / "text.txt"
    source.write_text(text_of(tokenizer, 50))
    ids = tokenizer(source.read_text())["input_ids"]
    two, all_full = (read_sequences("--data", [str(source)], tokenizer, 16, count, VOCAB_SIZE) for count in (2, 9))
    assert two.tolist() == [ids[:16], ids[16:32]]
    assert all_full.tolist() == [ids[:16], ids[16:32], ids[32:48]]
    with pytest.raises(RequestError, match=r"^--data holds 50 tokens, expected 51 at least: 1 × sequence_length\."):
        read_sequences("--data", [str(source)], tokenizer, 51, 2, VOCAB_SIZE)


# prepare_tokens: packing and holding out


def test_sequences_are_the_text_in_order_and_the_ragged_tail_is_dropped(
    prepare: Prepare, tokenizer: PreTrainedTokenizerFast
) -> None:
    train, validation = text_of(tokenizer, 16 * 5 + 7), text_of(tokenizer, 16 * 2 + 15)
    sets = prepare(train, validation)
    train_ids = [*tokenizer(train)["input_ids"], EOS_ID]
    validation_ids = [*tokenizer(validation)["input_ids"], EOS_ID]
    assert sets.train_NT.dtype == sets.validation_MT.dtype == torch.int32
    assert sets.train_NT.tolist() == [train_ids[start : start + 16] for start in range(0, 80, 16)]
    assert sets.validation_MT.tolist() == [validation_ids[:16], validation_ids[16:32]]


def test_no_more_is_read_than_the_run_can_use(prepare: Prepare, tokenizer: PreTrainedTokenizerFast) -> None:
    text = text_of(tokenizer, 16 * 40)
    sets = prepare(text, text, train_sequences=3, eval_tokens=32)
    assert tuple(sets.train_NT.shape) == (3, 16)
    assert tuple(sets.validation_MT.shape) == (2, 16)


@pytest.mark.parametrize(
    ("available", "train_sequences", "eval_tokens", "train", "held_out"),
    [
        (40, 18, 1000, 18, 2),  # all that the run can use, and a tenth of the whole beside it
        (40, 27, 16, 27, 1),  # eval_tokens is the smaller one
        (40, 27, 1, 27, 1),  # one sequence at least
        (40, 2, 1000, 2, 1),
        (35, 100, 1000, 32, 3),  # less text than the run can use
        (5, 100, 1000, 4, 1),
        (2, 100, 1000, 1, 1),
    ],
)
def test_without_validation_the_end_of_train_is_held_out(
    prepare: Prepare,
    tokenizer: PreTrainedTokenizerFast,
    available: int,
    train_sequences: int,
    eval_tokens: int,
    train: int,
    held_out: int,
) -> None:
    text = text_of(tokenizer, 16 * available)
    sets = prepare(text, train_sequences=train_sequences, eval_tokens=eval_tokens)
    assert (len(sets.train_NT), len(sets.validation_MT)) == (train, held_out)
    together = torch.cat([sets.train_NT, sets.validation_MT]).flatten().tolist()
    assert together == [*tokenizer(text)["input_ids"], EOS_ID][: 16 * (train + held_out)]


def test_eval_tokens_below_a_sequence_still_evaluate_one(prepare: Prepare, tokenizer: PreTrainedTokenizerFast) -> None:
    text = text_of(tokenizer, 16 * 10)
    assert len(prepare(text, text, eval_tokens=3).validation_MT) == 1


# prepare_tokens: the stored file


def test_the_file_holds_what_is_returned(prepare: Prepare, tmp_path: Path) -> None:
    sets = prepare(SENTENCE * 50, SENTENCE * 10)
    stored = load_file(tmp_path / "run" / "tokens.safetensors")
    assert torch.equal(stored["train"], sets.train_NT)
    assert torch.equal(stored["validation"], sets.validation_MT)


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever text is tokenised."""
    calls: list[int] = []

    def counted(*args: Any) -> torch.Tensor:
        calls.append(1)
        return tokenize(*args)

    monkeypatch.setattr(tokens, "tokenize", counted)
    return calls


def test_the_file_is_used_again_and_mapped(prepare: Prepare, tokenized: list[int]) -> None:
    first = prepare(SENTENCE * 50)
    second = prepare(SENTENCE * 50)
    assert len(tokenized) == 1
    assert torch.equal(first.train_NT, second.train_NT)
    assert first.fingerprint == second.fingerprint
    address = second.train_NT.data_ptr()
    mapped = [
        line.split()
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("/run/tokens.safetensors")
    ]
    ranges = [[int(end, 16) for end in fields[0].split("-")] for fields in mapped]
    assert any(start <= address < end for start, end in ranges)


@pytest.mark.parametrize(
    "change",
    [
        {"train": SENTENCE * 51},
        {"validation": SENTENCE * 11},
        {"validation": None},
        {"sequence_length": 8},
        {"eval_tokens": 32},
        {"vocab_size": VOCAB_SIZE + 1},
    ],
)
def test_any_change_of_the_request_makes_the_file_anew(
    prepare: Prepare, tokenized: list[int], change: dict[str, Any]
) -> None:
    request = {"train": SENTENCE * 50, "validation": SENTENCE * 10}
    prepare(**request)
    before = len(tokenized)
    prepare(**{**request, **change})
    assert len(tokenized) > before


def test_a_touched_source_makes_the_file_anew(prepare: Prepare, tokenized: list[int], tmp_path: Path) -> None:
    prepare(SENTENCE * 50)
    os.utime(tmp_path / "train.txt", ns=(1, 1))
    prepare(SENTENCE * 50)
    assert len(tokenized) == 2


def test_another_tokenizer_makes_the_file_anew(
    prepare: Prepare, tokenized: list[int], tokenizer: PreTrainedTokenizerFast
) -> None:
    prepare(SENTENCE * 50)
    tokenizer.add_tokens(["zebra"])
    prepare(SENTENCE * 50, vocab_size=VOCAB_SIZE)
    assert len(tokenized) == 2


def test_a_tokenizer_written_in_python_is_told_apart_by_its_vocabulary(tmp_path: Path, tokenized: list[int]) -> None:
    (tmp_path / "train.txt").write_text(SENTENCE * 50)
    data = DataConfig(train=[str(tmp_path / "train.txt")])
    config = RunConfig(base="base", output="run", data=data, sequence_length=16, eval_tokens=64)
    tokenizer, other = ByT5Tokenizer(extra_ids=0), ByT5Tokenizer(extra_ids=1)
    sets = [prepare_tokens(config, 20, 400, each, tmp_path) for each in (tokenizer, tokenizer, other)]
    assert len(tokenized) == 2
    assert count_text_bytes(sets[0].train_NT.flatten(), tokenizer) == sets[0].train_NT.numel()


def test_a_broken_file_is_made_anew(prepare: Prepare, tmp_path: Path) -> None:
    first = prepare(SENTENCE * 50)
    expected, file = first.train_NT.clone(), tmp_path / "run" / "tokens.safetensors"
    del first
    gc.collect()
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(prepare(SENTENCE * 50).train_NT, expected)


def test_the_fingerprint_tells_apart_text_and_shapes(prepare: Prepare) -> None:
    sets = [
        prepare(SENTENCE * 50),
        prepare(SENTENCE * 50, sequence_length=8, train_sequences=40, eval_tokens=32),
        prepare(SENTENCE.lower() * 50),
        prepare(SENTENCE * 50, SENTENCE * 10),
    ]
    assert all(re.fullmatch("[0-9a-f]{32}", each.fingerprint) for each in sets)
    assert len({each.fingerprint for each in sets}) == 4


# prepare_tokens: what is refused


def test_sources_without_text_are_refused(prepare: Prepare, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^data\.train: .*train\.txt holds no text\. Name files that do\.$"):
        prepare("\n")
    with pytest.raises(RequestError, match=r"^data\.validation: .*validation\.txt holds no text\."):
        prepare(SENTENCE * 50, "")
    assert not (tmp_path / "run" / "tokens.safetensors").exists()


def test_too_little_train_text_is_refused_with_the_numbers(
    prepare: Prepare, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(RequestError) as caught:
        prepare(text_of(tokenizer, 15), SENTENCE * 10)
    assert str(caught.value) == (
        "data.train holds 15 tokens, expected 16 at least: 1 × sequence_length. "
        "Give more text or set a smaller sequence_length."
    )
    with pytest.raises(RequestError) as caught:
        prepare(text_of(tokenizer, 31))
    assert str(caught.value) == (
        "data.train holds 31 tokens, expected 32 at least: 2 × sequence_length, one of them held out. "
        "Give more text or set a smaller sequence_length."
    )


def test_too_little_held_out_text_is_refused_with_the_numbers(
    prepare: Prepare, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(
        RequestError, match=r"^data\.validation holds 15 tokens, expected 16 at least: 1 × sequence_length\."
    ):
        prepare(SENTENCE * 10, text_of(tokenizer, 15))


def test_a_token_outside_the_vocabulary_is_refused(prepare: Prepare) -> None:
    largest = int(prepare(SENTENCE * 50).train_NT.max())
    prepare(SENTENCE * 50, vocab_size=largest + 1)
    with pytest.raises(RequestError) as caught:
        prepare(SENTENCE * 50, vocab_size=largest)
    assert str(caught.value) == (
        f"data.train: the tokenizer gives token {largest}, the model's vocabulary ends at {largest - 1}. "
        "Use the tokenizer that came with the base."
    )


def test_a_longer_run_keeps_its_sequences(prepare: Prepare, tokenized: list[int]) -> None:
    request = {"train": SENTENCE * 50, "validation": SENTENCE * 10}
    first = prepare(**request)
    before = len(tokenized)
    again = prepare(**request, train_sequences=19)
    assert len(tokenized) == before
    assert again.fingerprint == first.fingerprint
