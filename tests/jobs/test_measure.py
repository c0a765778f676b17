"""Measuring a machine: real steps of a tiny base give rates, and leave nothing behind."""

from pathlib import Path

import pytest
import torch

from pcscale.common.errors import RequestError
from pcscale.common.ledger import ledger
from pcscale.jobs import measure
from pcscale.memory.speed import read_speed, write_speed


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements that take no time."""
    for name, value in {
        "SHAPES": {"cpu": (32, 48, 16), "cuda": (32, 48, 16)},
        "VOCAB": 64,
        "SEQUENCE": 8,
        "FILE_BYTES": 2**23,
        "COPY_BYTES": 2**20,
        "RUNS": 1,
    }.items():
        monkeypatch.setattr(measure, name, value)


def test_a_tiny_measurement_gives_every_rate_and_leaves_nothing(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    speed = measure.measure_speed(tmp_path / "scratch")
    assert speed.on_gpu == torch.cuda.is_available()
    assert not list((tmp_path / "scratch").iterdir())
    assert ledger.listener is None
    assert torch.equal(torch.random.get_rng_state(), before), "a run that follows must not draw other numbers"
    write_speed(tmp_path / "speed.json", speed)
    assert read_speed(tmp_path / "speed.json") == speed, "every rate is positive and finite"


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="a part of this path is a file"):
        measure.measure_speed(tmp_path / "file" / "below")
