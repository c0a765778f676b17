"""Curves and bars: right values, gaps where steps were skipped, nothing where there is nothing to draw."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from pcscale.reporting.plots import (
    CURVES,
    PLOTS,
    figures,
    plot_bytes_per_step,
    plot_loss,
    plot_memory_by_component,
    plot_tokens_per_second,
)
from pcscale.run.record import RunRecord
from tests.reporting.run_folder import EVALUATION, SKIPPED_STEP, STEPS, metrics, write_metrics

GIB = 2**30


def texts(figure: Figure | None) -> list[str]:
    """The texts beside the bars, from above."""
    assert figure is not None
    return [text.get_text() for text in sorted(figure.axes[0].texts, key=lambda text: text.xy[1])]


def names(figure: Figure | None) -> list[str]:
    assert figure is not None
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_the_loss_plot_shows_training_held_out_and_base(run: Path) -> None:
    training, held_out, base = plot_loss(RunRecord.read(run)).axes[0].get_lines()
    losses = np.asarray(training.get_ydata(), dtype=float)
    assert len(losses) == STEPS
    assert np.flatnonzero(np.isnan(losses)).tolist() == [SKIPPED_STEP - 1]
    evaluated = [step for step in metrics(STEPS) if "eval_loss" in step]
    assert np.asarray(held_out.get_xdata()).tolist() == [0, *(step["step"] for step in evaluated)]
    assert np.asarray(held_out.get_ydata()).tolist() == [
        EVALUATION["start"]["loss"],
        *(step["eval_loss"] for step in evaluated),
    ]
    assert set(base.get_ydata()) == {EVALUATION["base"]["loss"]}


def test_speed_is_the_tokens_of_a_step_over_its_seconds(run: Path) -> None:
    record = RunRecord.read(run)
    speed = np.asarray(plot_tokens_per_second(record).axes[0].get_lines()[0].get_ydata(), dtype=float)
    np.testing.assert_allclose(speed, [16_384 / step.seconds for step in record.steps])


@pytest.mark.parametrize("name", CURVES)
def test_every_step_of_a_long_run_is_on_the_curve(bare_run: Path, name: str) -> None:
    write_metrics(bare_run, metrics(20_001))
    axes = CURVES[name](RunRecord.read(bare_run)).axes[0]
    assert len(np.asarray(axes.get_lines()[0].get_xdata())) == 20_001
    assert axes.get_title(loc="center") or axes.get_title(loc="left")
    assert axes.get_xlabel() == "optimizer step"
    assert axes.get_ylabel()


@pytest.mark.parametrize("name", CURVES)
def test_a_run_whose_only_step_was_skipped_can_be_drawn(bare_run: Path, name: str, tmp_path: Path) -> None:
    write_metrics(bare_run, [metrics(STEPS)[SKIPPED_STEP - 1]])
    CURVES[name](RunRecord.read(bare_run)).savefig(tmp_path / "plot.png")


def test_a_pair_of_bars_shows_sizes_and_their_difference(run: Path) -> None:
    figure = plot_memory_by_component(RunRecord.read(run))
    assert names(figure)[0] == "libraries"
    assert texts(figure)[:2] == ["448.2 MiB", "433.9 MiB, -3.2%"]
    assert names(figure)[-1] == "working memory"
    assert texts(figure)[-2:] == ["652.3 MiB", "762.0 MiB, +16.8%"]
    assert figure is not None
    predicted, measured = figure.axes[0].containers[:2]
    assert [bars[0].get_width() for bars in (predicted, measured)] == pytest.approx([470e6 / GIB, 455e6 / GIB])


def test_a_size_that_was_not_measured_is_named(gpu_run: Path) -> None:
    assert texts(plot_bytes_per_step(RunRecord.read(gpu_run))) == [
        *("256.5 MiB", "257.5 MiB, +0.4%"),
        *("190.7 MiB", "200.3 MiB, +5.0%"),
        *("515.0 MiB", "not measured"),
    ]


def test_a_run_that_has_hardly_begun_has_its_curves_and_what_it_moved(bare_run: Path) -> None:
    assert list(figures(RunRecord.read(bare_run))) == [*CURVES, "bytes_per_step"]


@pytest.mark.parametrize("fixture", ["run", "gpu_run"])
def test_every_plot_of_a_finished_run_is_drawn(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    found = figures(RunRecord.read(request.getfixturevalue(fixture)))
    assert list(found) == list(PLOTS)
    for name, figure in found.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=40)
        assert all(axes.has_data() for axes in figure.axes)
