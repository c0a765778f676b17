"""The page in a real browser: nothing complains, every plot is drawn, every text can be read; few sheets on paper."""

from pathlib import Path
from typing import Any

import pytest

from pcscale.reporting.report import write_report
from tests.reporting.browser import CHROMIUM, WIDTH, look_at, printed_pages
from tests.reporting.run_folder import FINISHED, OLD, on_gpu, write_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

LEAST_CONTRAST = 4.5  # Web Content Accessibility Guidelines 2.2, 1.4.3
LEAST_FONT_PIXELS = 11.0
MOST_SHEETS = 10
RUNS = {"finished": FINISHED, "gpu": on_gpu(), "old": OLD, "begun": {}}

Opened = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module", params=RUNS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A run folder with its report, and what the browser saw in it."""
    folder = tmp_path_factory.mktemp("browser")
    run = write_run(folder / "run", RUNS[request.param])
    write_report(run)
    return run, look_at(run / "report.html", folder)


def test_the_console_stays_empty(opened: Opened) -> None:
    assert opened[1]["console"] == []


def test_every_plot_is_decoded_and_shown(opened: Opened) -> None:
    run, found = opened
    images = found["images"]
    assert len(images) == len(list((run / "plots").glob("*.png")))
    assert all(image["decoded"] and image["natural"] > image["shown"] > 300 and image["alt"] for image in images), (
        images
    )


def test_every_text_can_be_read(opened: Opened) -> None:
    texts = opened[1]["texts"]
    assert len(texts) > 30
    assert [text for text in texts if text["contrast"] < LEAST_CONTRAST or text["size"] < LEAST_FONT_PIXELS] == []


def test_nothing_is_wider_than_the_window(opened: Opened) -> None:
    found = opened[1]
    assert found["width"] == WIDTH
    assert found["pageWidth"] <= WIDTH
    assert found["wide"] == []


def test_it_prints_on_few_sheets(opened: Opened, tmp_path: Path) -> None:
    assert 1 < printed_pages(opened[0] / "report.html", tmp_path) <= MOST_SHEETS


def test_the_probe_sees_what_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<!doctype html><body><p style="color: #999; background: #fff">pale</p><p style="font-size: 9px">tiny</p>'
        '<p>fine</p><div style="width: 1500px">wide</div><div style="width: 50px; overflow-x: auto">'
        '<p style="width: 90px">cut</p></div><img alt="broken" src="data:image/png;base64,AAAA">'
        '<script>console.error("complaint");</script></body>',
        encoding="utf-8",
    )
    found = look_at(bad, tmp_path)
    assert [image["decoded"] for image in found["images"]] == [False]
    assert {text["text"] for text in found["texts"] if text["contrast"] < LEAST_CONTRAST} == {"pale"}
    assert {text["text"] for text in found["texts"] if text["size"] < LEAST_FONT_PIXELS} == {"tiny"}
    assert found["wide"] == ["DIV: wide", "DIV: cut"]
    assert found["pageWidth"] > WIDTH
    assert len(found["console"]) == 1
    assert "complaint" in found["console"][0]
