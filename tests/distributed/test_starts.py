"""A rotated, rebuilt and taught run on two ranks is that of one process."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_resume import TOLERANCE, begin, losses
from tests.runs import World

FORMS: dict[str, dict[str, Any]] = {
    "zero1.json": {},
    "zero3_offload_cpu.json": {"base_home": "zero"},
}


@pytest.mark.parametrize("distill", [{"weight": 0.5}, {"weight": 0.5, "top_k": 8}], ids=["whole", "most likely"])
@pytest.mark.parametrize("file", FORMS)
def test_two_ranks_take_the_steps_of_one_process(
    file: str, distill: dict[str, Any], world: World, tmp_path: Path
) -> None:
    settings = {"start": "pca_least_squares", "importance": "energy", "projection_rates": "per_matrix"}
    runs = [tmp_path / name / "run" for name in ("one", "two")]
    for run, form, own in zip(runs, ((1, None), (2, file)), ({}, FORMS[file]), strict=True):
        run.parent.mkdir()
        codes = begin(world, run, form, distill=distill, max_steps=5, **settings, **own)
        assert set(codes) == {0}, (run.parent / "logs" / "0").read_text()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=TOLERANCE)
