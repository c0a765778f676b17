"""Looks of all plots: colours, style, units; drawn without pyplot."""

import io
import warnings

from cycler import cycler
from matplotlib import rc_context
from matplotlib.figure import Figure

GIB = 2**30
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#1F2937")
"""Okabe and Ito's, told apart with any colour vision, and ink."""
BLUE, VERMILLION, *_, INK = COLOURS
GREY = "#6B7280"
LINES = cycler(linestyle=["-", "--", ":", "-."]) * (cycler(color=COLOURS) + cycler(marker=list("osD^vPX")))
"""Colour and marker change from line to line, the style of the line when all colours are used."""
styled = rc_context(
    {
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "font.size": 9,
        "grid.color": "#E5E7EB",
        "hatch.color": "white",
        "legend.frameon": False,
        "lines.markersize": 4.5,
        "text.parse_math": False,
    }
)
"""Decorates a function that makes a figure."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure. Units: inches; 10.4 is the width of the page."""
    return Figure(figsize=(width, height), layout="constrained")


def time_unit(longest_seconds: float) -> tuple[float, str]:
    """Seconds of the unit that suits a time axis, and its name."""
    if longest_seconds < 300:
        return 1.0, "seconds"
    return (60.0, "minutes") if longest_seconds < 3 * 3600 else (3600.0, "hours")


def png(figure: Figure) -> bytes:
    """The figure as a PNG file. Letters that the font lacks are boxes."""
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure.savefig(image, format="png", dpi=180)
    return image.getvalue()
