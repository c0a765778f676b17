"""Signals as a request that the loop answers between two steps."""

import os
import signal
import threading

import pytest

from pcscale.training.interrupt import StopRequest


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_a_ctrl_c_after_it_interrupts(first: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), first)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGTERM)  # Which a launcher sends after the Ctrl-C that its ranks saw too.
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_of_before_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGINT) == stop._handle
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_on_a_thread_of_its_own_signals_are_left_alone() -> None:
    seen: list[object] = []

    def inside() -> None:
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
