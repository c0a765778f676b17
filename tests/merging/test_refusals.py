"""What a merge refuses, in words, and that nothing half-written looks whole afterwards."""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pcscale.common.errors import PcscaleError, RequestError, RunError
from pcscale.merging import merge as merging
from tests.merging.trained import Train, TrainedRun, file_bytes, merge_run, visible
from tests.tiny import build_base


@pytest.fixture
def mine(run: TrainedRun, tmp_path: Path) -> TrainedRun:
    """A base and a checkpoint that the test may break."""
    return run.copy(tmp_path / "mine")


def _refused(run: TrainedRun, output: Path, error: type[PcscaleError], message: str, **changes: Any) -> None:
    """The merge raises, nothing of it can be seen, and base and checkpoint are as they were."""
    before = file_bytes(run.base_folder), file_bytes(run.checkpoint)
    with pytest.raises(error, match=message):
        merge_run(run, output, **changes)
    assert not output.exists()
    assert visible(output.parent) in ([], ["mine"])
    assert (file_bytes(run.base_folder), file_bytes(run.checkpoint)) == before


def _flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_an_output_that_holds_something_is_left_alone(run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious.txt").write_text("weeks of work")
    with pytest.raises(RequestError, match=r"merged already holds precious\.txt\. Name a new folder or empty it\."):
        merge_run(run, tmp_path / "merged")
    assert file_bytes(tmp_path) == {"merged/precious.txt": b"weeks of work"}


def test_an_empty_output_is_used(run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    merge_run(run, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_an_output_that_is_to_be_replaced_is_replaced_whole(run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "model-00009-of-00009.safetensors").write_text("of an earlier merge")
    merge_run(run, tmp_path / "merged", replace=True)
    merge_run(run, tmp_path / "expected")
    assert file_bytes(tmp_path / "merged") == file_bytes(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "merged"]


def test_an_output_that_is_to_be_replaced_stays_when_the_merge_fails(mine: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "old.txt").write_text("old")
    _flip_last_byte(mine.checkpoint / "records" / "model.layers.1.mlp.up_proj.weight.safetensors")
    with pytest.raises(RequestError, match="is not what was written"):
        merge_run(mine, tmp_path / "merged", replace=True)
    assert file_bytes(tmp_path / "merged") == {"old.txt": b"old"}


def test_an_output_through_a_link_is_written_where_it_points(run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "merged").symlink_to(tmp_path / "disk" / "empty")
    merge_run(run, tmp_path / "merged")
    assert (tmp_path / "merged").is_symlink()
    assert (tmp_path / "disk" / "empty" / "model.safetensors").exists()


def test_the_folder_one_stands_in_may_be_the_output(
    run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "merged").mkdir()
    monkeypatch.chdir(tmp_path / "merged")
    merge_run(run, Path())
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_an_output_that_is_a_file_is_left_alone(run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "merged").write_text("a report")
    with pytest.raises(RequestError, match=r"merged is a file\. Name a new folder\."):
        merge_run(run, tmp_path / "merged")
    assert file_bytes(tmp_path) == {"merged": b"a report"}


def test_an_output_below_a_file_is_refused(run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "report").write_text("a report")
    with pytest.raises(RequestError, match=r"merged: a part of this path is a file\. Name a new folder\."):
        merge_run(run, tmp_path / "report" / "merged")
    assert file_bytes(tmp_path) == {"report": b"a report"}


def test_a_folder_without_a_manifest_is_no_checkpoint(mine: TrainedRun, tmp_path: Path) -> None:
    (mine.checkpoint / "manifest.json").unlink()
    message = r"step-00000003 is not a checkpoint: it has no manifest\.json\. Name a step-… folder of a run\."
    _refused(mine, tmp_path / "merged", RequestError, message)


@pytest.mark.parametrize("version", [0, 4, "1", "3", None])
def test_a_manifest_of_another_format_is_refused(version: object, mine: TrainedRun, tmp_path: Path) -> None:
    mine.change_manifest(format_version=version)
    message = rf"step-00000003 has checkpoint format {version!r}, this version reads 3\."
    _refused(mine, tmp_path / "merged", RequestError, message)


@pytest.mark.parametrize("content", ["", "{", "\x00"])
def test_a_manifest_that_is_no_json_is_refused(content: str, mine: TrainedRun, tmp_path: Path) -> None:
    (mine.checkpoint / "manifest.json").write_text(content)
    _refused(mine, tmp_path / "merged", RequestError, r"manifest\.json is not JSON \(.+\)\. Restore the file\.")


@pytest.mark.parametrize("key", ["step", "method", "base_config", "base_fingerprints", "hidden_size", "files"])
def test_a_manifest_without_a_key_is_refused(key: str, mine: TrainedRun, tmp_path: Path) -> None:
    path = mine.checkpoint / "manifest.json"
    values = json.loads(path.read_text())
    del values[key]
    path.write_text(json.dumps(values))
    message = rf"manifest\.json has no '{key}'\. The file was changed\."
    _refused(mine, tmp_path / "merged", RequestError, message)


@pytest.mark.parametrize("name", ["outer.safetensors", "records/model.layers.1.mlp.up_proj.weight.safetensors"])
def test_a_missing_file_of_the_checkpoint_is_named(name: str, mine: TrainedRun, tmp_path: Path) -> None:
    (mine.checkpoint / name).unlink()
    message = rf"{name} is missing from the checkpoint\. Use another checkpoint\."
    _refused(mine, tmp_path / "merged", RequestError, message)


@pytest.mark.parametrize("name", ["outer.safetensors", "records/model.layers.1.mlp.up_proj.weight.safetensors"])
def test_a_file_with_a_flipped_byte_is_named(name: str, mine: TrainedRun, tmp_path: Path) -> None:
    _flip_last_byte(mine.checkpoint / name)
    message = rf"{name} is not what was written \(its fingerprint differs\)\. Use another checkpoint\."
    _refused(mine, tmp_path / "merged", RequestError, message)


def test_another_bases_weight_is_named(mine: TrainedRun, tmp_path: Path) -> None:
    path, name = mine.base_folder / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(path)
    tensors[name][3, 5] += 1e-3
    save_file(tensors, path, {"format": "pt"})
    message = (
        rf"model\.safetensors: {name} is not the weight this checkpoint was trained on "
        r"\(fingerprint [0-9a-f]{12}…, expected [0-9a-f]{12}…\)\. Use the same base and revision\."
    )
    _refused(mine, tmp_path / "merged", RequestError, message)


def test_another_norm_of_the_base_is_refused_although_no_product_reads_it(mine: TrainedRun, tmp_path: Path) -> None:
    path, name = mine.base_folder / "model.safetensors", "model.norm.weight"
    tensors = load_file(path)
    tensors[name][3] += 1e-3
    save_file(tensors, path, {"format": "pt"})
    _refused(mine, tmp_path / "merged", RequestError, rf"{name} is not the weight this checkpoint was trained on")


def test_the_control_arm_too_is_bound_to_its_base(trained: Train, tmp_path: Path) -> None:
    mine = trained("llama", True, "hard_prune").copy(tmp_path / "mine")
    build_base(mine.base_folder, "llama", tied=True, seed=1)
    _refused(mine, tmp_path / "merged", RequestError, "is not the weight this checkpoint was trained on")


def test_another_config_is_refused(mine: TrainedRun, tmp_path: Path) -> None:
    config = json.loads((mine.base_folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 12345.0
    (mine.base_folder / "config.json").write_text(json.dumps(config))
    message = r"config\.json is not the config this checkpoint was trained on\. Use the base acme/tiny\."
    _refused(mine, tmp_path / "merged", RequestError, message)


@pytest.mark.parametrize(
    ("kept_bytes", "message"),
    [(-1, r"is truncated: \d+ bytes, its header says \d+"), (20, "truncated inside its header")],
)
def test_a_truncated_shard_of_the_base_is_refused(
    kept_bytes: int, message: str, mine: TrainedRun, tmp_path: Path
) -> None:
    shard = mine.base_folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept_bytes])
    _refused(mine, tmp_path / "merged", RequestError, rf"model\.safetensors .*{message}")


def test_an_unknown_dtype_is_refused_with_the_known_ones(run: TrainedRun, tmp_path: Path) -> None:
    message = r"dtype int8 is not known\. Use one of float32, bfloat16, float16\."
    _refused(run, tmp_path / "merged", RequestError, message, dtype="int8")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_said_before_the_first_byte(
    run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(weight.nbytes for weight in run.weights.values())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - needed + 1, needed - 1))
    message = rf"merged: the disk has {needed / 1024:.1f} KiB free, the merged model takes {needed / 1024:.1f} KiB\."
    _refused(run, tmp_path / "merged", RunError, message)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - needed, needed))
    merge_run(run, tmp_path / "merged")


def test_finished_shards_count_when_the_space_for_the_rest_is_checked(
    run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard = merging._write_shard

    def fail_at_the_last(source: Any, path: Path, *others: Any) -> None:
        if "00003" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_shard(source, path, *others)

    with monkeypatch.context() as patch:
        patch.setattr(merging, "_write_shard", fail_at_the_last)
        with pytest.raises(RunError, match="merged: the disk is full"):
            merge_run(run, tmp_path / "merged", max_shard_bytes=40_000)
    rest = sum(weight.nbytes for weight in run.weights.values()) - sum(
        path.stat().st_size for path in (tmp_path / ".partial-merged").glob("*.safetensors")
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(0, 0, rest + 1))
    merge_run(run, tmp_path / "merged", max_shard_bytes=40_000, resume=True)
    assert visible(tmp_path) == ["merged"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_said_plainly(
    code: int, run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    message = r"model\.safetensors: the disk is full\. Nothing was replaced; free space and run again\."
    _refused(run, tmp_path / "merged", RunError, message)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_parent_without_permission_is_said_plainly(
    run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:  # root may write anywhere
        patch.setattr(os, "mkdir", closed)
        with pytest.raises(
            RequestError, match=r"merged: no permission to write here\. Choose another folder or change it\."
        ):
            merge_run(run, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_merge_is_not_in_the_way_of_the_next(mine: TrainedRun, tmp_path: Path) -> None:
    record = mine.checkpoint / "records" / "lm_head.weight.safetensors"
    whole = record.read_bytes()
    record.unlink()
    _refused(mine, tmp_path / "merged", RequestError, "is missing from the checkpoint", max_shard_bytes=40_000)
    record.write_bytes(whole)
    merge_run(mine, tmp_path / "merged", max_shard_bytes=40_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "mine"]


def test_a_base_of_another_precision_is_refused(mine: TrainedRun, tmp_path: Path) -> None:
    path = mine.base_folder / "model.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    _refused(mine, tmp_path / "merged", RequestError, "is not the weight this checkpoint was trained on")
