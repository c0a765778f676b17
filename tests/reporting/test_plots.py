"""Curves: right values, bounded size, gaps where steps were skipped."""

from pathlib import Path

import numpy as np
import pytest

from pcscale.reporting.drawing import MAX_POINTS, downsample, smooth
from pcscale.reporting.plots import CURVES, plot_loss, plot_tokens_per_second
from pcscale.reporting.run_data import read_run
from tests.reporting.run_folder import EVALUATION, SKIPPED_STEP, STEPS, metrics, write_metrics


def test_downsampling_leaves_a_short_series_alone() -> None:
    x = np.arange(MAX_POINTS, dtype=float)
    assert downsample(x, x)[1] is x


@pytest.mark.parametrize("count", [MAX_POINTS + 1, 4_000, 123_457])
def test_downsampling_bounds_a_long_series_and_keeps_its_means(count: int) -> None:
    x = np.arange(1, count + 1, dtype=float)
    short_x, short_y = downsample(x, 3 * x)
    assert len(short_x) == len(short_y) <= MAX_POINTS
    np.testing.assert_allclose(short_y, 3 * short_x)
    assert short_x[0] >= x[0]
    assert short_x[-1] <= x[-1]


def test_a_bucket_is_the_mean_of_what_is_there_and_a_gap_without_anything() -> None:
    y = np.array([1.0, np.nan, 3.0, 5.0, np.nan, np.nan, 7.0])
    short_x, short_y = downsample(np.arange(7.0), y, max_points=4)
    np.testing.assert_array_equal(short_x, [0.5, 2.5, 4.5, 6.0])
    np.testing.assert_array_equal(short_y, [1.0, 4.0, np.nan, 7.0])


def test_smoothing_averages_neighbours_and_keeps_gaps() -> None:
    np.testing.assert_allclose(smooth(np.array([1.0, 3.0, 5.0, np.nan, 2.0]), 3), [2.0, 3.0, 4.0, np.nan, 2.0])


def test_the_loss_plot_shows_training_held_out_and_base(run: Path) -> None:
    training, held_out, base = plot_loss(read_run(run)).axes[0].get_lines()
    losses = np.asarray(training.get_ydata(), dtype=float)
    assert len(losses) == STEPS
    assert np.flatnonzero(np.isnan(losses)).tolist() == [SKIPPED_STEP - 1]
    assert np.asarray(held_out.get_xdata())[0] == 0
    assert np.asarray(held_out.get_ydata())[0] == EVALUATION["start"]["loss"]
    assert set(base.get_ydata()) == {EVALUATION["base"]["loss"]}


def test_speed_is_the_tokens_of_a_step_over_its_seconds(run: Path) -> None:
    data = read_run(run)
    speed = np.asarray(plot_tokens_per_second(data).axes[0].get_lines()[0].get_ydata(), dtype=float)
    np.testing.assert_allclose(speed, [16_384 / step.seconds for step in data.steps])


@pytest.mark.parametrize("name", CURVES)
def test_a_long_run_is_drawn_with_few_points(bare_run: Path, name: str) -> None:
    write_metrics(bare_run, metrics(20_001))
    axes = CURVES[name](read_run(bare_run)).axes[0]
    assert axes.get_lines()
    assert all(len(np.asarray(line.get_xdata())) <= MAX_POINTS for line in axes.get_lines())
    assert axes.get_title(loc="left")
    assert axes.get_xlabel()
    assert axes.get_ylabel()


@pytest.mark.parametrize("name", CURVES)
def test_a_run_whose_only_step_was_skipped_can_be_drawn(bare_run: Path, name: str, tmp_path: Path) -> None:
    write_metrics(bare_run, [metrics(STEPS)[SKIPPED_STEP - 1]])
    CURVES[name](read_run(bare_run)).savefig(tmp_path / "plot.png")
