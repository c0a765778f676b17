"""Mapped tensors beside the safetensors library's own."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pcscale.storage.hashing import fingerprint, fingerprint_file
from pcscale.storage.index import read_folder, read_header
from pcscale.storage.reader import DTYPE_NAMES, TORCH_DTYPES, TensorReader
from tests.tiny import build_base


def _random(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    values = 50 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return (values > 0) if dtype == torch.bool else values.abs().to(dtype)


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES), ids=DTYPE_NAMES.get)
def test_a_mapped_tensor_equals_the_librarys(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"matrix": _random(dtype, (5, 3)), "cube": _random(dtype, (2, 3, 4)), "one": _random(dtype, ())}, path)
    reader = TensorReader(read_header(path)[0])
    with safe_open(path, framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118 - the library's handle is no dict
            tensor, expected = reader.tensor(name), handle.get_tensor(name)
            assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
            assert torch.equal(tensor, expected)


def test_tensors_whose_data_is_not_aligned_are_read_right(tmp_path: Path) -> None:
    # The library sorts by dtype and pads its header; other writers do neither.
    path = tmp_path / "odd.safetensors"
    values = torch.randn(4, 2)
    header = (
        b'{"bytes":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},'
        b'"x":{"dtype":"F32","shape":[4,2],"data_offsets":[3,35]}}'
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\1\2\3" + values.numpy().tobytes())
    reader = TensorReader(read_header(path)[0])
    assert torch.equal(reader.tensor("x"), values)
    assert reader.tensor("bytes").tolist() == [1, 2, 3]
    with safe_open(path, framework="pt") as handle:
        assert torch.equal(handle.get_tensor("x"), values)


def test_an_empty_tensor_keeps_its_shape_and_dtype(tmp_path: Path) -> None:
    save_file({"none": torch.empty(0, 3, dtype=torch.float16)}, tmp_path / "some.safetensors")
    reader = TensorReader(read_header(tmp_path / "some.safetensors")[0])
    assert reader.tensor("none").shape == (0, 3)
    assert reader.tensor("none").dtype == torch.float16


def test_a_sharded_checkpoint_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    folder = build_base(tmp_path, "qwen2", tied=False, dtype=torch.bfloat16, max_shard_size="20KB")
    entries = read_folder(folder)
    reader = TensorReader(entries)
    reader.prefetch(entries)
    for name, entry in entries.items():
        with safe_open(entry.file, framework="pt") as handle:
            assert torch.equal(reader.tensor(name), handle.get_tensor(name))


def test_the_data_of_a_tensor_is_its_bytes(tmp_path: Path) -> None:
    values = torch.randn(6)
    save_file({"first": torch.zeros(2), "x": values}, tmp_path / "some.safetensors")
    reader = TensorReader(read_header(tmp_path / "some.safetensors")[0])
    assert bytes(reader.data("x")) == values.numpy().tobytes()


def test_a_view_outlives_its_reader(tmp_path: Path) -> None:
    values = torch.randn(1000)
    save_file({"x": values}, tmp_path / "some.safetensors")
    reader = TensorReader(read_header(tmp_path / "some.safetensors")[0])
    view = reader.tensor("x")
    del reader
    assert torch.equal(view, values)


def test_a_reader_that_is_gone_holds_no_file_open(tmp_path: Path) -> None:
    folder = build_base(tmp_path, max_shard_size="20KB")
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("open files are counted through /proc")
    before = len(list(descriptors.iterdir()))
    reader = TensorReader(read_folder(folder))
    for name in reader.entries:
        reader.tensor(name)
    assert len(list(descriptors.iterdir())) > before
    del reader
    assert len(list(descriptors.iterdir())) == before


def test_dtype_names_are_one_to_one() -> None:
    assert {name: TORCH_DTYPES[name] for name in DTYPE_NAMES.values()} == TORCH_DTYPES


def test_fingerprints_of_a_file_and_of_its_bytes_agree_and_notice_one_bit(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40
    (tmp_path / "same").write_bytes(content)
    (tmp_path / "other").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fingerprint_file(tmp_path / "same") == fingerprint(content) == fingerprint(memoryview(content))
    assert fingerprint_file(tmp_path / "other") != fingerprint(content)


def test_the_fingerprint_of_nothing_is_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    # XXH3-128 of the empty input, seed 0, from the xxHash specification's sanity checks.
    assert fingerprint_file(tmp_path / "empty") == fingerprint(b"") == "99aa06d3014798d86001c324468d497f"
