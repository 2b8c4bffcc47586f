"""Define what all figures share: size, colours that colour-blind readers can tell apart, and two themes.

Figures are drawn once for light and once for dark pages, as SVG, at the width of a column of text. Blue and filled is
always what was measured here, orange and hollow or hatched what others published.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes

WIDTH = 5.2  # inches: type of 9 points stays legible on a phone
DPI = 150  # of matrices, which are pictures inside the SVG


class Theme(NamedTuple):
    """Colours of a page and of its series, from Okabe and Ito's palette, lighter on dark pages."""

    name: str
    text: str
    faint: str
    ours: str
    published: str
    third: str
    fourth: str
    fill: str


LIGHT = Theme("light", "#1f2328", "#b6bec8", "#0072b2", "#d55e00", "#009e73", "#9a4f82", "#eef3f7")
DARK = Theme("dark", "#e6e6e6", "#5a626c", "#56b4e9", "#f0a030", "#2dc79a", "#e39cc8", "#262b31")
THEMES = (LIGHT, DARK)


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """Set Matplotlib up for a theme, so that a drawing depends on nothing but the data."""
    settings = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.5,
        "grid.color": theme.faint,
        "grid.alpha": 0.5,
        "lines.linewidth": 1.6,
        "lines.markersize": 5.5,
        "hatch.linewidth": 0.7,
        "svg.fonttype": "path",
        "svg.hashsalt": "littlebit",
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "savefig.dpi": DPI,
    }
    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    with matplotlib.rc_context(settings | dict.fromkeys(coloured, theme.text)):
        yield


def bits_axis(axes: Axes, ticks: tuple[float, ...] = (0.1, 0.3, 0.55, 1.0)) -> None:
    """Make the horizontal axis logarithmic in bits per weight, with the usual budgets as ticks."""
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("stored bits per weight")


def log_axis(axes: Axes, ticks: tuple[float, ...]) -> None:
    """Make the vertical axis logarithmic, with plain numbers as ticks."""
    axes.set_yscale("log")
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.minorticks_off()
