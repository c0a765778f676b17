"""`pcscale teach`: what it keeps is what the stock base says, once, whatever stops it; a folder of another base is not
touched."""

import functools
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from transformers import AutoModelForCausalLM, AutoTokenizer

from pcscale.base.mapped import MappedBase
from pcscale.jobs import teach as module
from pcscale.training.teacher_cache import write_shard
from tests.children import Prepare, kill_itself, start, wait
from tests.jobs.teaching import (
    SHARD_SEQUENCES,
    TAUGHT,
    TEMPERATURE,
    TOP_K,
    shards,
    small_shards,
    teach,
    teach_arguments,
)
from tests.jobs.together import DiskUsage
from tests.runs import World, invoke, leftovers, refusal, run_values, snapshot, write_yaml
from tests.tiny import build_base, write_text

HALF_PRECISION = 2**-11
"""The relative error of a logarithm in float16."""


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four shards, made without a stop. Read only; copy it to change it."""
    folder = tmp_path_factory.mktemp("whole") / "taught"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARD_TOKENS", SHARD_SEQUENCES * 24)
        teach(world, folder)
    return folder


@pytest.fixture
def taught(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "taught"))


@pytest.fixture
def in_small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_TOKENS", SHARD_SEQUENCES * 24)


def sequences(world: World, count: int = 40) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    ids = tokenizer(world.text.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: count * 24]).view(count, 24)


def keys(folder: Path) -> list[str]:
    return [bytes(key.tolist()).hex() for shard in shards(folder) for key in shard["keys"]]


# What it keeps


def test_it_keeps_what_the_stock_base_says_of_every_sequence(world: World, whole: Path) -> None:
    ids_NT = sequences(world)
    assert [len(shard["keys"]) for shard in shards(whole)] == [12, 12, 12, 4]
    assert keys(whole) == [xxhash.xxh3_128_hexdigest(ids_T.int().numpy().tobytes()) for ids_T in ids_NT]
    with torch.no_grad():
        logits_NTV = AutoModelForCausalLM.from_pretrained(world.base)(ids_NT).logits.double()
    expected = (logits_NTV / TEMPERATURE).log_softmax(-1).topk(TOP_K)
    top_NTk, log_p_NTk = (torch.cat([shard[name] for shard in shards(whole)]) for name in ("ids", "log_probabilities"))
    assert (top_NTk.dtype, log_p_NTk.dtype) == (torch.uint16, torch.float16)
    assert torch.equal(top_NTk.long(), expected.indices)
    torch.testing.assert_close(log_p_NTk.double(), expected.values, rtol=HALF_PRECISION, atol=1e-5)


def test_ids_of_a_large_vocabulary_take_four_bytes_and_what_is_hardly_possible_stays_finite(tmp_path: Path) -> None:
    top_BTk, log_p_BTk = torch.tensor([[[69_999, 1]]], dtype=torch.int32), torch.tensor([[[0.0, -1e6]]])
    write_shard(tmp_path / "shard.safetensors", torch.tensor([[5]]), [(top_BTk, log_p_BTk)], vocab_size=70_000)
    (shard,) = shards(tmp_path)
    assert torch.equal(shard["ids"], top_BTk)
    assert shard["log_probabilities"].tolist() == [[[0.0, -65504.0]]]


def test_each_weight_is_read_once_a_shard(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    read = MappedBase.tensor

    def counted(self: MappedBase, name: str) -> torch.Tensor:
        reads[name] += 1
        return read(self, name)

    monkeypatch.setattr(MappedBase, "tensor", counted)
    teach(world, tmp_path / "one")
    once = dict(reads)
    monkeypatch.setattr(module, "SHARD_TOKENS", SHARD_SEQUENCES * 24)
    teach(world, tmp_path / "four")
    # Tied: looked up by tokens, and multiplied as the head.
    assert once.pop("model.embed_tokens.weight") == 2
    assert set(once.values()) == {1}
    assert {name: reads[name] for name in once} == dict.fromkeys(once, 1 + 4)


def test_a_sequence_that_comes_again_is_kept_once(world: World, tmp_path: Path) -> None:
    (tmp_path / "same.txt").write_text("the clock " * 3000)
    again = World(world.base, tmp_path / "same.txt")
    done = teach(again, tmp_path / "taught")
    assert done["sequences"] == len(set(keys(tmp_path / "taught"))) < 40


def test_a_run_s_settings_do_as_well_as_flags(world: World, whole: Path, tmp_path: Path, in_small_shards: None) -> None:
    distill = {**TAUGHT, "cache": str(tmp_path / "taught")}
    yaml = write_yaml(tmp_path / "run.yaml", run_values(world, tmp_path / "run", distill=distill, max_steps=5))
    outcome = invoke("teach", yaml, "max_steps=10")
    assert outcome.exit_code == 0
    assert snapshot(tmp_path / "taught") == snapshot(whole)
    size = sum(path.stat().st_size for path in whole.glob("*.safetensors"))
    assert outcome.stdout == (
        f"{tmp_path / 'taught'}: 40 sequences (40 new), 960 tokens, {size / 1024:.1f} KiB, {size / 960:.1f} bytes a "
        "token\n"
    )
    assert not (tmp_path / "run").exists()


# What stops it


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_a_signal_finished_shards_stay_and_the_same_command_goes_on_to_identical_files(
    number: signal.Signals, world: World, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls, write = tmp_path / "taught", 0, module.write_shard
    monkeypatch.setattr(module, "SHARD_TOKENS", SHARD_SEQUENCES * 24)

    def signalled(*arguments: Any) -> str:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), number)
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", signalled)
        said = refusal(*teach_arguments(world, folder), exit_code=130)
    assert said == "interrupted with 24 of 40 sequences done, which stay. Go on with the same command."
    assert snapshot(folder).items() > {name: snapshot(whole)[name] for name in sorted(snapshot(folder))[:2]}.items()
    assert teach(world, folder)["added"] == 16
    assert snapshot(folder) == snapshot(whole)


def prepared(target: str, call: int) -> Prepare:
    return functools.partial(_prepare, kill_itself(target, call))


def _prepare(kill: Prepare) -> None:
    small_shards()
    kill()


@pytest.mark.parametrize(
    ("target", "call"),
    [
        ("pcscale.jobs.teach:write_shard", 1),
        ("pcscale.jobs.teach:write_shard", 3),
        ("pcscale.storage.writer:publish", 2),
        ("pcscale.common.files:publish", 1),
        ("pcscale.common.files:publish", 2),
        ("pcscale.common.files:publish", 3),
    ],
    ids=[
        "before a shard",
        "before a later one",
        "before a shard is visible",
        "before a manifest is",
        "before one with the first shard is",
        "before one with the second shard is",
    ],
)
def test_after_a_kill_the_same_command_goes_on_to_identical_files(
    target: str, call: int, world: World, whole: Path, tmp_path: Path, in_small_shards: None
) -> None:
    folder = tmp_path / "taught"
    process = start(teach_arguments(world, folder), tmp_path / "log", prepared(target, call))
    assert wait(process) == -signal.SIGKILL, (tmp_path / "log").read_text()
    teach(world, folder)
    assert snapshot(folder) == snapshot(whole)
    assert leftovers(folder) == []


def test_a_finished_folder_is_not_touched(world: World, taught: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in taught.iterdir()}
    outcome = invoke(*teach_arguments(world, taught))
    assert outcome.exit_code == 0
    assert f"{taught} is complete: it holds all 40 sequences" in outcome.stderr
    assert {path: path.stat().st_mtime_ns for path in taught.iterdir()} == before


def test_more_text_of_the_same_base_is_added(world: World, taught: Path) -> None:
    before = snapshot(taught)
    done = teach(world, taught, "--tokens", str(60 * 24))
    assert (done["sequences"], done["added"], done["tokens"]) == (60, 20, 1440)
    assert all(snapshot(taught)[name] == found for name, found in before.items() if name != "teacher.json")
    assert len(set(keys(taught))) == 60


def test_a_shard_that_was_removed_is_made_again(world: World, whole: Path, taught: Path, in_small_shards: None) -> None:
    (taught / "shard-00001.safetensors").unlink()
    assert teach(world, taught)["added"] == SHARD_SEQUENCES
    after, before = (
        snapshot(folder) | {"teacher.json": json.loads((folder / "teacher.json").read_text())}
        for folder in (taught, whole)
    )
    assert after == before


@pytest.mark.usefixtures("no_plots")
def test_a_shard_that_was_removed_is_not_missed_by_runs_on_other_text(
    world: World, taught: Path, tmp_path: Path
) -> None:
    other = World(world.base, write_text(tmp_path / "other.txt", num_words=3000, seed=2))
    teach(other, taught)
    (taught / "shard-00001.safetensors").unlink()
    assert teach(other, taught)["added"] == 0
    distill = {**TAUGHT, "cache": str(taught)}
    yaml = write_yaml(tmp_path / "run.yaml", run_values(other, tmp_path / "run", distill=distill))
    assert invoke("compress", yaml).exit_code == 0


# What it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--top-k", "9"], "distill.top_k is 9, {folder} was made with 8. Set that, or name another folder."),
        (["--temperature", "2"], "distill.temperature is 2.0, {folder} was made with 1.5. Set that, or name another "),
        (["--sequence-length", "16"], "sequence_length is 16, {folder} was made with 24. Set that, or name another "),
        (["--top-k", "301"], "distill.top_k is 301, the base knows 300 tokens. Set at most that."),
        (["--top-k", "0"], "teach: distill.top_k is 0: input should be greater than 0."),
        (["distill.cach=x"], "teach: distill.cach is not a setting. Did you mean 'distill.cache'?"),
        (["distill=3"], "teach: distill is 3: "),
    ],
)
def test_a_folder_that_was_made_in_another_way_is_not_touched(
    changes: list[str], message: str, world: World, taught: Path
) -> None:
    before = snapshot(taught)
    assert refusal(*teach_arguments(world, taught), *changes).startswith(message.format(folder=taught))
    assert snapshot(taught) == before


def test_a_folder_that_was_made_in_another_dtype_is_not_touched(world: World, taught: Path) -> None:
    path = taught / "teacher.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    before = snapshot(taught)
    assert refusal(*teach_arguments(world, taught)) == (
        f"the dtype that the base runs in (bfloat16 by bf16=true on a GPU) is float32, {taught} was made with "
        "bfloat16. Set that, or name another folder."
    )
    assert snapshot(taught) == before


def test_a_folder_of_another_base_is_not_touched(world: World, taught: Path, tmp_path: Path) -> None:
    before = snapshot(taught)
    other = World(build_base(tmp_path / "other", tokenizer=True, seed=5), world.text)
    assert refusal(*teach_arguments(other, taught)).startswith(
        f"{other.base / 'model.safetensors'}: model.embed_tokens.weight is not the weight that {taught} was made from "
    )
    config = other.base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    assert refusal(*teach_arguments(other, taught)) == (
        f"{taught} was made from {world.base}, whose config.json is not that of {other.base}. "
        "Use the same base and revision, or name another folder."
    )
    assert snapshot(taught) == before


def test_a_shard_with_a_flipped_bit_is_refused(world: World, taught: Path) -> None:
    path = taught / "shard-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert refusal(*teach_arguments(world, taught)) == (
        f"{path} is not what was written (its fingerprint differs). Remove it and run the same command again."
    )


def test_an_output_that_holds_something_else_is_not_touched(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    assert refusal(*teach_arguments(world, folder)) == (
        f"{folder} holds thesis.txt and no teacher.json. Name a new folder."
    )
    assert refusal(*teach_arguments(world, folder / "thesis.txt")) == (
        f"{folder / 'thesis.txt'} is a file. Name a folder."
    )
    assert snapshot(folder).keys() == {"thesis.txt"}


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**12, 0, 2**14))
    folder = tmp_path / "taught"
    said = refusal(*teach_arguments(world, folder), exit_code=3)
    assert said.startswith(f"{folder} needs 30.0 KiB for 40 sequences, there is 16.0 KiB (disk of ")
    assert said.endswith("Free some, set a smaller top_k, or give fewer --tokens.")
    assert not folder.exists()


def test_without_text_or_a_folder_there_is_nothing_to_do(world: World, tmp_path: Path) -> None:
    assert refusal("teach", world.base, "--output", tmp_path / "taught") == (
        f"{world.base} is taken for a base, whose text is not known: give --data, or name a run.yaml."
    )
    no_folder = "no folder to fill: give --output, or set distill.cache in run.yaml."
    assert refusal("teach", world.base, "--data", world.text) == no_folder
    yaml = write_yaml(tmp_path / "run.yaml", run_values(world, tmp_path / "run", distill=TAUGHT))
    assert refusal("teach", yaml) == no_folder
    yaml = write_yaml(tmp_path / "run.yaml", run_values(world, tmp_path / "run", distill=None))
    assert refusal("teach", yaml) == no_folder
    missing = tmp_path / "none.yaml"
    assert refusal("teach", missing, "--output", "x") == f"{missing} does not exist. Name a run.yaml."
    none = tmp_path / "none.txt"
    assert refusal(*teach_arguments(World(world.base, none), tmp_path / "taught")).startswith(f"{none} does not exist.")
    assert not (tmp_path / "taught").exists()
