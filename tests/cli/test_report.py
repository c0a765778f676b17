"""`pcscale report`: the page of a run written anew, its document, and the tables of its memory."""

import json
from pathlib import Path

import pytest

from tests.reporting.run_folder import FINISHED, write_run
from tests.runs import invoke, refusal


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", FINISHED)


def test_it_writes_the_report_and_prints_where_it_is(run: Path) -> None:
    outcome = invoke("report", run)
    assert (outcome.exit_code, outcome.stdout) == (0, f"{run / 'report.html'}\n")
    assert (run / "report.html").exists()
    assert (run / "plots" / "memory_over_time.png").exists()


def test_memory_is_printed_predicted_beside_measured(run: Path) -> None:
    outcome = invoke("report", run, "--memory")
    assert outcome.exit_code == 0
    lines = [" ".join(line.split()) for line in outcome.stdout.splitlines()]
    assert "Peak of each phase" in lines
    assert "Parts of train" in lines
    assert "Stages of training" in lines
    assert "working memory host 762.0 MiB 652.3 MiB +16.8%" in lines
    assert "this run 3.2 GiB measured 1.00 × all of it, at its peak" in lines
    assert "3 GB after a change residency: cpu, moments: 8bit" in lines
    assert outcome.stdout.endswith(f"{run / 'report.html'}\n")


def test_json_is_report_json(run: Path) -> None:
    printed = json.loads(invoke("report", run, "--json", "--memory").stdout)
    assert printed == json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert printed["phases"]["train"]["components"]["records"]["measured_bytes"] == 804_000_000


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    assert refusal("report", tmp_path, "--memory").startswith(
        f"{tmp_path} is not a run folder: it has no run.yaml, expected run.yaml and metrics.jsonl."
    )
    assert list(tmp_path.iterdir()) == []
