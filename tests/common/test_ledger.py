"""What is held is entered and leaves again, on any thread, and whoever measures hears of every moment."""

import gc
import threading

import pytest
import torch

from pcscale.common.ledger import COMPONENTS, MOMENTS, RECORDS, Ledger, ledger, placement_of

THREADS, ENTRIES = 8, 2000


class Owner:
    """Something that holds memory."""


class Heard:
    """What a listener is told."""

    def __init__(self, of: Ledger) -> None:
        self._of = of
        self.told: list[str | None] = []
        self.at_that_time: list[str | None] = []

    def change(self, stage: str | None) -> None:
        self.told.append(stage)
        self.at_that_time.append(self._of.stage)

    def mark_idle(self) -> None:
        self.told.append("settled")


@pytest.fixture
def own() -> Ledger:
    return Ledger()


def test_entries_of_one_component_and_home_add_up(own: Ledger) -> None:
    own.enter(RECORDS, "host", 100)
    own.enter(RECORDS, "host", 20)
    own.enter(RECORDS, "device", 3)
    own.enter(MOMENTS, "host", 5)
    own.enter(RECORDS, "host", -50)
    assert own.held() == {("host", RECORDS): 70, ("device", RECORDS): 3, ("host", MOMENTS): 5}


def test_what_was_read_does_not_change_with_what_is_held(own: Ledger) -> None:
    before = own.held()
    own.enter(RECORDS, "host", 1)
    assert before == {}
    own.held()["host", RECORDS] = 7
    assert own.held() == {("host", RECORDS): 1}


def test_what_an_object_holds_leaves_with_the_last_reference_to_it(own: Ledger) -> None:
    owner = Owner()
    own.keep(owner, RECORDS, "pinned", 100)
    own.keep(owner, MOMENTS, "device", 10)
    other = owner
    del owner
    assert own.held() == {("pinned", RECORDS): 100, ("device", MOMENTS): 10}
    del other
    assert set(own.held().values()) == {0}


def test_what_an_object_in_a_cycle_holds_leaves_with_garbage_collection(own: Ledger) -> None:
    gc.disable()
    try:
        owner = Owner()
        owner.itself = owner  # type: ignore
        own.keep(owner, RECORDS, "host", 100)
        del owner
        assert own.held() == {("host", RECORDS): 100}
    finally:
        gc.enable()
    gc.collect()
    assert own.held() == {("host", RECORDS): 0}


def test_an_object_that_is_collected_while_an_entry_is_made_leaves_too(own: Ledger) -> None:
    """Garbage is collected at any time, also while this thread has the lock: a plain lock would wait for itself."""
    owner = Owner()
    own.keep(owner, RECORDS, "host", 100)
    holders = [owner]
    del owner

    def enter_and_let_go() -> None:
        with own._lock:
            holders.clear()

    thread = threading.Thread(target=enter_and_let_go, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert own.held() == {("host", RECORDS): 0}


def test_entries_of_many_threads_are_all_there(own: Ledger) -> None:
    together = threading.Barrier(THREADS)

    def enter() -> None:
        together.wait()
        for _ in range(ENTRIES):
            own.enter(RECORDS, "host", 3)
            own.enter(MOMENTS, "host", 1)
            own.enter(RECORDS, "host", -2)
            assert own.held()["host", MOMENTS] > 0

    threads = [threading.Thread(target=enter) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert own.held() == {("host", RECORDS): THREADS * ENTRIES, ("host", MOMENTS): THREADS * ENTRIES}


def test_stages_are_told_in_order_from_the_outside_in_and_back(own: Ledger) -> None:
    heard = Heard(own)
    own.listener = heard
    with own.during("sweep"):
        assert own.stage == "sweep"
        with own.during("checkpoint"):
            assert own.stage == "checkpoint"
        assert own.stage == "sweep"
    with own.during("forward"):
        own.mark_idle()
    assert own.stage is None
    assert heard.told == ["sweep", "checkpoint", "sweep", None, "forward", "settled", None]
    assert heard.at_that_time == ["sweep", "checkpoint", "sweep", None, "forward", None]


def test_a_stage_that_fails_is_over(own: Ledger) -> None:
    heard = Heard(own)
    own.listener = heard

    def fail() -> None:
        with own.during("sweep"), own.during("checkpoint"):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert own.stage is None
    assert heard.told == ["sweep", "checkpoint", "sweep", None]


def test_without_a_listener_stages_pass_and_idling_does_nothing(own: Ledger) -> None:
    with own.during("sweep"):
        own.mark_idle()
        assert own.stage == "sweep"
    assert own.stage is None
    assert own.held() == {}


def test_without_a_gpu_the_device_is_the_host() -> None:
    assert placement_of(torch.device("cpu")) == "host"
    assert placement_of(torch.device("cuda", 1)) == "device"
    assert placement_of(torch.device("meta")) == "device"


def test_every_component_has_a_name_of_its_own() -> None:
    assert len(set(COMPONENTS)) == len(COMPONENTS)
    assert {component for _, component in ledger.held()} <= set(COMPONENTS)
