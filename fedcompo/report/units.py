"""Steps, times, sizes, names and accuracies, written for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedcompo.names import printable

ALL_CLASSES, OWN_CLASSES = "all classes", "own classes"
"""Titles of the two accuracies of the one model of all; the paper's class-IL and task-IL."""
EXPLAINED = """all classes: the composed model, right among all its classes (paper: class-IL)
own classes: the composed model, right among the client's own (paper: task-IL)"""
"""A line on each of them, below a table."""
SMALL = 1000
"""Test images from which an accuracy stands alone: its interval is within about three points."""
BRACKETS = "[low–high]: what so few test images leave open (95 % interval)"
"""A line on intervals, below a table."""


def duration(seconds: float) -> str:
    """Write seconds for people: ``4.2 s``, ``3 min 5 s``, ``2 h 10 min``."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: int) -> str:
    """Write bytes for people, in powers of 1000: ``616 B``, ``4.7 MB``, ``597 kB``."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    digits = 0 if units[0] == "B" or value >= 99.5 else 1
    return f"{value:.{digits}f} {units[0]}"


def listed(names: Iterable[str]) -> str:
    """Join names by commas, on one line whatever they hold; one with a comma stands in quotes."""
    return ", ".join(f'"{name}"' if "," in name else name for name in map(printable, names))


def shortened(names: Sequence[str], limit: int = 24) -> str:
    """Join names by commas; a list that is too long shows its length and its first names."""
    text = listed(names)
    return text if len(text) <= limit else f"{len(names)}: {text[: limit - 5]}…"


def percent_between(value: float | None, interval: Sequence[float] | None, images: int) -> str:
    """Write an accuracy as a percentage; of few test images, with its interval."""
    if interval is None or images >= SMALL:
        return percent(value)
    low, high = (f"{100 * end:.0f}" for end in interval)
    return f"{percent(value)} [{low}–{high}]"  # no blank: it stays on a line


def percent(value: float | None) -> str:
    """Write a fraction as a percentage, or a dash where there is none."""
    return "–" if value is None else f"{100 * value:.1f}"


def between(interval: Sequence[float] | None) -> str:
    """Write an interval of a fraction in per cent, or a dash where there is none."""
    return "–" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"
