"""The header of a run's token file, read without torch: whose ids it holds, and whether they begin alike."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from pcscale.common.errors import RequestError
from pcscale.run.token_file import TOKENS_NAME, read_token_file, sequences_fingerprint
from tests.data.conftest import SENTENCE, VOCAB_SIZE, Prepare

IDS = np.arange(24, dtype=np.int32).reshape(6, 4)


def _write(run: Path, train: np.ndarray = IDS, validation: np.ndarray = IDS[:2]) -> Path:
    run.mkdir()
    save_file({"train": train, "validation": validation}, run / TOKENS_NAME, {"tokenizer": "f00d"})
    return run


def test_it_is_read_as_prepared(prepare: Prepare, tmp_path: Path) -> None:
    sets = prepare(SENTENCE * 50, SENTENCE * 10)
    file = read_token_file(tmp_path / "run")
    assert file.train.shape == tuple(sets.train_NT.shape)
    assert file.validation.shape == tuple(sets.validation_MT.shape)
    assert file.sequence_length == 16


def test_the_tokenizer_stays_the_same_with_other_text_and_changes_with_its_vocabulary(
    prepare: Prepare, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def found() -> str:
        return read_token_file(tmp_path / "run").tokenizer

    prepare(SENTENCE * 50)
    first = found()
    prepare(SENTENCE.lower() * 60, sequence_length=8)
    assert found() == first
    tokenizer.add_tokens(["zebra"])
    prepare(SENTENCE * 50, vocab_size=VOCAB_SIZE + 1)
    changed = found()
    assert changed != first
    tokenizer.eos_token = "zebra"
    prepare(SENTENCE * 50, vocab_size=VOCAB_SIZE + 1)
    assert found() not in (first, changed)


@pytest.mark.parametrize("count", range(7))
def test_fingerprints_tell_first_sequences_apart_and_nothing_after_them_counts(count: int, tmp_path: Path) -> None:
    changed = IDS.copy()
    changed[3, 2] = 99
    one, other = (read_token_file(_write(tmp_path / name, ids)) for name, ids in (("a", IDS), ("b", changed)))
    alike = sequences_fingerprint(one.train, count) == sequences_fingerprint(other.train, count)
    assert alike == (count <= 3)


@pytest.mark.parametrize(
    "tensors", [{"train": IDS}, {"validation": IDS}, {"train": IDS, "validation": IDS[0]}, {"weights": IDS}]
)
def test_a_file_without_both_sets_of_sequences_is_refused(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / TOKENS_NAME, {"tokenizer": "f00d"})
    with pytest.raises(RequestError, match=r"does not hold the sequences train and validation\. Restore the file\.$"):
        read_token_file(tmp_path)


def test_a_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    file = _write(tmp_path / "run") / TOKENS_NAME
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(RequestError, match=r"tokens\.safetensors is truncated: "):
        read_token_file(tmp_path / "run")


def test_a_file_that_does_not_say_its_tokenizer_is_refused(tmp_path: Path) -> None:
    save_file({"train": IDS, "validation": IDS}, tmp_path / TOKENS_NAME, {"key": "f00d"})
    with pytest.raises(RequestError, match=r"does not say which tokenizer made it\. Restore the file\.$"):
        read_token_file(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"), [(None, r"does not say which tokenizer made it"), (3, "not a safete")]
)
def test_a_header_without_metadata_is_refused(metadata: object, message: str, tmp_path: Path) -> None:
    file = _write(tmp_path / "run") / TOKENS_NAME
    length, data = int.from_bytes(file.read_bytes()[:8], "little"), file.read_bytes()[8:]
    header = json.dumps(json.loads(data[:length]) | {"__metadata__": metadata}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[length:])
    with pytest.raises(RequestError, match=message):
        read_token_file(tmp_path / "run")


def test_torch_is_not_imported() -> None:
    program = "import sys; from pcscale.reporting.compare import write_comparison; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
