"""Memory over time: right sums, phases, predictions and limits, and nothing drawn where there is nothing to draw."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from pcscale.reporting.memory_plot import plot_memory_over_time
from pcscale.run.record import RunRecord, Sample
from tests.reporting.run_folder import PLAN, USAGE, write_document

GIB = 2**30


def drawn(record: RunRecord) -> Figure:
    figure = plot_memory_over_time(record)
    assert figure is not None
    return figure


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def layers(figure: Figure, panel: int = 0) -> list[np.ndarray]:
    """The outlines of a stack's layers, `[points, 2]`."""
    stacked = (part for part in figure.axes[panel].collections if isinstance(part, PolyCollection))
    return [np.asarray(part.get_paths()[0].vertices) for part in stacked]


def predictions(figure: Figure, panel: int = 0) -> list[list[list[float]]]:
    """Begin and end of each dashed line."""
    (lines,) = (part for part in figure.axes[panel].collections if isinstance(part, LineCollection))
    return [np.asarray(segment).tolist() for segment in lines.get_segments()]


def phase_names(figure: Figure) -> list[str]:
    (above,) = figure.axes[0].child_axes
    return [label.get_text() for label in above.get_xticklabels()]


def sample(seconds: float, phase: str = "train", **host: int) -> Sample:
    return Sample(seconds, phase, None, host, {})


def test_the_layers_add_up_to_what_was_held(run: Path) -> None:
    record = RunRecord.read(run)
    totals = [entry.total / GIB for entry in record.samples]
    outlines = layers(drawn(record))
    assert max(outline[:, 1].max() for outline in outlines) == pytest.approx(max(totals))
    for time, total in zip((0.0, 30.0 / 60, 52.5 / 60), (totals[0], totals[4], totals[7]), strict=True):
        above = [outline[np.isclose(outline[:, 0], time), 1].max() for outline in outlines]
        assert max(above) == pytest.approx(total)


def test_the_legend_reads_like_the_stack(run: Path) -> None:
    assert legend(drawn(RunRecord.read(run))) == [
        "working memory",
        "hidden states",
        "norms and biases",
        "gradients",
        "compressed weights",
        "moments",
        "records",
        "libraries",
        "predicted peak",
        "host limit, 4.0 GiB",
    ]


def test_a_component_that_nobody_knows_is_drawn_too(run: Path) -> None:
    samples = [sample(0.0, records=1000, novelty=500), sample(9.0, records=1000, novelty=500)]
    assert set(legend(drawn(replace(RunRecord.read(run), samples=samples)))[:2]) == {"novelty", "records"}


@pytest.mark.parametrize(("limit_bytes", "shown"), [(4 * GIB, True), (400 * GIB, False), (None, False)])
def test_a_limit_is_drawn_where_it_is_near(run: Path, limit_bytes: int | None, shown: bool) -> None:
    usage = copy.deepcopy(USAGE)
    usage["limits"]["host_bytes"] = limit_bytes
    write_document(run, "usage.json", usage)
    figure = drawn(RunRecord.read(run))
    assert any("limit" in label for label in legend(figure)) is shown
    assert figure.axes[0].get_ylim()[1] < 5


def test_each_phase_is_covered_by_its_predicted_peak(run: Path) -> None:
    record = RunRecord.read(run)
    ends = [entry.seconds / 60 for entry in record.samples if entry.phase == "train"]
    calibrate, train, merge = predictions(drawn(record))  # The peak of evaluations is not predicted.
    peaks = {name: peak["host_bytes"] / GIB for name, peak in PLAN["peak"].items()}
    assert calibrate == [[0.0, pytest.approx(peaks["calibrate"])], [ends[0], pytest.approx(peaks["calibrate"])]]
    assert train[0] == [ends[0], pytest.approx(peaks["train"])]
    assert train[1][0] == merge[0][0] >= ends[-1]
    assert merge[0][1] == pytest.approx(peaks["merge"])


def test_phases_are_named_in_their_order(run: Path) -> None:
    samples = [sample(float(time), phase, records=GIB) for time, phase in enumerate(["calibrate", "train", "merge"])]
    samples.append(sample(3.0, "merge", records=GIB))
    record = replace(RunRecord.read(run), samples=samples)
    assert phase_names(drawn(record)) == ["calibrate", "train", "merge"]


def test_phases_that_crowd_share_a_label(run: Path) -> None:
    assert phase_names(drawn(RunRecord.read(run))) == ["calibrate, train", "merge, evaluate"]


def test_phases_that_come_again_and_again_have_a_label_of_bounded_length(run: Path) -> None:
    samples = [sample(float(number), ("train", "evaluate")[number % 2], records=GIB) for number in range(80)]
    names = phase_names(drawn(replace(RunRecord.read(run), samples=samples)))
    assert len(names) < 10
    assert set(names) <= {"train, evaluate", "evaluate, train"}


def test_a_device_has_a_panel_of_its_own(gpu_run: Path) -> None:
    figure = drawn(RunRecord.read(gpu_run))
    titles = [axes.get_title(loc="center") or axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Host memory over the run", "Device memory over the run"]
    assert "device limit, 4.0 GiB" in legend(figure)
    assert max(outline[:, 1].max() for outline in layers(figure, panel=1)) > 2


@pytest.mark.parametrize(
    ("last", "unit"), [(299.0, "seconds"), (301.0, "minutes"), (10_799.0, "minutes"), (10_801.0, "hours")]
)
def test_time_has_a_unit_that_suits_the_run(run: Path, last: float, unit: str) -> None:
    samples = [sample(0.0, records=GIB), sample(last, records=GIB)]
    assert drawn(replace(RunRecord.read(run), samples=samples)).axes[0].get_xlabel() == unit


@pytest.mark.parametrize(
    "samples",
    [[], [sample(3.0, records=5)], [sample(0.0), sample(1.0)], [sample(0.0, records=0), sample(1.0, records=0)]],
)
def test_a_series_without_anything_to_show_is_left_out(run: Path, samples: list[Sample]) -> None:
    assert plot_memory_over_time(replace(RunRecord.read(run), samples=samples)) is None
