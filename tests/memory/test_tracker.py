"""Measured memory: anonymous memory alone, at its peak, added up by phase."""

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pcscale.memory.tracker import AnonymousPeak, PhaseUsage, anonymous_bytes, machine, measured
from pcscale.storage.index import read_header
from pcscale.storage.reader import TensorReader

SIZE = 64 * 2**20
SLACK = 8 * 2**20
"""What the interpreter, its threads and the allocator take or give back meanwhile."""
PATIENCE_SECONDS = 20.0
"""How long the sampling thread may be kept waiting by a busy machine."""


def touched() -> torch.Tensor:
    """A tensor of SIZE bytes, all of them written."""
    return torch.ones(SIZE // 4)


def test_a_touched_tensor_is_anonymous_memory() -> None:
    before = anonymous_bytes()
    tensor = touched()
    held = anonymous_bytes()
    assert held - before == pytest.approx(tensor.nbytes, abs=SLACK)
    del tensor
    assert held - anonymous_bytes() == pytest.approx(SIZE, abs=SLACK)


def test_a_mapped_file_is_not(tmp_path: Path) -> None:
    save_file({"x": touched()}, tmp_path / "x.safetensors")
    reader = TensorReader(read_header(tmp_path / "x.safetensors")[0])
    before = anonymous_bytes()
    tensor = reader.tensor("x")
    assert tensor.sum().item() == SIZE // 4
    assert tensor.nbytes == SIZE
    assert anonymous_bytes() - before < SLACK


def hold_until_sampled(peak: AnonymousPeak) -> None:
    """Hold a tensor for no longer than a sample needs."""
    least = anonymous_bytes() + SIZE - SLACK
    tensor = touched()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while peak.peak_bytes < least and time.monotonic() < deadline:
        time.sleep(0.002)
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


def test_phases_add_up_and_keep_their_highest_peak() -> None:
    usage: dict[str, PhaseUsage] = {}
    with measured(usage, "train"):
        tensor = touched()
    first = usage["train"].seconds, usage["train"].peak_host_anonymous_bytes
    assert tensor.nbytes == SIZE
    del tensor
    with measured(usage, "train"):
        time.sleep(0.01)
    assert usage.keys() == {"train"}
    assert usage["train"].seconds >= first[0] + 0.01
    assert usage["train"].peak_host_anonymous_bytes == first[1]
    assert usage["train"].peak_host_anonymous_bytes > anonymous_bytes() + SIZE - SLACK


def test_a_phase_of_an_earlier_process_is_gone_on_with() -> None:
    usage = {"train": PhaseUsage(seconds=100.0, peak_host_anonymous_bytes=2**60)}
    with measured(usage, "train"):
        pass
    assert usage["train"].seconds > 100
    assert usage["train"].peak_host_anonymous_bytes == 2**60


def test_a_phase_that_fails_is_counted_too() -> None:
    usage: dict[str, PhaseUsage] = {}

    def fail() -> None:
        with measured(usage, "train"):
            time.sleep(0.01)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert usage["train"].seconds >= 0.01
    assert usage["train"].peak_host_anonymous_bytes > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_there_is_no_device_peak() -> None:
    usage: dict[str, PhaseUsage] = {}
    with measured(usage, "train"):
        pass
    assert usage["train"].peak_device_bytes is None
    assert machine()["gpu"] is None


def test_the_machine_is_described() -> None:
    found = machine()
    assert found.keys() == {"cpu", "cores", "gpu", "memory_bytes"}
    assert found["cpu"]
    assert found["cores"] == torch.get_num_threads()
    total = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) * 1024
    assert found["memory_bytes"] == total
