"""Memory of this process, as the system tells it."""

from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from pcscale.common.allocator import release_freed
from pcscale.common.console import console
from pcscale.memory import process
from pcscale.memory.process import (
    AnonymousPeak,
    anonymous_bytes,
    file_bytes,
    machine,
    unique_bytes,
    written_bytes,
)
from pcscale.storage.index import read_header
from pcscale.storage.reader import TensorReader
from tests.memory.touched import SIZE, SLACK, touched, wait_until


def test_a_touched_tensor_is_anonymous_memory() -> None:
    release_freed()
    before = anonymous_bytes()
    tensor = touched()
    held = anonymous_bytes()
    assert held - before == pytest.approx(tensor.nbytes, abs=SLACK)
    del tensor
    release_freed()  # The allocator keeps it where it fitted into what earlier tests had freed.
    assert held - anonymous_bytes() == pytest.approx(SIZE, abs=SLACK)


def test_a_mapped_file_is_not(tmp_path: Path) -> None:
    save_file({"x": touched()}, tmp_path / "x.safetensors")
    reader = TensorReader(read_header(tmp_path / "x.safetensors")[0])
    before, of_files = anonymous_bytes(), file_bytes()
    tensor = reader.tensor("x")
    assert tensor.sum().item() == SIZE // 4
    assert tensor.nbytes == SIZE
    assert anonymous_bytes() - before < SLACK
    if of_files is not None:
        assert (file_bytes() or 0) - of_files == pytest.approx(SIZE, abs=SLACK)


def test_where_anonymous_memory_is_not_told_apart_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console.configure(quiet=False)
    monkeypatch.setattr(process, "_STATUS", tmp_path / "hidden")
    process._warn_of_resident_memory.cache_clear()
    resident = psutil.Process().memory_info().rss
    assert anonymous_bytes() == pytest.approx(resident, abs=SLACK)
    assert anonymous_bytes() == pytest.approx(resident, abs=SLACK)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("all that is resident, mapped files with it") == 1
    assert file_bytes() is None


def test_memory_of_this_process_alone_is_its_anonymous_memory_and_little_more() -> None:
    before, tensor = unique_bytes(), touched()
    after = unique_bytes()
    assert before is not None
    assert after is not None
    assert after - before == pytest.approx(tensor.nbytes, abs=SLACK)


def test_what_is_written_and_synced_is_counted(tmp_path: Path) -> None:
    before = written_bytes()
    with (tmp_path / "file").open("wb") as file:
        file.write(bytes(SIZE))
        found = written_bytes() - before
    # Some file systems, such as those in memory, count nothing.
    assert found == 0 or found == pytest.approx(SIZE, abs=SLACK)


def hold_until_sampled(peak: AnonymousPeak) -> None:
    """Hold a tensor for no longer than a sample needs."""
    least = anonymous_bytes() + SIZE - SLACK
    tensor = touched()
    wait_until(lambda: peak.peak_bytes >= least)
    assert tensor.nbytes == SIZE


def test_the_peak_outlives_what_caused_it() -> None:
    before = anonymous_bytes()
    with AnonymousPeak(interval_seconds=0.002) as peak:
        hold_until_sampled(peak)
        assert anonymous_bytes() - before < SLACK
    assert peak.peak_bytes - before == pytest.approx(SIZE, abs=SLACK)


def test_without_a_sample_the_peak_is_what_is_held_at_the_end() -> None:
    with AnonymousPeak(interval_seconds=1000) as peak:
        before = peak.peak_bytes
        tensor = touched()
    assert peak.peak_bytes - before == pytest.approx(tensor.nbytes, abs=SLACK)


def test_the_machine_is_described() -> None:
    found = machine()
    assert found.cpu
    assert found.cores == torch.get_num_threads()
    total = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) * 1024
    assert found.memory_bytes == total
