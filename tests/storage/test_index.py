"""What headers say, beside what the safetensors library reads, and what broken files are told."""

import errno
import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pcscale.common.errors import RequestError
from pcscale.storage.index import INDEX_NAME, SINGLE_NAME, has_weights, read_folder, read_header
from pcscale.storage.reader import DTYPE_NAMES
from tests.tiny import build_base


def _save(path: Path, metadata: dict[str, str] | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "weight": torch.randn(3, 5, generator=generator),
        "half": torch.randn(7, generator=generator).to(torch.bfloat16),
        "count": torch.arange(4).view(2, 1, 2),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }
    save_file(tensors, path, metadata=metadata)
    return tensors


def _raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_header_says_what_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    tensors = _save(path, {"format": "pt", "by": "test"})
    entries, metadata = read_header(path)
    content = path.read_bytes()
    with safe_open(path, framework="pt") as handle:
        assert set(entries) == set(handle.keys())
        assert metadata == handle.metadata()
        for name, entry in entries.items():
            expected = handle.get_slice(name)
            assert (entry.name, entry.file, entry.dtype) == (name, path, expected.get_dtype())
            assert entry.shape == tuple(expected.get_shape())
    for name, entry in entries.items():
        data = tensors[name].contiguous().view(-1).view(torch.uint8) if tensors[name].numel() else torch.empty(0)
        assert content[entry.start : entry.start + entry.num_bytes] == bytes(data.to(torch.uint8).tolist())


def test_a_file_without_metadata_has_none(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    _save(path)
    assert read_header(path)[1] == {}


def test_metadata_that_is_null_is_none_as_to_the_library(tmp_path: Path) -> None:
    path = _raw(tmp_path / "some.safetensors", {"x": _F32, "__metadata__": None}, b"\0" * 8)
    assert read_header(path)[1] == {}
    with safe_open(path, framework="pt") as handle:
        assert handle.metadata() is None


def test_a_file_without_tensors_has_no_entries(tmp_path: Path) -> None:
    save_file({}, tmp_path / "none.safetensors")
    assert read_header(tmp_path / "none.safetensors")[0] == {}


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES))
def test_every_dtype_is_named_as_the_library_names_it(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"x": torch.ones(3, dtype=dtype)}, path)
    entry = read_header(path)[0]["x"]
    assert entry.dtype == DTYPE_NAMES[dtype]
    assert entry.num_bytes == 3 * dtype.itemsize


def test_a_folder_is_read_alike_from_one_file_and_from_shards(tmp_path: Path) -> None:
    whole = read_folder(build_base(tmp_path / "whole"))
    sharded = read_folder(build_base(tmp_path / "sharded", max_shard_size="20KB"))
    assert {entry.file.name for entry in whole.values()} == {SINGLE_NAME}
    assert len({entry.file for entry in sharded.values()}) > 2
    assert {name: (entry.dtype, entry.shape) for name, entry in whole.items()} == {
        name: (entry.dtype, entry.shape) for name, entry in sharded.items()
    }


def test_weights_are_noticed_in_one_file_and_in_shards(tmp_path: Path) -> None:
    assert not has_weights(tmp_path)
    assert has_weights(build_base(tmp_path / "whole"))
    assert has_weights(build_base(tmp_path / "sharded", max_shard_size="20KB"))


@pytest.mark.parametrize("size", [0, 3, 7])
def test_a_file_cut_inside_the_length_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    _save(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        RequestError,
        match=rf"some\.safetensors is truncated inside its header \({size} bytes\)\. Fetch or copy it again",
    ):
        read_header(path)


@pytest.mark.parametrize("size", [8, 9, 60])
def test_a_file_cut_inside_its_header_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    _save(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RequestError, match=rf"is truncated inside its header \({size} bytes\)"):
        read_header(path)


@pytest.mark.parametrize("missing", [1, 5, 40])
def test_a_file_cut_inside_its_data_is_refused_with_both_sizes(missing: int, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    _save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-missing])
    with pytest.raises(
        RequestError,
        match=rf"is truncated: {len(content) - missing} bytes, its header says {len(content)}\. Fetch or copy it again",
    ):
        read_header(path)


_F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"\x80\x04\x95 a pickle",
        b"\xff\xfe",
        b"[1, 2]",
        b"7",
        b"{",
        {"x": 3},
        {"x": {}},
        {"x": _F32 | {"data_offsets": [0, 4]}},
        {"x": _F32 | {"data_offsets": [-8, 0]}},
        {"x": _F32 | {"data_offsets": [8, 0]}},
        {"x": _F32 | {"data_offsets": [0]}},
        {"x": _F32 | {"data_offsets": ["0", "8"]}},
        {"x": _F32 | {"data_offsets": [0.0, 8.0]}},
        {"x": _F32 | {"shape": [-1, -2]}},
        {"x": _F32 | {"shape": [2.0]}},
        {"x": _F32 | {"shape": ["2"]}},
        {"x": _F32 | {"shape": None}},
        {"x": _F32, "__metadata__": 3},
        {"x": _F32, "__metadata__": ["format"]},
        {"x": _F32, "__metadata__": {"format": 3}},
        pytest.param(b'{"x":' + b"[" * 90_000, id="nested"),
    ],
)
def test_garbage_is_no_safetensors_file(header: Any, tmp_path: Path) -> None:
    path = _raw(tmp_path / "bad.safetensors", header, b"\0" * 8)
    with pytest.raises(RequestError, match=r"bad\.safetensors is not a safetensors file: its header cannot be read"):
        read_header(path)


@pytest.mark.parametrize("length", [0, 2**40, 2**63])
def test_an_absurd_header_length_is_refused_without_reading_it(length: int, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    with pytest.raises(RequestError, match="is not a safetensors file"):
        read_header(path)


def test_a_dtype_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "fp8.safetensors"
    save_file({"x": torch.zeros(4, dtype=torch.float8_e4m3fn)}, path)
    with pytest.raises(
        RequestError, match=r"fp8\.safetensors: x has dtype F8_E4M3, expected one of F64, F32, .*BOOL\."
    ):
        read_header(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"absent\.safetensors is missing\. Fetch or copy it again"):
        read_header(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ENOTDIR])
def test_a_file_that_cannot_be_read_is_said_plainly(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    _save(tmp_path / "some.safetensors")
    with monkeypatch.context() as patch:  # root may read anything
        patch.setattr(Path, "open", closed)
        with pytest.raises(
            RequestError,
            match=rf"some\.safetensors cannot be read \({os.strerror(code)}\)\. Check its permissions and its disk\.$",
        ):
            read_header(tmp_path / "some.safetensors")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = build_base(tmp_path, max_shard_size="20KB")
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(RequestError, match=rf"{re.escape(str(lost))} is missing\. Fetch or copy it again"):
        read_folder(folder)


def _edit_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"] |= changes
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_an_index_that_names_an_absent_tensor_is_refused(tmp_path: Path) -> None:
    folder = build_base(tmp_path, max_shard_size="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[0].name
    _edit_index(folder, **{"model.layers.9.ghost.weight": shard})
    with pytest.raises(
        RequestError,
        match=rf"index\.json says that model\.layers\.9\.ghost\.weight is in {shard}, and it is not\. Fetch both",
    ):
        read_folder(folder)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "sub/one.safetensors", ".", 3, None])
def test_an_index_that_leaves_its_folder_is_refused(shard: Any, tmp_path: Path) -> None:
    folder = build_base(tmp_path / "base", max_shard_size="20KB")
    _save(tmp_path / "outside.safetensors")
    _edit_index(folder, weight=shard)
    with pytest.raises(RequestError, match=r"index\.json names shards outside its folder\. Fetch or copy it again"):
        read_folder(folder)


@pytest.mark.parametrize("shard", ["..", ""])
def test_a_folder_is_no_shard(shard: str, tmp_path: Path) -> None:
    folder = build_base(tmp_path / "base", max_shard_size="20KB")
    _edit_index(folder, weight=shard)
    with pytest.raises(RequestError, match=rf"{re.escape(str(folder / shard))} is missing"):
        read_folder(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_without_a_weight_map_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(RequestError, match=r"index\.json has no weight_map\. Fetch or copy it again"):
        read_folder(tmp_path)


def test_an_index_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text('{"weight_map": ')
    with pytest.raises(RequestError, match=r"index\.json is not JSON \(.*\)\. Restore the file"):
        read_folder(tmp_path)


@pytest.mark.parametrize("other", ["pytorch_model.bin", "model.gguf"])
def test_a_folder_with_weights_in_another_format_is_refused_with_what_was_found(other: str, tmp_path: Path) -> None:
    (tmp_path / other).write_bytes(b"weights")
    with pytest.raises(
        RequestError,
        match=rf"holds neither model\.safetensors nor model\.safetensors\.index\.json; found {re.escape(other)}, which "
        r"pcscale does not read\. Save the model as safetensors",
    ):
        read_folder(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nor model\.safetensors\.index\.json\. Save the model as safetensors"):
        read_folder(tmp_path)
