"""The picture of a comparison: what its lines are, and where it is written and where not."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from pcscale.common.errors import RequestError, RunError
from pcscale.reporting.compare import compare_runs, write_comparison
from pcscale.reporting.drawing import COLOURS
from pcscale.reporting.plots import MARKERS, plot_comparison
from tests.reporting.compared_runs import SECOND, write_compared
from tests.runs import leftovers, snapshot


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [write_compared(tmp_path / "first"), write_compared(tmp_path / "second", SECOND)]


def _lines(figure: Figure, panel: int) -> list[tuple[list[float], list[float]]]:
    lines = figure.axes[panel].get_lines()
    return [(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()) for line in lines]


def test_each_run_is_a_line_by_tokens_and_by_time_with_a_mark_where_all_are_compared(pair: list[Path]) -> None:
    figure = plot_comparison(compare_runs(pair))
    first, second, mark = _lines(figure, 0)
    assert first == ([0, 200, 400], [8.0, 6.0, 5.0])
    assert second[0] == [0, 100, 200, 300, 400, 500]
    assert mark[0] == [400, 400]
    first, second, mark = _lines(figure, 1)
    assert first == ([0.0, 4.0, 12.0], [8.0, 6.0, 5.0])
    assert second[0] == [0.0, 1.0, 2.0, 3.0, 4.0, 9.0]
    assert mark[0] == [9.0, 9.0]
    assert figure.axes[1].get_xlabel() == "seconds of training"


def _comparison(labels: list[str], points: int = 5) -> dict[str, Any]:
    curve = {"tokens": list(range(points)), "seconds": [60.0 * x for x in range(points)], "loss": [3.0] * points}
    runs = [{"label": label, "curve": curve} for label in labels]
    return {"runs": runs, "equal": {"tokens": points - 1, "seconds": 60.0 * (points - 1)}}


AWKWARD = ["_hidden", "$x^{2$", r"$\frac$ $", "a" * 90 + "_end", "plain", "sixth", "seventh", "eighth", "ninth"]


def test_names_are_shown_as_they_are_whatever_they_hold() -> None:
    figure = plot_comparison(_comparison(AWKWARD))
    figure.draw_without_rendering()
    shown = [text.get_text().strip() for text in figure.legends[0].get_texts()]
    assert shown[:3] == AWKWARD[:3]
    assert shown[3].endswith("aa_end")
    assert len(shown) == len(AWKWARD) + 1
    assert shown[-1] == "equal tokens, equal time"


def test_no_two_of_many_runs_look_alike() -> None:
    figure = plot_comparison(_comparison([str(number) for number in range(3 * len(COLOURS))]))
    lines = figure.axes[0].get_lines()[:-1]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 3 * len(COLOURS)


def test_many_evaluations_are_a_line_with_few_markers() -> None:
    figure = plot_comparison(_comparison(["a", "b"], points=5_000))
    line = figure.axes[0].get_lines()[0]
    assert len(np.asarray(line.get_xdata())) == 5_000
    assert line.get_markevery() == 5_000 // MARKERS
    assert figure.axes[1].get_xlabel() == "hours of training"


# Where it is written


def test_the_picture_is_written_and_the_runs_are_left_as_they_are(pair: list[Path], tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    output = tmp_path / "picture.PNG"
    found = write_comparison(pair, output)
    assert output.read_bytes().startswith(b"\x89PNG\r\n")
    assert found == {**compare_runs(pair), "plot": str(output)}
    output.unlink()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("plot.svg", "{here}/plot.svg is not the name of a .png file. Name one, such as compare.png."),
        ("plot", "{here}/plot is not the name of a .png file. Name one, such as compare.png."),
        ("folder.png", "{here}/folder.png is a folder. Name a .png file."),
        ("none/plot.png", "{here}/none is not a folder. Make it, or name another place for plot.png."),
        ("file/plot.png", "{here}/file is not a folder. Make it, or name another place for plot.png."),
        (
            "first/plot.png",
            "{here}/first/plot.png lies in the run {here}/first, which is left as it is. Name a file elsewhere.",
        ),
        (
            "second/plots/loss.png",
            "{here}/second/plots/loss.png lies in the run {here}/second, which is left as it is. Name a file else",
        ),
        (
            "link/plot.png",
            "{here}/link/plot.png lies in the run {here}/second, which is left as it is. Name a file elsewhere.",
        ),
    ],
)
def test_a_place_that_the_picture_must_not_have_is_refused(
    output: str, message: str, pair: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("years of work")
    (pair[1] / "plots").mkdir()
    (tmp_path / "link").symlink_to(pair[1] / "plots")
    before = snapshot(tmp_path)
    with pytest.raises(RequestError) as caught:
        write_comparison(pair, tmp_path / output)
    assert str(caught.value).startswith(message.format(here=tmp_path))
    assert snapshot(tmp_path) == before


def test_a_name_in_letters_that_the_font_lacks_is_no_warning(pair: list[Path], tmp_path: Path) -> None:
    run = write_compared(tmp_path / "測試")
    assert write_comparison([*pair, run], tmp_path / "plot.png")["runs"][2]["label"] == "測試"


def test_a_refused_comparison_leaves_the_old_picture(pair: list[Path], tmp_path: Path) -> None:
    (tmp_path / "plot.png").write_text("years of work")
    (pair[1] / "evaluation.json").unlink()
    with pytest.raises(RequestError, match="is not finished"):
        write_comparison(pair, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_text() == "years of work"


def test_a_full_disk_leaves_the_old_picture(pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "plot.png").write_text("years of work")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"plot\.png: the disk is full\. Nothing was replaced"):
        write_comparison(pair, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_text() == "years of work"
    assert leftovers(tmp_path) == []
