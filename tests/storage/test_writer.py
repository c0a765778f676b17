"""Shards that are written in place: whole or absent, and read by the safetensors library."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pcscale.common.errors import RequestError, RunError
from pcscale.storage.hashing import fingerprint_file
from pcscale.storage.index import read_header
from pcscale.storage.reader import DTYPE_NAMES, TensorReader
from pcscale.storage.writer import ShardWriter, write_tensors

SHAPES = {"a.weight": (torch.float32, (3, 2)), "b.bias": (torch.bfloat16, (5,))}


def _values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, (dtype, shape) in SHAPES.items()}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file that stands where the new one should go."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"the old file")
    return path


def test_what_is_written_loads_in_the_library_with_its_metadata(tmp_path: Path) -> None:
    path, values = tmp_path / "out" / "model.safetensors", _values()
    with ShardWriter(path, SHAPES, {"format": "pt", "note": "größer"}) as writer:
        for name, tensor in reversed(values.items()):
            writer[name].copy_(tensor)
        assert not path.exists()
    with safe_open(path, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt", "note": "größer"}
        assert set(handle.keys()) == set(values)
        for name, tensor in values.items():
            assert torch.equal(handle.get_tensor(name), tensor)
    assert path.stat().st_size == writer.num_bytes
    assert _names(path.parent) == ["model.safetensors"]


def test_every_dtype_and_shape_is_read_by_the_library_and_by_the_reader(tmp_path: Path) -> None:
    # In this order most tensors begin at odd places.
    tensors = {f"x{number}": torch.ones(2 * number + 1, dtype=dtype) for number, dtype in enumerate(DTYPE_NAMES)}
    tensors |= {"scalar": torch.tensor(7.0), "empty": torch.empty(3, 0), "byte": torch.tensor([9], dtype=torch.uint8)}
    tensors = {"byte": tensors.pop("byte"), **tensors}
    path = tmp_path / "model.safetensors"
    write_tensors(path, tensors)
    loaded, reader = load_file(path), TensorReader(read_header(path)[0])
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(reader.tensor(name), tensor)


@pytest.mark.parametrize("name", ["x", "xy", "xyz", "wxyz", "ü"])
def test_the_data_begins_at_a_multiple_of_8(name: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", {name: torch.ones(2)})
    assert read_header(tmp_path / "model.safetensors")[0][name].start % 8 == 0
    assert load_file(tmp_path / "model.safetensors")[name].tolist() == [1, 1]


def test_a_file_without_tensors_is_read_by_the_library(tmp_path: Path) -> None:
    write_tensors(tmp_path / "none.safetensors", {}, {"format": "pt"})
    assert load_file(tmp_path / "none.safetensors") == {}


def test_a_tensor_may_be_written_in_pieces(tmp_path: Path) -> None:
    path, values = tmp_path / "model.safetensors", torch.randn(10, 4)
    with ShardWriter(path, {"x": (torch.float32, (10, 4))}) as writer:
        for start in (6, 0, 3):
            writer["x"][start : start + 4].copy_(values[start : start + 4])
    assert torch.equal(load_file(path)["x"], values)


def test_tensors_that_are_not_contiguous_are_written_as_they_look(tmp_path: Path) -> None:
    values = torch.randn(4, 6).T
    write_tensors(tmp_path / "model.safetensors", {"x": values})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], values)


def test_equal_tensors_make_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_tensors(tmp_path / name, _values(), {"format": "pt"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert fingerprint_file(tmp_path / "one") == fingerprint_file(tmp_path / "two")


def test_a_new_file_replaces_the_old_one_only_at_the_end(old: Path) -> None:
    with ShardWriter(old, SHAPES) as writer:
        for name, tensor in _values().items():
            writer[name].copy_(tensor)
        assert old.read_bytes() == b"the old file"
    assert set(load_file(old)) == set(SHAPES)
    assert _names(old.parent) == ["model.safetensors"]


class _Stop(BaseException):
    """Like KeyboardInterrupt, which pytest keeps for itself."""


@pytest.mark.parametrize("error", [ValueError("broken"), _Stop("interrupted")])
def test_an_exception_inside_the_block_leaves_only_the_old_file(error: BaseException, old: Path) -> None:
    writer = ShardWriter(old, SHAPES)

    def fail() -> None:
        with writer:
            writer["a.weight"].fill_(1)
            raise error

    with pytest.raises(type(error), match=str(error)):
        fail()
    assert old.read_bytes() == b"the old file"
    assert _names(old.parent) == ["model.safetensors"]


def test_an_exception_inside_the_block_leaves_no_file_where_there_was_none(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"c\.weight"), ShardWriter(tmp_path / "model.safetensors", SHAPES) as writer:
        writer["c.weight"].fill_(1)
    assert _names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_before_the_first_byte(code: int, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        RunError, match=r"model\.safetensors: the disk is full\. Nothing was replaced; free space and run again"
    ):
        write_tensors(old, _values())
    assert old.read_bytes() == b"the old file"
    assert _names(old.parent) == ["model.safetensors"]


def test_the_space_is_reserved_for_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[int] = []
    reserve = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", lambda *args: (reserved.append(args[2]), reserve(*args)))
    write_tensors(tmp_path / "model.safetensors", _values())
    assert reserved == [(tmp_path / "model.safetensors").stat().st_size]


def test_a_folder_without_permission_is_refused(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", closed)
    with pytest.raises(
        RequestError, match=r"model\.safetensors: no permission to write here\. Choose another folder or change it"
    ):
        write_tensors(old, _values())
    monkeypatch.undo()
    assert old.read_bytes() == b"the old file"


def test_a_disk_that_fills_up_while_syncing_leaves_only_the_old_file(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="the disk is full"):
        write_tensors(old, _values())
    assert old.read_bytes() == b"the old file"
    assert _names(old.parent) == ["model.safetensors"]


def test_a_name_that_cannot_be_given_leaves_no_partial_file(tmp_path: Path) -> None:
    folder = tmp_path / "model.safetensors"
    folder.mkdir()
    (folder / "precious.txt").write_text("weeks of work")
    with pytest.raises(IsADirectoryError):
        write_tensors(folder, _values())
    assert _names(folder) == ["precious.txt"]
    assert _names(tmp_path) == ["model.safetensors"]


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("open files are counted through /proc")
    before = len(list(descriptors.iterdir()))
    write_tensors(tmp_path / "model.safetensors", _values())
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path / "other.safetensors", SHAPES):
        raise RuntimeError("stop")
    assert len(list(descriptors.iterdir())) == before
