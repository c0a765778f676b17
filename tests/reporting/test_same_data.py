"""Which runs are over the same data: text of another length is, as far as it goes; anything else is refused."""

from pathlib import Path

import numpy as np
import pytest

from pcscale.common.errors import RequestError
from pcscale.reporting.compare import compare_runs
from tests.reporting.compared_runs import FIRST, LENGTH, TRAIN_NT, VALIDATION_MT, write_compared, write_tokens


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [write_compared(tmp_path / "first"), write_compared(tmp_path / "second")]


def _refusal(runs: list[Path]) -> str:
    with pytest.raises(RequestError) as caught:
        compare_runs(runs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _changed(ids: np.ndarray) -> np.ndarray:
    changed = ids.copy()
    changed[-1, -1] += 1
    return changed


def test_training_text_that_begins_alike_is_the_same_text_in_any_order_of_runs(pair: list[Path]) -> None:
    longer = np.concatenate([TRAIN_NT, TRAIN_NT[:7] + 1])
    write_tokens(pair[1], train=longer)
    write_tokens(pair[0], train=TRAIN_NT[:60])
    third = write_compared(pair[0].parent / "third")
    for runs in ([*pair, third], [third, *pair], [pair[1], third, pair[0]]):
        assert len(compare_runs(runs)["runs"]) == 3


@pytest.mark.parametrize("train", [_changed(TRAIN_NT), _changed(TRAIN_NT[:60]), TRAIN_NT[1:]])
def test_other_training_text_is_refused(train: np.ndarray, pair: list[Path]) -> None:
    write_tokens(pair[1], train=train)
    assert _refusal(pair) == (
        f"{pair[0]} and {pair[1]} were trained on different text. Compare runs with one data.train."
    )


def test_runs_that_both_begin_like_a_third_are_still_compared_with_the_longest(pair: list[Path]) -> None:
    write_tokens(pair[0], train=TRAIN_NT[:60])
    third = write_compared(pair[0].parent / "third")
    write_tokens(third, train=_changed(TRAIN_NT[:65]))
    assert _refusal([*pair, third]).startswith(f"{pair[1]} and {third} were trained on different text.")


def test_a_run_that_repeated_its_text_where_another_had_more_is_refused(pair: list[Path]) -> None:
    count = FIRST[-1][0] // LENGTH
    longer = np.concatenate([TRAIN_NT, TRAIN_NT])
    write_tokens(pair[1], train=longer)
    write_tokens(pair[0], train=longer[:count])
    compare_runs(pair)
    write_tokens(pair[0], train=longer[: count - 1])
    assert _refusal(pair) == (
        f"{pair[0]} repeated its 392 tokens of training text, {pair[1]} had 1,120, so they were trained on different "
        "text. Compare runs with one data.train."
    )
    write_tokens(pair[1], train=longer[: count - 1])
    compare_runs(pair)


def test_other_held_out_text_of_the_same_size_is_refused(pair: list[Path]) -> None:
    write_tokens(pair[1], validation=_changed(VALIDATION_MT))
    assert _refusal(pair) == (
        f"{pair[0]} and {pair[1]} hold out different text, of 32 and 32 tokens. Compare runs with one data.validation "
        "and one eval_tokens: without data.validation the end of what is trained on is held out, which depends on "
        "max_steps."
    )


def test_another_size_of_held_out_text_is_refused(pair: list[Path]) -> None:
    write_tokens(pair[1], validation=VALIDATION_MT[:2])
    assert _refusal(pair).startswith(f"{pair[0]} and {pair[1]} hold out different text, of 32 and 16 tokens. Compare ")


def test_another_sequence_length_is_refused(pair: list[Path]) -> None:
    write_tokens(pair[1], TRAIN_NT.reshape(140, 4), VALIDATION_MT.reshape(8, 4))
    assert _refusal(pair) == (
        f"{pair[0]} and {pair[1]} have sequences of 8 and 4 tokens, so their held-out losses are over different "
        "contexts. Compare runs with one sequence_length."
    )


def test_another_tokenizer_is_refused_whatever_its_ids(pair: list[Path]) -> None:
    write_tokens(pair[1], tokenizer="beef")
    assert _refusal(pair) == (
        f"{pair[0]} and {pair[1]} have different tokenizers, so a token of one is not a token of the other. "
        "Compare runs with one tokenizer."
    )


def test_a_run_whose_tokenizer_is_unknown_is_refused(pair: list[Path]) -> None:
    write_tokens(pair[0], tokenizer=None)
    assert _refusal(pair) == (
        f"{pair[0] / 'tokens.safetensors'} does not say which tokenizer made it. Restore the file."
    )


def test_a_run_without_its_tokens_is_refused(pair: list[Path]) -> None:
    (pair[1] / "tokens.safetensors").unlink()
    assert _refusal(pair) == f"{pair[1] / 'tokens.safetensors'} is missing. Fetch or copy it again."
