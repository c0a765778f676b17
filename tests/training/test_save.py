"""A checkpoint on disk: only what was trained, every byte of it, whole or absent."""

import ctypes
import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

from pcscale.common import files
from pcscale.common.errors import RunError
from pcscale.projection import checkpoint as state
from pcscale.projection.checkpoint import read_state, save_state
from pcscale.projection.layout import trainable_values
from pcscale.run.manifest import Manifest
from tests.merging.trained import (
    BASE_NAME,
    FFN,
    HIDDEN,
    REPOSITORY,
    STEPS,
    TrainedRun,
    file_bytes,
    train_and_save,
)
from tests.tiny import CASES, build_base

METHODS = ("projected", "hard_prune")
VALUE_BYTES = 3 * 4
"""A float32 value and its two moments."""
DEADLINE_SECONDS = 60

ENDLESS_REPLACING = """
import itertools, sys
from pathlib import Path
from pcscale.common.files import published_folder

path = Path(sys.argv[1])
for number in itertools.count():
    with published_folder(path) as temporary:
        for name in ("a", "b", "c"):
            (temporary / name).write_text(str(number))
"""


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    folder = tmp_path_factory.mktemp("run")
    return train_and_save(build_base(folder / "base", "qwen2", tied=False), folder / "step-00000003", request.param)


def _save_again(run: TrainedRun, folder: Path, **changes: Any) -> None:
    save_state(folder, STEPS, run.optimizer, **changes)


def _tensor_files(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.safetensors"))}


def _header_bytes(path: Path) -> int:
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "tied"), CASES)
def test_a_checkpoint_holds_three_values_for_each_trained_one_and_the_kept_indices(
    family: str, tied: bool, method: str, tmp_path: Path
) -> None:
    run = train_and_save(build_base(tmp_path / "base", family, tied), tmp_path / "step", method)
    paths = _tensor_files(run.checkpoint).values()
    data_bytes = sum(path.stat().st_size - _header_bytes(path) for path in paths)
    trained = (
        sum(map(trainable_values, run.plan.weights))
        if method == "projected"
        else sum(p.numel() for p in run.model.parameters())
    )
    kept_bytes = 8 * (HIDDEN + 2 * FFN)  # one set for the residual stream, one for each layer's ffn
    assert data_bytes == VALUE_BYTES * trained + kept_bytes + 8  # and the number of updates


def test_no_base_weight_is_in_a_checkpoint(run: TrainedRun) -> None:
    base_shapes = {(planned.name, planned.base_shape) for planned in run.plan.weights if planned.is_matrix}
    for name, path in _tensor_files(run.checkpoint).items():
        for tensor in load_file(path).values():
            assert (Path(name).name.removesuffix(".safetensors"), tuple(tensor.shape)) not in base_shapes


def test_only_safetensors_and_json_are_written(run: TrainedRun) -> None:
    assert {path.suffix for path in run.checkpoint.rglob("*") if path.is_file()} == {".safetensors", ".json"}


def test_every_matrix_of_the_projected_form_has_a_record_of_its_own(run: TrainedRun) -> None:
    records = {name for name in _tensor_files(run.checkpoint) if name.startswith("records/")}
    matrices = {f"records/{planned.name}.safetensors" for planned in run.plan.matrices}
    assert records == (matrices if run.optimizer.project else set())


def test_the_files_hold_what_the_optimizer_holds(run: TrainedRun) -> None:
    for name, record in run.optimizer.records.items():
        with safe_open(run.checkpoint / "records" / f"{name}.safetensors", framework="pt") as handle:
            assert set(handle.keys()) == {
                part + moment for part in record.parts for moment in ("", ".exp_avg", ".exp_avg_sq")
            }
            for part, trained in record.parts.items():
                assert torch.equal(handle.get_tensor(part), trained.value)
                assert torch.equal(handle.get_tensor(f"{part}.exp_avg"), trained.exp_avg)
                assert torch.equal(handle.get_tensor(f"{part}.exp_avg_sq"), trained.exp_avg_sq)
                assert trained.exp_avg_sq.max() > 0
    outer = load_file(run.checkpoint / "outer.safetensors")
    for name, trained in run.optimizer.direct.items():
        assert torch.equal(outer[f"direct.{name}"], trained.value)
    for name, indices in run.optimizer.fixed.items():
        assert torch.equal(outer[f"kept.{name}"], indices)


def test_the_manifest_binds_every_file_and_every_base_weight(run: TrainedRun) -> None:
    manifest = json.loads((run.checkpoint / "manifest.json").read_text())
    found = {name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for name, path in _tensor_files(run.checkpoint).items()}
    assert manifest["files"] == found
    base = load_file(run.base_folder / "model.safetensors")
    hashes = {name: xxhash.xxh3_128_hexdigest(tensor.numpy().tobytes()) for name, tensor in base.items()}
    assert manifest["base_fingerprints"] == hashes
    assert manifest["base_config"] == json.loads((run.base_folder / "config.json").read_text())
    expected = {"step": STEPS, "base_name": BASE_NAME, "base_revision": None}
    expected |= {"hidden_size": HIDDEN, "intermediate_size": FFN}
    expected |= {"method": "projected" if run.optimizer.project else "hard_prune"}
    assert {key: manifest[key] for key in expected} == expected


def test_saving_the_same_state_again_gives_the_same_bytes(run: TrainedRun, tmp_path: Path) -> None:
    _save_again(run, tmp_path / "again")
    assert file_bytes(tmp_path / "again") == file_bytes(run.checkpoint)


def test_a_read_state_is_the_one_that_was_written(run: TrainedRun, tmp_path: Path) -> None:
    other = train_and_save(run.base_folder, tmp_path / "other", Manifest.read(run.checkpoint).method, seed=1)
    assert any(not torch.equal(indices, run.optimizer.fixed[name]) for name, indices in other.optimizer.fixed.items())
    before = {name: weight.clone() for name, weight in other.weights.items()}
    read_state(other.optimizer, run.checkpoint, Manifest.read(run.checkpoint))
    for name, weight in run.weights.items():
        assert torch.equal(other.weights[name], weight), name
        assert not torch.equal(before[name], weight), name


@pytest.mark.parametrize("part", ["write_records", "write_outer"])
@pytest.mark.parametrize("old", [True, False], ids=["over an old one", "where there was none"])
def test_a_disk_that_fills_up_leaves_the_old_checkpoint_or_none(
    old: bool, part: str, run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = getattr(state, part)

    def full(*arguments: Any) -> None:
        write(*arguments)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if old:
        _save_again(run, tmp_path / "step", trainer={"old": True})
    before = file_bytes(tmp_path)
    monkeypatch.setattr(state, part, full)
    with pytest.raises(RunError, match=r"step: the disk is full\. Nothing was replaced; free space and run again\."):
        _save_again(run, tmp_path / "step", trainer={"old": False})
    assert file_bytes(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["step"] if old else [])


def test_a_checkpoint_that_stands_already_is_replaced_whole(run: TrainedRun, tmp_path: Path) -> None:
    _save_again(run, tmp_path / "step", trainer={"old": True})
    (tmp_path / "step" / "left over").write_text("of another version")
    _save_again(run, tmp_path / "step")
    assert file_bytes(tmp_path / "step") == file_bytes(run.checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_a_folder_is_replaced_where_names_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "old").write_text("old")
    with files.published_folder(tmp_path / "step") as temporary:
        (temporary / "new").write_text("new")
    assert file_bytes(tmp_path) == {"step/new": b"new"}


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "renameat2"), reason="names are exchanged on Linux alone")
def test_a_process_killed_while_it_replaces_a_folder_leaves_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "step"
    process = subprocess.Popen([sys.executable, "-c", ENDLESS_REPLACING, str(path)], cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not path.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # The name never goes away, however often it is looked at while folders are replaced.
        assert all(path.exists() for _ in range(100_000))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    contents = {name: (path / name).read_text() for name in ("a", "b", "c")}
    assert len(set(contents.values())) == 1
    assert int(contents["a"]) > 0
