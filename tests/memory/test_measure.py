"""Measured memory: by phase, stage and component, and what it is made of."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pcscale.common.allocator import release_between_stages, release_freed
from pcscale.common.ledger import LIBRARIES, RECORDS, WEIGHTS, WORKING, ledger
from pcscale.memory.measure import MemoryMeter, Series
from pcscale.memory.process import anonymous_bytes, machine
from pcscale.run.documents import read_document, write_document
from pcscale.run.record import MemoryLimits, RunUsage
from tests.memory.touched import SIZE, SLACK, touched, wait_until
from tests.projection.parts import CPU


class Owner:
    """Something that holds memory."""


@pytest.fixture
def meter() -> MemoryMeter:
    release_freed()  # What earlier tests have left would go meanwhile.
    return MemoryMeter({}, Series())


@contextmanager
def kept(component: str, home: str, num_bytes: int) -> Iterator[None]:
    """Enter something for the block."""
    ledger.enter(component, home, num_bytes)
    try:
        yield
    finally:
        ledger.enter(component, home, -num_bytes)


def test_a_phase_has_the_peak_of_what_is_gone_when_it_ends(meter: MemoryMeter) -> None:
    with meter.phase("train"):
        before = anonymous_bytes()  # The phase begins by giving back what earlier tests have freed.
        tensor = touched()
        wait_until(lambda: (meter.phases["train"].peak.host_anonymous or 0) >= before + SIZE - SLACK)
        assert tensor.nbytes == SIZE
        del tensor
    usage = meter.phases["train"]
    assert usage.peak.host_anonymous - before == pytest.approx(SIZE, abs=SLACK)
    assert usage.components["host"][WORKING] == pytest.approx(SIZE, abs=SLACK)
    # Beside the libraries stands what other tests of this process keep and have entered.
    assert sum(usage.components["host"].values()) == pytest.approx(before + SIZE, abs=SLACK)
    assert 0 < usage.components["host"][LIBRARIES] <= before


def test_phases_add_up_and_keep_their_highest_peak(meter: MemoryMeter) -> None:
    with meter.phase("train"):
        tensor = touched()
    first = meter.phases["train"].seconds, meter.phases["train"].peak.host_anonymous
    assert tensor.nbytes == SIZE
    del tensor
    with meter.phase("train"):
        time.sleep(0.01)
    usage = meter.phases["train"]
    assert meter.phases.keys() == {"train"}
    assert usage.seconds >= first[0] + 0.01
    assert usage.peak.host_anonymous == first[1]
    assert first[1] > anonymous_bytes() + SIZE - SLACK


def test_stages_add_up_and_have_peaks_of_their_own(meter: MemoryMeter) -> None:
    with meter.phase("train"):
        for _ in range(3):
            with ledger.during("forward"):
                time.sleep(0.01)
            with ledger.during("sweep"):
                tensor = touched()
                time.sleep(0.01)
                del tensor
                with ledger.during("checkpoint"):
                    time.sleep(0.01)
    usage = meter.phases["train"]
    assert list(usage.stages) == ["forward", "sweep", "checkpoint"]
    assert all(stage.seconds >= 0.03 for stage in usage.stages.values())
    assert sum(stage.seconds for stage in usage.stages.values()) <= usage.seconds
    assert usage.peak.host_anonymous >= max(stage.peak.host_anonymous for stage in usage.stages.values())


def test_a_stage_ends_with_a_sample_of_what_it_leaves(meter: MemoryMeter) -> None:
    """Also one that is over before the thread samples."""
    release_freed()  # Else what earlier tests have left to the collector would go with it, within the phase.
    with meter.phase("train"):
        with ledger.during("forward"):
            pass
        with ledger.during("backward"):
            tensor = touched()
        assert tensor.nbytes == SIZE
        del tensor
        release_freed()
        with ledger.during("sweep"):
            pass
    stages = meter.phases["train"].stages
    held = {name: stage.peak.host_anonymous or 0 for name, stage in stages.items()}
    assert held["backward"] - held["forward"] == pytest.approx(SIZE, abs=SLACK)
    assert held["sweep"] - held["forward"] == pytest.approx(0, abs=SLACK)


def test_what_is_entered_is_exact_and_the_rest_is_working_memory(meter: MemoryMeter) -> None:
    with meter.phase("train"):
        records, working = touched(), touched()
        with kept(RECORDS, "host", records.nbytes), kept(WEIGHTS, "pinned", 12_345), ledger.during("sweep"):
            pass
        assert working.nbytes == SIZE
        del records, working
    usage = meter.phases["train"]
    for found in (usage, usage.stages["sweep"]):
        assert found.components["host"][RECORDS] - held_before(RECORDS) == SIZE
        assert found.components["host"][WEIGHTS] - held_before(WEIGHTS) == 12_345
        assert found.peak.pinned == 12_345
    assert usage.stages["sweep"].components["host"][WORKING] == pytest.approx(SIZE, abs=SLACK)


def held_before(component: str) -> int:
    """What earlier tests' objects hold still."""
    return sum(num_bytes for (home, name), num_bytes in ledger.held().items() if name == component and home != "device")


def test_what_leaves_with_its_owner_stays_in_the_peak(meter: MemoryMeter) -> None:
    before = held_before(RECORDS)
    with meter.phase("train"):
        owner = Owner()
        ledger.keep(owner, RECORDS, "host", 1000)
        with ledger.during("forward"):
            pass
        del owner
        with ledger.during("sweep"):
            pass
    usage = meter.phases["train"]
    assert usage.components["host"][RECORDS] == before + 1000
    assert usage.stages["sweep"].components["host"].get(RECORDS, 0) == before


def test_what_is_held_when_it_settles_is_the_libraries(meter: MemoryMeter) -> None:
    with meter.phase("train"):
        with ledger.during("forward"):
            pass
        library = touched()
        release_between_stages(CPU)
        with ledger.during("sweep"):
            pass
        assert library.nbytes == SIZE
    stages = {name: stage.components["host"] for name, stage in meter.phases["train"].stages.items()}
    assert stages["sweep"][LIBRARIES] - stages["forward"][LIBRARIES] == pytest.approx(SIZE, abs=SLACK)
    assert stages["sweep"][WORKING] < SLACK


def test_what_was_entered_before_a_phase_is_not_the_libraries(meter: MemoryMeter) -> None:
    release_freed()
    records = touched()
    with kept(RECORDS, "host", records.nbytes), meter.phase("train"):
        pass
    found = meter.phases["train"].components["host"]
    assert found[LIBRARIES] < anonymous_bytes() - SIZE + SLACK
    assert found[RECORDS] - held_before(RECORDS) == SIZE


def test_memory_that_is_taken_but_not_written_to_is_no_negative_working_memory(meter: MemoryMeter) -> None:
    with meter.phase("train"), kept(RECORDS, "host", 2**50):
        pass
    assert meter.phases["train"].components["host"][WORKING] >= 0
    with meter.phase("merge"), kept(RECORDS, "host", 2**50), ledger.during("merging"):
        pass
    assert all(sample.host[WORKING] >= 0 for sample in meter.series.samples)


def test_working_memory_is_that_of_the_time_when_most_was_held(meter: MemoryMeter) -> None:
    """What the ledger has struck out but the allocator still keeps is not taken for it."""
    with meter.phase("train"):
        records = [touched(), touched()]
        with kept(RECORDS, "host", 2 * SIZE), ledger.during("sweep"):
            temporary = touched()
        assert temporary.nbytes == SIZE
        del temporary
        with ledger.during("checkpoint"):  # The records are still there, and nobody knows of them.
            time.sleep(0.1)
        assert len(records) == 2
    usage = meter.phases["train"]
    assert usage.components["host"][WORKING] == pytest.approx(SIZE, abs=SLACK)
    assert usage.stages["sweep"].components["host"][WORKING] == pytest.approx(SIZE, abs=SLACK)
    assert usage.components["host"][RECORDS] == pytest.approx(2 * SIZE, abs=SLACK)


def test_a_phase_of_an_earlier_process_is_gone_on_with(meter: MemoryMeter, tmp_path: Path) -> None:
    with meter.phase("train"), ledger.during("sweep"):
        pass
    earlier = meter.phases["train"]
    earlier.seconds, earlier.stages["sweep"].seconds = 100.0, 50.0
    earlier.peak.host_anonymous, earlier.peak.written = 2**60, 2**50
    earlier.components["host"][WORKING], earlier.most["host"] = 2**59, 2**60
    document = RunUsage(meter.phases, machine(), MemoryLimits(None, "unknown", None))
    write_document(tmp_path / "usage.json", document)
    assert read_document(tmp_path / "usage.json", RunUsage) == document
    again = MemoryMeter(read_document(tmp_path / "usage.json", RunUsage).phases, Series())
    with again.phase("train"), ledger.during("sweep"):
        pass
    usage = again.phases["train"]
    assert usage.seconds > 100
    assert usage.stages["sweep"].seconds > 50
    assert usage.peak.host_anonymous == 2**60
    assert usage.peak.written >= 2**50
    assert usage.components["host"][WORKING] == 2**59
    assert usage.components["host"][LIBRARIES] < 2**59


def test_a_phase_that_fails_is_counted_too(meter: MemoryMeter) -> None:
    def fail() -> None:
        with meter.phase("train"), ledger.during("sweep"):
            time.sleep(0.01)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    usage = meter.phases["train"]
    assert usage.seconds >= 0.01
    assert usage.stages["sweep"].seconds >= 0.01
    assert usage.peak.host_anonymous > 0
    assert ledger.listener is None
    with meter.phase("merge"):
        pass
    assert meter.phases["merge"].peak.host_anonymous > 0
    assert meter.phases["merge"].stages == {}


def test_outside_a_phase_nothing_is_measured_and_no_thread_is_left(meter: MemoryMeter) -> None:
    threads = threading.active_count()
    with meter.phase("train"):
        assert threading.active_count() == threads + 1
    assert threading.active_count() == threads
    samples = len(meter.series.samples)
    with ledger.during("sweep"):
        pass
    assert meter.phases["train"].stages == {}
    assert len(meter.series.samples) == samples


def test_the_series_has_what_was_held_when(meter: MemoryMeter) -> None:
    with meter.phase("train"):
        with ledger.during("forward"):
            time.sleep(0.01)
        with ledger.during("sweep"):
            pass
    with meter.phase("merge"):
        pass
    samples = meter.series.samples
    seconds = [sample.seconds for sample in samples]
    assert seconds == sorted(seconds)
    assert [kept.phase for kept in samples].count("merge") >= 1
    assert {(kept.phase, kept.stage) for kept in samples} == {
        ("train", None),
        ("train", "forward"),
        ("train", "sweep"),
        ("merge", None),
    }
    held = meter.phases["train"].peak.host_anonymous or 0
    highest = max(sample.total for sample in samples if sample.phase == "train")
    assert highest == pytest.approx(held, abs=SLACK + held_before(RECORDS))


def test_the_series_of_an_earlier_process_is_gone_on_with(meter: MemoryMeter, tmp_path: Path) -> None:
    with meter.phase("train"):
        time.sleep(0.05)
    meter.series.write(tmp_path / "memory.json")
    earlier = meter.series.samples[-1].seconds
    again = MemoryMeter(meter.phases, Series.read(tmp_path / "memory.json"))
    with again.phase("train"):
        pass
    assert again.series.samples[-1].seconds >= earlier > 0
    assert [sample.seconds for sample in again.series.samples] == sorted(s.seconds for s in again.series.samples)


class Watch:
    """A watchdog that remembers what it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, int], dict[str, int]]] = []

    def look(self, host: dict[str, int], device: dict[str, int]) -> None:
        self.seen.append((host, device))


def test_the_watchdog_is_shown_every_sample() -> None:
    watch: Any = Watch()
    meter = MemoryMeter({}, Series(), watch)
    with meter.phase("train"), kept(RECORDS, "host", 1000), ledger.during("sweep"):
        pass
    assert len(watch.seen) == len(meter.series.samples) > 1
    assert all(LIBRARIES in host and WORKING in host for host, _ in watch.seen)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_there_is_no_device_peak(meter: MemoryMeter) -> None:
    with meter.phase("train"), ledger.during("sweep"):
        pass
    for usage in (meter.phases["train"], meter.phases["train"].stages["sweep"]):
        assert usage.peak.device is None
        assert usage.peak.device_reserved is None
    assert not {WORKING, LIBRARIES} & meter.phases["train"].components["device"].keys()
    assert machine().gpu is None
