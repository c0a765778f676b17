"""Settings that cannot be kept: refused before any work, with what would do."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from pcscale.base.mapped import MappedBase
from pcscale.base.resolve import resolve_base
from pcscale.families.widths import make_plan
from pcscale.projection.layout import record_bytes, record_format
from tests.jobs.together import TOGETHER, DiskUsage, wide, yaml
from tests.runs import (
    World,
    invoke,
    metrics,
    refusal,
    run_config,
    run_values,
    write_yaml,
)

__all__ = ["wide", "yaml"]

pytestmark = [
    pytest.mark.usefixtures("no_plots"),
    pytest.mark.filterwarnings("ignore:create_dynamic_map"),  # bitsandbytes calls its own deprecated function.
]


def test_hard_pruning_has_no_records_to_put_anywhere(wide: World, run: Path) -> None:
    yaml = write_yaml(run.parent / "run.yaml", run_values(wide, run, method="hard_prune", residency="disk"))
    message = "residency has no meaning with method hard_prune, which has no records: remove it."
    assert refusal("compress", yaml) == f"{yaml}: {message}"
    assert not run.exists()


def test_gradients_of_a_float32_model_are_float32(wide: World, run: Path) -> None:
    yaml = write_yaml(run.parent / "run.yaml", run_values(wide, run, gradient_dtype="bfloat16"))
    message = "gradient_dtype bfloat16 needs bf16: true: gradients of a float32 model are float32."
    assert refusal("compress", yaml) == f"{yaml}: {message}"
    assert not run.exists()


def test_a_rank_that_saves_nothing_is_refused_with_the_largest_that_does(wide: World, run: Path, yaml: Path) -> None:
    said = refusal("compress", yaml, "projection_rank=90")
    match = re.fullmatch(
        r"projection_rank 90 saves nothing: the factors of a D would hold more values than D\. "
        r"Give at most (\d+), or full\.",
        said,
    )
    assert match is not None, said
    assert not run.exists()
    largest = int(match[1])
    assert "saves nothing" in refusal("compress", yaml, f"projection_rank={largest + 1}", "--dry-run")
    assert invoke("compress", yaml, f"projection_rank={largest}", "--dry-run").exit_code == 0
    plan = make_plan_of(wide, run)
    pairs = {
        (big, small)
        for planned in plan.matrices
        for big, small in zip(planned.base_shape, planned.shape, strict=True)
        if big != small
    }
    assert all(largest * (big + small) < big * small for big, small in pairs)
    assert any((largest + 1) * (big + small) >= big * small for big, small in pairs)


def make_plan_of(wide: World, run: Path) -> Any:
    config = run_config(wide, run, **TOGETHER)
    base = MappedBase(resolve_base(config.base))
    return make_plan(base.family, base.config, config)


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_too_little_pinned_memory_is_refused_before_the_first_step_with_the_least(
    home: str, wide: World, run: Path, yaml: Path
) -> None:
    plan, form = make_plan_of(wide, run), record_format(run_config(wide, run, **TOGETHER))
    sizes = [record_bytes(planned, form) for planned in plan.matrices]
    need = sum(sizes) if home == "cpu" else max(sizes)
    said = refusal("compress", yaml, f"residency={home}", f"pinned_memory={need // 2}", exit_code=3)
    assert said.startswith("pinned_memory ")
    least = int(said.split()[-2])
    # Between records there may be a little room, so that each begins where every dtype may begin.
    assert need <= least <= need + 512 * len(sizes)
    assert said.endswith(f"Give at least {least} bytes.")
    refusal("compress", yaml, f"residency={home}", f"pinned_memory={least - 1}", exit_code=3)
    assert not run.exists()
    outcome = invoke("compress", yaml, f"residency={home}", f"pinned_memory={least}", "max_steps=2")
    assert outcome.exit_code == 0, outcome.stderr
    assert len(metrics(run)) == 2


def test_too_little_disk_for_the_records_is_refused_before_anything_is_written(
    wide: World, run: Path, yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, form = make_plan_of(wide, run), record_format(run_config(wide, run, **TOGETHER))
    sizes = [record_bytes(planned, form) for planned in plan.matrices]
    needed = sum(sizes) + sum(set(sizes))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**12, 0, needed - 1000))
    said = refusal("compress", yaml, exit_code=1)
    assert said.endswith("Free at least 1000 bytes more, or choose another output.")
    assert not run.exists()
    assert invoke("compress", yaml, "residency=cpu", "--dry-run", "--force").exit_code == 0
