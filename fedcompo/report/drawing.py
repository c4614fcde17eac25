"""Draws figures as SVG that stands within a page and reads on light and on dark ground.

Text, axes and lines have the page's own colour. The same values give the same bytes. Matplotlib is
imported when something is drawn.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from fedcompo.names import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY, GREEN = "#3d7ec7", "#d9822b", "#8a94a0", "#2a9d8f"
INK = "#010203"
"""Stands for the page's own colour of text until a figure is written."""
STRENGTH = 0.75
"""Opacity of a cell of the largest value: figures in it stay readable on both grounds."""
NAMED = 40
"""Rows of points drawn by name; of more, each series is a curve of its sorted values."""
WRITTEN = 20
"""Most rows of a matrix whose cells bear their figures."""
LABEL = 22
"""Characters of a label."""
FONT = "DejaVu Sans"
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold dollar signs
    "font.family": [FONT],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "grid.color": GREY,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}


@dataclass(frozen=True)
class Series:
    """Values in [0, 1] of one kind, a row each; None where there is none."""

    name: str
    colour: str
    values: Sequence[float | None]
    intervals: Sequence[Sequence[float] | None] = ()
    """Low and high of each value."""


def points(title: str, labels: Sequence[str], series: Sequence[Series]) -> Markup:
    """Draw shares in per cent: a row of points for each label, with their intervals.

    Of more than :data:`NAMED` labels, draw each series as a curve of its sorted values.
    """
    named = len(labels) <= NAMED
    ends = [low for one in series for low, _ in filter(None, one.intervals)]
    values = [value for one in series for value in one.values if value is not None]
    first = 10 * math.floor(10 * min(0.8, *ends, *values))  # an axis of few per cent exaggerates

    def paint(axes: Axes) -> None:
        for place, one in enumerate(series):
            shift = (place - (len(series) - 1) / 2) * 0.6 / len(series) if named else 0
            rows = [row + shift for row, value in enumerate(one.values) if value is not None]
            shares = [100 * value for value in one.values if value is not None]
            if not named:
                rows, shares = list(range(len(shares))), sorted(shares)
            for row, between in enumerate(one.intervals if named else ()):
                if between:
                    line = [100 * end for end in between], [row + shift] * 2
                    axes.plot(*line, color=one.colour, lw=1.5, alpha=0.6)
            style: Any = {"color": one.colour, "label": one.name}
            axes.plot(shares, rows, "o" if named else "-", ms=5, **style)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(first - 0.02 * (100 - first), 100 + 0.02 * (100 - first))
        axes.set_xlabel("%")
        axes.grid(axis="x")
        if named:
            axes.set_yticks(range(len(labels)), map(_label, labels))
        else:
            axes.set_ylabel("from the lowest, each curve by itself")
        if len(series) > 1:  # above the axes, where it covers nothing
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.3)

    height = 0.5 + len(labels) * (0.16 + 0.09 * len(series)) if named else 3.2
    return drawn(title, (5.2, height), paint)


def matrix(
    title: str,
    labels: Sequence[str],
    values: Sequence[Sequence[float]],
    texts: Mapping[tuple[int, int], str],
    axes_names: tuple[str, str] = ("", ""),
) -> Markup:
    """Draw a square matrix of values in [-1, 1] as colours: blue, or orange below zero.

    Args:
        title: Of the figure.
        labels: Of rows and columns.
        values: Rows; the larger a value, the stronger the colour.
        texts: What stands in cells, by row and column, if there is room.
        axes_names: Of the columns, and of the rows.
    """
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    array, count = np.array(values, dtype=float), len(labels)
    signed = np.sign(array) * np.sqrt(np.abs(array))
    ends = [(0, (ORANGE, STRENGTH)), (0.5, (ORANGE, 0)), (0.5, (BLUE, 0)), (1, (BLUE, STRENGTH))]
    colours = LinearSegmentedColormap.from_list("", ends, N=2001)
    cell = max(0.11, min(0.5, 6 / count))
    size = min(10.0, 60 * cell)

    def paint(axes: Axes) -> None:
        axes.imshow(signed, colours, interpolation="none", aspect="equal", vmin=-1, vmax=1)
        names = [_label(label) for label in labels]
        axes.set_xticks(range(count), names, rotation=90, fontsize=size)
        axes.set_yticks(range(count), names, fontsize=size)
        axes.tick_params(length=0 if count > WRITTEN else 3)
        axes.set_xlabel(axes_names[0])
        axes.set_ylabel(axes_names[1])
        axes.spines[:].set_visible(True)
        for (row, column), text in texts.items() if count <= WRITTEN else ():
            axes.text(column, row, text, ha="center", va="center", fontsize=min(9, size))

    return drawn(title, (count * cell, count * cell), paint)


def bars(title: str, labels: Sequence[str], panels: Mapping[str, Sequence[float]]) -> Markup:
    """Draw horizontal bars, a row for each label; panels side by side, by title."""

    def paint(*boxes: Axes) -> None:
        for axes, (name, values) in zip(boxes, panels.items(), strict=True):
            axes.barh(range(len(labels)), values, 0.7, color=GREEN)
            shown = map(_label, labels) if axes is boxes[0] else [""] * len(labels)
            axes.set_yticks(range(len(labels)), shown)
            axes.set_ylim(len(labels) - 0.4, -0.6)
            axes.set_xlabel(name)
            axes.locator_params(axis="x", nbins=4)

    return drawn(title, (6.0, 0.6 + 0.3 * len(labels)), paint, panels=len(panels))


def line(
    title: str,
    axes_names: tuple[str, str],
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    diagonal: bool = False,
) -> Markup:
    """Draw a curve through points; with a diagonal, of shares in [0, 1]."""

    def paint(axes: Axes) -> None:
        if diagonal:
            axes.plot([0, 1], [0, 1], "--", color=GREY, lw=1)
        axes.plot(xs, ys, "o-", ms=4, color=BLUE)
        axes.set_xlabel(axes_names[0])
        axes.set_ylabel(axes_names[1])
        axes.grid()

    return drawn(title, (3.6, 3.6) if diagonal else (5.2, 2.6), paint)


def drawn(
    title: str, size: tuple[float, float], paint: Callable[..., None], panels: int = 1
) -> Markup:
    """Paint axes of a size in inches; the title makes the figure's ids differ from another's."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    text = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that its font lacks; the browser has others
        figure = Figure(figsize=size)
        figure.subplots_adjust(0, 0, 1, 1, wspace=0.2)
        paint(*figure.subplots(1, panels, squeeze=False)[0])
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        tight: Any = {"bbox_inches": "tight", "pad_inches": 0.05, "transparent": True}
        figure.savefig(text, format="svg", metadata=metadata, **tight)
    svg = text.getvalue().replace(INK, "currentColor").replace(f"; font-family: '{FONT}'", "")
    return Markup(re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :]))


def _label(name: str) -> str:
    shown = printable(name)
    return shown if len(shown) <= LABEL else f"{shown[: LABEL - 1]}…"
