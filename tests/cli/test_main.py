"""How the command line ends."""

import sys
from types import ModuleType
from typing import Any

import pytest

from pcscale.cli import main


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was done at the end, in its order."""
    done: list[Any] = []
    monkeypatch.setattr(main.os, "_exit", lambda code: done.append(code))
    monkeypatch.setattr(main.atexit, "_run_exitfuncs", lambda: done.append("exit functions"))
    return done


def end(monkeypatch: pytest.MonkeyPatch, code: int | None) -> None:
    def app(prog_name: str) -> None:
        sys.exit(code)

    monkeypatch.setattr(main, "app", app)
    with pytest.raises(SystemExit):
        main.run()


@pytest.mark.parametrize(("code", "expected"), [(None, 0), (0, 0), (3, 3)])
def test_a_process_of_several_ends_where_no_thread_can_abort_it(
    code: int | None, expected: int, ended: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pcscale.distributed.group", ModuleType("group"))
    end(monkeypatch, code)
    assert ended == ["exit functions", expected]


def test_any_other_process_ends_as_python_has_it(ended: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pcscale.distributed.group", raising=False)
    end(monkeypatch, 3)
    assert ended == []
