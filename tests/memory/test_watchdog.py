"""A warning before memory runs out: once, again only after it was calm, and with what would help."""

import time

import pytest

from pcscale.memory.limits import Limit
from pcscale.memory.watchdog import INTERVAL_SECONDS, Watchdog

GIB = 2**30
HOST = {"records": 3 * GIB, "working memory": 5 * GIB, "libraries": GIB}
DEVICE = {"activations": 2 * GIB, "records": 4 * GIB}


class Machine:
    """Limits of 100 GiB of host and 10 GiB of device memory, and a watch on them a second apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
        self.now, self.looks = 1000.0, 0
        self.used = {"host": 0, "device": 0}
        self.components = {"host": HOST, "device": DEVICE}
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.warnings = warnings
        self.watchdog = Watchdog(
            {
                "host": (Limit(100 * GIB, "cgroup /job, memory.max"), lambda: self._look("host")),
                "device": (Limit(10 * GIB, "NVIDIA something"), lambda: self._look("device")),
            }
        )

    def _look(self, memory: str) -> int:
        self.looks += 1
        return self.used[memory]

    def said(self, host: float = 0, device: float = 0, seconds: float = INTERVAL_SECONDS) -> list[str]:
        """What appears after some time with so many GiB in use."""
        self.now += seconds
        self.used = {"host": int(host * GIB), "device": int(device * GIB)}
        self.watchdog.look(self.components["host"], self.components["device"])
        found = self.warnings.copy()
        self.warnings.clear()
        return found


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> Machine:
    return Machine(monkeypatch, warnings)


def test_a_warning_names_the_limit_the_largest_component_and_what_to_do(machine: Machine) -> None:
    assert machine.said(host=96) == [
        "host memory is nearly full: 96.0 GiB of 100.0 GiB (cgroup /job, memory.max); the largest part of this "
        "run is working memory (5.0 GiB). Ctrl-C writes a checkpoint; `pcscale plan` shows what would need less."
    ]


def test_a_device_has_its_own_largest_component(machine: Machine) -> None:
    (warning,) = machine.said(device=9.9)
    assert "device memory is nearly full: 9.9 GiB of 10.0 GiB (NVIDIA something)" in warning
    assert "the largest part of this run is records (4.0 GiB)" in warning


def test_it_warns_from_95_percent_on(machine: Machine) -> None:
    assert machine.said(host=94.99) == []
    assert len(machine.said(host=95)) == 1


def test_it_warns_once_until_memory_has_been_below_90_percent(machine: Machine) -> None:
    assert len(machine.said(host=96)) == 1
    for host in (97, 99, 94, 90, 96, 91, 100):
        assert machine.said(host=host) == [], host
    assert machine.said(host=89.9) == []
    assert machine.said(host=94) == []
    assert len(machine.said(host=95.5)) == 1
    assert machine.said(host=99) == []


def test_host_and_device_are_warned_of_apart(machine: Machine) -> None:
    assert len(machine.said(host=96)) == 1
    assert len(machine.said(host=96, device=9.6)) == 1
    assert machine.said(host=96, device=9.7) == []
    assert machine.said(host=10, device=9.7) == []
    assert ["host" in line for line in machine.said(host=99, device=9.7)] == [True]
    assert len(machine.said(host=10, device=1)) == 0
    assert len(machine.said(host=96, device=9.6)) == 2


def test_it_looks_at_most_once_a_second(machine: Machine) -> None:
    machine.said(host=1)
    looks = machine.looks
    for _ in range(9):
        assert machine.said(host=99, seconds=INTERVAL_SECONDS / 10) == []
    assert machine.looks == looks
    assert len(machine.said(host=99, seconds=INTERVAL_SECONDS / 5)) == 1


def test_a_run_without_components_has_no_largest(machine: Machine) -> None:
    machine.components = {"host": {}, "device": {}}
    (warning,) = machine.said(host=99)
    assert "99.0 GiB of 100.0 GiB (cgroup /job, memory.max). Ctrl-C" in warning


def test_what_has_no_limit_is_not_looked_at(machine: Machine) -> None:
    unknown = {name: (Limit(None, "unknown"), lambda: machine._look("host")) for name in ("host", "device")}
    machine.watchdog = Watchdog(unknown)
    assert machine.said(host=10**6, device=10**6) == []
    assert machine.looks == 0
