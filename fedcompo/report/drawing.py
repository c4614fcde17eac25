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
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Series:
    """Values in [0, 1] of one kind, a row each; None where there is none."""

    name: str
    colour: str
    values: Sequence[float | None]
    intervals: Sequence[Sequence[float] | None] | None = None
    """Low and high of each value."""


def points(title: str, labels: Sequence[str], series: Sequence[Series]) -> Markup:
    """Draw shares in per cent: a row of points for each label, with their intervals.

    Of more than :data:`NAMED` labels, draw each series as a curve of its sorted values.
    """
    named = len(labels) <= NAMED
    ends = [low for one in series for low, _ in filter(None, one.intervals or ())]
    values = [value for one in series for value in one.values if value is not None]
    first = 10 * math.floor(10 * min(0.8, *ends, *values))  # an axis of few per cent exaggerates

    def rows(axes: Axes) -> None:
        for place, one in enumerate(series):
            shift = (place - (len(series) - 1) / 2) * 0.6 / len(series)
            shown = [(r + shift, v) for r, v in enumerate(one.values) if v is not None]
            for row, between in enumerate(one.intervals or ()):
                if between:
                    axes.plot(
                        [100 * end for end in between],
                        [row + shift] * 2,
                        color=one.colour,
                        lw=1.5,
                        alpha=0.6,
                    )
            at, marks = [r for r, _ in shown], [100 * v for _, v in shown]
            axes.plot(marks, at, "o", ms=5, color=one.colour, label=one.name)
        axes.set_yticks(range(len(labels)), [_label(label) for label in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(first - 0.02 * (100 - first), 100 + 0.02 * (100 - first))
        axes.set_xlabel("%")
        axes.grid(axis="x", alpha=0.25, color=GREY)

    def curves(axes: Axes) -> None:
        for one in series:
            curve = sorted(100 * value for value in one.values if value is not None)
            axes.plot(range(1, len(curve) + 1), curve, color=one.colour, label=one.name)
        axes.set_ylim(-2, 102)
        axes.set_ylabel("%")
        axes.set_xlabel("from the lowest to the highest, each curve by itself")
        axes.grid(alpha=0.25, color=GREY)

    height = 0.5 + len(labels) * (0.16 + 0.09 * len(series)) if named else 3.2
    return drawn(title, (5.2, height), rows if named else curves, legend=len(series) > 1)


def matrix(
    title: str,
    labels: Sequence[str],
    shares: Sequence[Sequence[float]],
    texts: Mapping[tuple[int, int], str],
    *,
    axes_names: tuple[str, str] = ("", ""),
    right: bool = False,
) -> Markup:
    """Draw a square matrix of values in [-1, 1] as colours: blue, or orange.

    Args:
        title: Of the figure.
        labels: Of rows and columns.
        shares: Rows of values; their size is the colour's strength.
        texts: What stands in cells, by row and column, if there is room.
        axes_names: Of the columns, and of the rows.
        right: The diagonal is blue and all else orange; otherwise the sign decides.
    """
    import numpy as np

    values = np.array(shares, dtype=float)
    count = len(labels)
    blue = np.eye(count, dtype=bool) if right else values >= 0
    colours = np.where(blue[..., None], _rgb(BLUE), _rgb(ORANGE))
    strength = STRENGTH * np.sqrt(np.clip(np.abs(values), 0, 1))[..., None]
    pixels = np.rint(255 * np.concatenate([colours, strength], axis=2)).astype(np.uint8)
    cell = max(0.11, min(0.5, 6 / count))
    size = min(10.0, 60 * cell)

    def paint(axes: Axes) -> None:
        axes.imshow(pixels, interpolation="none", aspect="equal")
        names = [_label(label) for label in labels]
        axes.set_xticks(range(count), names, rotation=90, fontsize=size)
        axes.set_yticks(range(count), names, fontsize=size)
        axes.tick_params(length=0 if count > WRITTEN else 3)
        axes.set_xlabel(axes_names[0])
        axes.set_ylabel(axes_names[1])
        axes.spines[:].set_visible(True)
        if count <= WRITTEN:
            for (row, column), text in texts.items():
                axes.text(column, row, text, ha="center", va="center", fontsize=min(9, size))

    return drawn(title, (count * cell, count * cell), paint)


def bars(
    title: str, labels: Sequence[str], panels: Sequence[tuple[str, Sequence[tuple[str, Any]]]]
) -> Markup:
    """Draw horizontal bars: panels side by side, each of a title and named rows of values."""
    colours = (BLUE, ORANGE)

    def paint(*boxes: Axes) -> None:
        for axes, (name, parts) in zip(boxes, panels, strict=True):
            for place, (part, values) in enumerate(parts):
                thick = 0.7 / len(parts)
                at = [r + (place - (len(parts) - 1) / 2) * thick for r in range(len(labels))]
                colour = colours[place] if len(parts) > 1 else GREEN
                axes.barh(at, values, thick, color=colour, label=part)
            axes.set_yticks(range(len(labels)), [_label(label) for label in labels])
            axes.set_ylim(len(labels) - 0.4, -0.6)
            axes.set_xlabel(name)
            axes.locator_params(axis="x", nbins=5)
            if len(parts) > 1:
                _legend(axes)
        for axes in boxes[1:]:
            axes.set_yticklabels([])

    return drawn(title, (6.0, 0.6 + 0.3 * len(labels)), paint, panels=len(panels))


def reliability(title: str, bins: Sequence[Mapping[str, Any]]) -> Markup:
    """Draw accuracy against confidence, both in per cent, a point for each bin that has images."""
    shown = [one for one in bins if one["images"]]
    most = max((one["images"] for one in shown), default=1)

    def paint(axes: Axes) -> None:
        axes.plot([0, 100], [0, 100], "--", color=GREY, lw=1)
        confidence = [100 * one["confidence"] for one in shown]
        accuracy = [100 * one["accuracy"] for one in shown]
        axes.plot(confidence, accuracy, color=BLUE, lw=1, alpha=0.6)
        areas = [20 + 130 * one["images"] / most for one in shown]
        axes.scatter(confidence, accuracy, areas, color=BLUE)
        axes.set_xlim(-3, 103)
        axes.set_ylim(-3, 103)
        axes.set_xlabel("confidence, %")
        axes.set_ylabel("accuracy, %")
        axes.grid(alpha=0.25, color=GREY)

    return drawn(title, (3.6, 3.6), paint)


def line(title: str, x_name: str, y_name: str, points: Sequence[tuple[float, float]]) -> Markup:
    """Draw a curve through points (x, y)."""

    def paint(axes: Axes) -> None:
        axes.plot(*zip(*points, strict=True), "o-", ms=4, color=BLUE)
        axes.set_xlabel(x_name)
        axes.set_ylabel(y_name)
        axes.grid(alpha=0.25, color=GREY)

    return drawn(title, (5.2, 2.6), paint)


def drawn(
    title: str,
    size: tuple[float, float],
    paint: Callable[..., None],
    *,
    panels: int = 1,
    legend: bool = False,
) -> Markup:
    """Paint axes of a size in inches; the title makes the figure's ids differ from another's."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    text = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that its font lacks; the browser has others
        figure = Figure(figsize=size)
        figure.subplots_adjust(0, 0, 1, 1, wspace=0.06)
        boxes = figure.subplots(1, panels, squeeze=False)[0]
        paint(*boxes)
        if legend:
            _legend(boxes[0])
        figure.savefig(
            text,
            format="svg",
            bbox_inches="tight",
            pad_inches=0.05,
            transparent=True,
            metadata=NO_METADATA,
        )
    svg = text.getvalue().replace(INK, "currentColor").replace(f"; font-family: '{FONT}'", "")
    return Markup(re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :]))


def _legend(axes: Axes) -> None:
    """Put the legend above the axes, where it covers nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.3)


def _label(name: str) -> str:
    shown = printable(name)
    return shown if len(shown) <= LABEL else f"{shown[: LABEL - 1]}…"


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
