"""The report of a run: whole pages, right figures, nothing fetched."""

import base64
import copy
import json
from pathlib import Path

import pytest

from pcscale.common.errors import RequestError
from pcscale.reporting.plots import CURVES, PLOTS
from pcscale.reporting.report import write_report
from tests.reporting.page_text import Page
from tests.reporting.run_folder import (
    EVALUATION,
    FINISHED,
    MERGE,
    PLAN,
    STEPS,
    TOKENS_PER_STEP,
    USAGE,
    metrics,
    write_document,
    write_metrics,
    write_run,
)

PNG_SIGNATURE = b"\x89PNG"


def test_the_page_is_whole_and_refers_to_nothing_outside(run: Path) -> None:
    write_report(run)
    page = Page(run / "report.html")
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe"})
    references = [attributes[key] for _, attributes in page.tags for key in ("src", "href") if key in attributes]
    assert all(reference and reference.startswith("data:image/png;base64,") for reference in references)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in html


def test_each_plot_is_in_the_page_and_in_a_file(run: Path) -> None:
    write_report(run)
    images = [attributes["src"] for tag, attributes in Page(run / "report.html").tags if tag == "img"]
    files = [(run / "plots" / f"{name}.png").read_bytes() for name in PLOTS]
    assert [base64.b64decode((image or "").partition(",")[2]) for image in images] == files
    assert all(file.startswith(PNG_SIGNATURE) for file in files)


@pytest.fixture(scope="module")
def finished_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of a finished run's page."""
    run = write_run(tmp_path_factory.mktemp("page") / "run", FINISHED)
    write_report(run)
    return Page(run / "report.html").text


@pytest.mark.parametrize(
    "text",
    [
        "acme/tiny-llm",
        "134.5 M to 67.0 M parameters",
        "hidden size 384, intermediate size 1,088",
        "2.914 → 8.272 → 3.441",
        "+0.5275 nats against the base",
        "128.0 MiB",
        "1.1101",
        "24 of 24 steps",
        "skipped steps: 1",
        "1:02:05",
        "+3.0%",
        "Once upon a time",
        "there was a <fox> & a crow.",
        "162.00 G",
        "Imaginary CPU 9000 · 2 cores · 8.0 GiB of memory · no GPU",
        "gradient_accumulation_steps: 8",
        "predicted 3.1 GiB, +3.0%",
        "Limits: 4.0 GiB of host memory (cgroup, memory.max)",
        "projections, gradients and moments in float32 beside base and model",
        "residency: cpu, moments: 8bit",
        "0.74 / 0.49",
        "Device and host memory together",
    ],
)
def test_the_page_shows_what_the_inputs_hold(finished_text: str, text: str) -> None:
    assert text in finished_text


def test_a_finished_run_leaves_nothing_to_wait_for(finished_text: str) -> None:
    assert "has not got to" not in finished_text
    assert "not yet" not in finished_text


def test_report_json_holds_what_is_returned(run: Path) -> None:
    report = write_report(run)
    assert json.loads((run / "report.json").read_text(encoding="utf-8")) == report
    assert report["run"] == str(run)
    assert report["plan"] == PLAN
    assert report["evaluation"] == {key: EVALUATION[key] for key in ("base", "start", "compressed")}
    assert report["merge"] == MERGE
    assert report["peak"] == {
        "host_anonymous": {"predicted_bytes": 3_300_000_000, "measured_bytes": 3_400_000_000},
        "device": None,
    }
    evaluate = report["phases"]["evaluate"]
    assert evaluate["seconds"] == 33.0
    assert evaluate["host_anonymous"] == {"predicted_bytes": None, "measured_bytes": 900_000_000}
    assert (evaluate["device"], evaluate["stages"]) == (None, {})
    assert report["limits"] == USAGE["limits"]
    assert report["devices"] == PLAN["devices"]
    steps = metrics(STEPS)
    assert report["training"] == {
        "steps": STEPS,
        "tokens": STEPS * TOKENS_PER_STEP,
        "seconds": pytest.approx(sum(step["seconds"] for step in steps)),
        "final_loss": steps[-1]["loss"],
        "best_eval_loss": min(step["eval_loss"] for step in steps if "eval_loss" in step),
        "skipped_steps": 1,
    }
    assert report["step_bytes"]["moved"] == {"predicted_bytes": 269_000_000, "measured_bytes": 270_000_000}
    assert set(report["step_seconds"]) == {"measured"}


def test_device_memory_is_reported_where_a_phase_used_one(gpu_run: Path) -> None:
    report = write_report(gpu_run)
    assert report["peak"]["device"] == {"predicted_bytes": 2_830_000_000, "measured_bytes": 2_945_000_000}
    page = Page(gpu_run / "report.html")
    for text in ("peak device memory", "Peak device memory", "+4.1%", "Imaginary GPU", "Limits: 4.0 GiB of device"):
        assert text in page.text


def test_a_run_that_has_only_been_planned_shows_what_was_predicted(run: Path) -> None:
    for name in ("usage.json", "memory.json", "merge.json", "evaluation.json"):
        (run / name).unlink()
    write_metrics(run, [])
    report = write_report(run)
    records = report["phases"]["train"]["components"]["records"]
    assert records == {"home": "host", "predicted_bytes": 804_000_000, "measured_bytes": None}
    assert report["alternatives"]["this run"]["measured_bytes"] is None
    text = Page(run / "report.html").text
    assert "The run has not got to measuring its phases yet." in text
    assert "Stages of training" in text


def test_a_run_of_settings_and_metrics_alone_is_reported(bare_run: Path) -> None:
    report = write_report(bare_run)
    assert report["plan"] is None
    assert report["merge"] is None
    assert report["evaluation"] == {"base": None, "start": None, "compressed": None}
    assert report["peak"] == {"host_anonymous": {"predicted_bytes": None, "measured_bytes": None}, "device": None}
    text = Page(bare_run / "report.html").text
    assert "cut from acme/tiny-llm" in text
    for part in ("the comparison with the base", "the merge", "generating text", "measuring its phases", "its plan"):
        assert f"run has not got to {part} yet" in text
    assert "not got to evaluating this yet: base, start, compressed." in text


def test_a_run_before_its_first_step_has_no_curves(run: Path) -> None:
    write_report(run)
    write_metrics(run, [])
    report = write_report(run)
    assert report["training"]["final_loss"] is None
    plots = {path.stem for path in (run / "plots").iterdir()}
    assert "memory_over_time" in plots
    assert plots.isdisjoint(CURVES)
    assert "The run has not got to its first step yet." in Page(run / "report.html").text


def test_models_that_are_not_evaluated_yet_are_named(run: Path) -> None:
    write_document(run, "evaluation.json", {key: EVALUATION[key] for key in ("base", "start")})
    write_report(run)
    text = Page(run / "report.html").text
    assert "not got to evaluating this yet: compressed." in text
    assert "+5.3581" in text
    assert "nats against the base" not in text


def test_the_control_arm_is_called_so(run: Path) -> None:
    settings = (run / "run.yaml").read_text(encoding="utf-8").replace("method: projected", "method: hard_prune")
    (run / "run.yaml").write_text(settings, encoding="utf-8")
    write_report(run)
    assert "the control arm" in Page(run / "report.html").text


def test_names_and_texts_are_escaped(run: Path) -> None:
    plan, evaluation = copy.deepcopy(PLAN), copy.deepcopy(EVALUATION)
    plan["base"]["name"] = "<b>x</b>"
    evaluation["sample"]["compressed"] = "<script>alert(1)</script>"
    write_document(run, "plan.json", plan)
    write_document(run, "evaluation.json", evaluation)
    write_report(run)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "<b>x</b>" not in html
    assert "&lt;b&gt;x&lt;/b&gt;" in html
    assert "<script" not in html


def test_a_second_report_replaces_the_first(run: Path) -> None:
    write_report(run)
    write_metrics(run, metrics(STEPS)[:10])
    assert write_report(run)["training"]["steps"] == 10
    assert "10 of 24 steps" in Page(run / "report.html").text
    assert not list(run.rglob(".partial-*"))


def test_a_report_of_no_run_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is not a run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
