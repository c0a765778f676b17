"""The memory of a run as a script: tables for people, one document for programs, the report written anew."""

import json
from pathlib import Path

import pytest

from tests.merging.trained import run_python
from tests.reporting.run_folder import FINISHED, OLD, write_run

SCRIPT = "tools/memory_report.py"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", FINISHED)


def test_it_prints_predicted_beside_measured_and_rewrites_the_report(run: Path) -> None:
    found = run_python(SCRIPT, run)
    assert found.returncode == 0, found.stderr
    lines = [" ".join(line.split()) for line in found.stdout.splitlines()]
    assert "Parts of train" in lines
    assert "working memory host 762.0 MiB 652.3 MiB +16.8%" in lines
    assert "this run 3.2 GiB measured 1.00 × all of it, at its peak" in lines
    assert "3 GB after a change residency: cpu, moments: 8bit" in lines
    assert (run / "report.html").exists()
    assert (run / "plots" / "memory_over_time.png").exists()


def test_json_is_the_memory_part_of_report_json(run: Path) -> None:
    found = run_python(SCRIPT, run, "--json")
    assert found.returncode == 0, found.stderr
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    printed = json.loads(found.stdout)
    assert printed == {key: report[key] for key in printed}
    assert printed["phases"]["train"]["components"]["records"]["measured_bytes"] == 804_000_000
    assert {"peak", "phases", "alternatives", "devices", "step_seconds", "limits"} <= printed.keys()
    assert "evaluation" not in printed


def test_an_old_run_has_its_peaks(tmp_path: Path) -> None:
    found = run_python(SCRIPT, write_run(tmp_path / "run", OLD))
    assert found.returncode == 0, found.stderr
    assert "Peak of each phase" in found.stdout
    assert "Parts of train" not in found.stdout


def test_a_folder_that_is_no_run_exits_with_2(tmp_path: Path) -> None:
    found = run_python(SCRIPT, tmp_path)
    assert found.returncode == 2
    assert found.stderr.startswith(f"pcscale: {tmp_path} is not a run folder: it has no run.yaml")
    assert list(tmp_path.iterdir()) == []
