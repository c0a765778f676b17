"""The demo's base, without a download: made once, whoever else wants it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from pcscale.common.console import console
from pcscale.jobs import demo

PATIENCE_SECONDS = 20.0


def test_two_that_want_the_base_make_it_once_and_the_one_that_waits_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetching, waiting, said, made = Event(), Event(), [], []

    def fetch(scratch: Path) -> Path:
        fetching.set()
        assert waiting.wait(PATIENCE_SECONDS), "the other one says nothing"
        return scratch / "model.gguf"

    def convert(gguf: Path, folder: Path) -> None:
        made.append(gguf)
        (folder / "config.json").write_text("{}")

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("waiting"):
            waiting.set()

    monkeypatch.setattr(demo, "find_spec", lambda name: True)
    monkeypatch.setattr(demo, "_fetch_gguf", fetch)
    monkeypatch.setattr(demo, "_convert", convert)
    monkeypatch.setattr(console, "info", say)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(demo.fetch_smollm2, tmp_path)
        assert fetching.wait(PATIENCE_SECONDS)
        second = threads.submit(demo.fetch_smollm2, tmp_path)
        assert first.result() == second.result() == tmp_path / demo.BASE_NAME
    assert len(made) == 1
    assert said[0] == f"waiting for another process, which is making {tmp_path / demo.BASE_NAME}"
    assert (tmp_path / demo.BASE_NAME / "config.json").exists()
    assert demo.fetch_smollm2(tmp_path) == tmp_path / demo.BASE_NAME
    assert len(made) == 1
