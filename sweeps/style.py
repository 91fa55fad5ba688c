"""The one look of all figures: sizes of a two-column paper, colours that colour-blind readers tell apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLUMN_INCHES",
    "MARKERS",
    "NEUTRAL",
    "PAGE_INCHES",
    "PALETTE",
    "marker_and_color",
    "new_figure",
    "style",
]

COLUMN_INCHES = 3.5
"""Width of one column of a two-column paper."""
PAGE_INCHES = 7.0
"""Width of both columns."""

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
"""Source: Okabe and Ito, "Color Universal Design", 2008; in an order that keeps neighbours in a stack apart."""
NEUTRAL = "#8C8C8C"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same figure on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.0,
    "legend.columnspacing": 1.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "grid.color": "#D9D9D9",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.0,
    "lines.markersize": 4.0,
    "hatch.linewidth": 0.5,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType: text in the PDF stays text
    "svg.fonttype": "path",
    "svg.hashsalt": "hwsim",
}


@contextmanager
def style() -> Iterator[None]:
    """The look, while figures are made and saved; matplotlib's settings are the user's again afterwards."""
    with matplotlib.rc_context(_RC):
        yield


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure without pyplot: no window, no global list of figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def marker_and_color(index: int) -> tuple[str, str]:
    """The look of the index-th series: 64 that differ, the first eight in both marker and colour."""
    return MARKERS[(index + index // len(PALETTE)) % len(MARKERS)], PALETTE[index % len(PALETTE)]
