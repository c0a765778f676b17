"""Plots of memory: right sums, bounded size, and nothing drawn where there is nothing to draw."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

from pcscale.reporting.bar_plots import plot_bytes_per_step, plot_memory_by_component, plot_step_time
from pcscale.reporting.drawing import GIB, MAX_POINTS
from pcscale.reporting.memory_plots import OTHERS, plot_memory_over_time, spread, thin
from pcscale.reporting.plots import PLOTS, figures
from pcscale.reporting.run_data import RunData, Sample, read_run
from tests.reporting.memory_run import memory_document
from tests.reporting.run_folder import PLAN, USAGE, write_document


def drawn(data: RunData) -> Figure:
    figure = plot_memory_over_time(data)
    assert figure is not None
    return figure


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def layers(figure: Figure, panel: int = 0) -> list[np.ndarray]:
    """The outlines of a stack's layers, `[points, 2]`."""
    stacked = (part for part in figure.axes[panel].collections if isinstance(part, PolyCollection))
    return [np.asarray(part.get_paths()[0].vertices) for part in stacked]


def sample(seconds: float, phase: str = "train", **host: int) -> Sample:
    return Sample(seconds, phase, None, {name.replace("_", " "): size for name, size in host.items()}, {})


@pytest.mark.parametrize("count", [1, MAX_POINTS, MAX_POINTS + 1, 2_500, 10_001])
def test_a_series_is_thinned_to_its_bound_and_keeps_its_peak(count: int) -> None:
    samples = [sample(float(number), records=number % 977) for number in range(count)]
    kept = thin(samples)
    assert len(kept) <= MAX_POINTS
    assert max(entry.host["records"] for entry in kept) == max(entry.host["records"] for entry in samples)
    assert all(first.seconds < second.seconds for first, second in itertools.pairwise(kept))


def test_a_long_series_is_drawn_with_few_points(run: Path) -> None:
    write_document(run, "memory.json", memory_document(samples_per_moment=80))
    data = read_run(run)
    assert data.memory is not None
    assert len(data.memory) > 5_000
    outlines = layers(drawn(data))
    assert len(outlines) >= 5
    # Along the top, back along the bottom, and the corners.
    assert all(len(outline) <= 2 * MAX_POINTS + 3 for outline in outlines)


def test_the_layers_add_up_to_what_was_held(run: Path) -> None:
    data = read_run(run)
    assert data.memory is not None
    highest = max(sum(entry.host.values()) for entry in data.memory) / GIB
    # What is too thin to be seen is not drawn.
    assert max(outline[:, 1].max() for outline in layers(drawn(data))) == pytest.approx(highest, rel=0.01)


def test_the_legend_reads_like_the_stack(run: Path) -> None:
    assert legend(drawn(read_run(run))) == [
        "working memory",
        "hidden states",
        "gradients",
        "compressed weights",
        "moments",
        "records",
        "libraries",
        "predicted peak",
        "host limit, 4.0 GiB",
    ]


def test_thin_layers_that_can_be_seen_together_are_one(run: Path) -> None:
    names = {f"part_{number}": 8 for number in range(5)}
    data = replace(read_run(run), memory=(sample(0.0, records=1000, **names), sample(9.0, records=1000, **names)))
    assert legend(drawn(data))[:2] == [OTHERS, "records"]


@pytest.mark.parametrize(("limit_bytes", "shown"), [(4 * GIB, True), (400 * GIB, False), (None, False)])
def test_a_limit_is_drawn_where_it_is_near(run: Path, limit_bytes: int | None, shown: bool) -> None:
    usage = copy.deepcopy(USAGE)
    usage["limits"]["host_bytes"] = limit_bytes
    write_document(run, "usage.json", usage)
    figure = drawn(read_run(run))
    assert any("limit" in label for label in legend(figure)) is shown
    assert figure.axes[0].get_ylim()[1] < 5


def test_phases_are_named_in_their_order_without_overlap(run: Path) -> None:
    figure = drawn(read_run(run))
    figure.draw_without_rendering()
    names = figure.axes[0].texts
    assert [name.get_text() for name in names] == ["calibrate", "train", "merge", "evaluate"]
    boxes = [Text.get_window_extent(name) for name in names]  # Without the line to its band.
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_phases_that_crowd_are_named_as_far_as_there_is_room(run: Path) -> None:
    phases = ["train", "evaluate"] * 40
    samples = [sample(float(number), phase, records=GIB) for number, phase in enumerate(phases)]
    figure = drawn(replace(read_run(run), memory=tuple(samples)))
    assert 3 < len(figure.axes[0].texts) < 20
    figure.draw_without_rendering()


def test_names_move_apart_and_stay_inside() -> None:
    centres = spread([0.01, 0.5, 0.985, 0.99], [0.1, 0.1, 0.1, 0.1], gap=0.02)
    assert centres == pytest.approx([0.05, 0.5, 0.83, 0.95])


def test_a_device_has_a_panel_of_its_own(gpu_run: Path) -> None:
    figure = drawn(read_run(gpu_run))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Host memory over the run", "Device memory over the run"]
    assert "device limit, 4.0 GiB" in legend(figure)
    assert max(outline[:, 1].max() for outline in layers(figure, panel=1)) > 2


def test_a_clock_that_began_anew_goes_on(run: Path) -> None:
    times = [0.0, 50.0, 100.0, 0.0, 50.0]
    samples = tuple(sample(seconds, records=GIB) for seconds in times)
    assert drawn(replace(read_run(run), memory=samples)).axes[0].get_xlim() == (0.0, 150.0)


@pytest.mark.parametrize(
    ("last", "unit"), [(299.0, "seconds"), (301.0, "minutes"), (10_799.0, "minutes"), (10_801.0, "hours")]
)
def test_time_has_a_unit_that_suits_the_run(run: Path, last: float, unit: str) -> None:
    samples = (sample(0.0, records=GIB), sample(last, records=GIB))
    assert drawn(replace(read_run(run), memory=samples)).axes[0].get_xlabel() == unit


@pytest.mark.parametrize("samples", [None, (), (sample(3.0, records=5),), (sample(0.0), sample(1.0))])
def test_a_series_without_anything_to_show_is_left_out(run: Path, samples: tuple[Sample, ...] | None) -> None:
    assert plot_memory_over_time(replace(read_run(run), memory=samples)) is None


def test_a_series_of_zeros_can_be_drawn(run: Path, tmp_path: Path) -> None:
    samples = (sample(0.0, records=0), sample(1.0, records=0))
    drawn(replace(read_run(run), memory=samples)).savefig(tmp_path / "plot.png")


def test_a_pair_of_bars_says_its_difference(run: Path) -> None:
    figure = plot_memory_by_component(read_run(run))
    assert figure is not None
    axes = figure.axes[0]
    said = dict(
        zip((label.get_text() for label in axes.get_yticklabels()), (t.get_text() for t in axes.texts), strict=True)
    )
    assert said["working memory"] == "762.0 MiB, +16.8%"
    assert said["libraries"] == "433.9 MiB, -3.2%"
    widths = [bar.get_width() for container in axes.containers for bar in container]
    assert widths[:2] == pytest.approx([470e6 / GIB, 455e6 / GIB])


def test_what_was_not_measured_is_said(gpu_run: Path) -> None:
    figure = plot_bytes_per_step(read_run(gpu_run))
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "257.5 MiB, +0.4%",
        "200.3 MiB, +5.0%",
        "515.0 MiB,\nnot measured",
    ]


def test_bars_of_time_are_as_long_as_a_step(run: Path) -> None:
    figure = plot_step_time(read_run(run))
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].texts] == ["143 s", "150 s"]
    assert legend(figure) == ["forward", "backward", "forward and backward", "sweep", "motion not hidden"]


def test_time_that_nobody_predicted_is_drawn_alone(run: Path) -> None:
    write_document(run, "plan.json", PLAN | {"step_seconds": None})
    figure = plot_step_time(read_run(run))
    assert figure is not None
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["measured"]


@pytest.mark.parametrize("plot", [plot_memory_over_time, plot_memory_by_component, plot_step_time])
def test_an_old_run_has_no_such_plot(old_run: Path, plot) -> None:
    assert plot(read_run(old_run)) is None


@pytest.mark.parametrize("fixture", ["run", "gpu_run"])
def test_every_plot_of_a_finished_run_is_drawn(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    found = dict(figures(read_run(request.getfixturevalue(fixture))))
    assert list(found) == list(PLOTS)
    for name, figure in found.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=40)
