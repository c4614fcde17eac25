"""A run as a picture: accuracies of the clients, and how their task vectors overlap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from fedcompo.names import printable
from fedcompo.report.units import percent
from fedcompo.storage.files import write_atomically

PICTURE = "report.svg"
SHOWN = 40
"""Clients shown by name; of more, the first so many."""

Results = Mapping[str, Any]

BARS = (
    ("frozen backbone, class-IL", "frozen_class_il_accuracy", "#9aa5b1"),
    ("own task vector, own task", "own_task_accuracy", "#e0a458"),
    ("one model, class-IL", "class_il_accuracy", "#2f6f8f"),
    ("one model, task-IL", "task_il_accuracy", "#7fb7be"),
)


def shown(results: Results) -> list[str]:
    """Names of the clients that are shown."""
    return list(islice(results["per_client"], SHOWN))


def overlap(results: Results) -> list[list[float]]:
    """Cosines of the task vectors; empty where they were not compared."""
    gram = results.get("diagnostics", {}).get("fisher_gram")
    return cosines_of(gram) if gram and len(gram) <= SHOWN else []


def write_report(folder: Path, results: Results) -> None:
    """Draw accuracies, and the overlap of the task vectors if there are any, to ``report.svg``."""
    write_atomically(folder / PICTURE, _picture(results).encode())


def cosines_of(gram: Sequence[Sequence[float]]) -> list[list[float]]:
    """Cosines from a Gram matrix; 0 for a vector of no length."""
    lengths = [math.sqrt(max(0.0, row[index])) for index, row in enumerate(gram)]
    return [
        [
            value / (lengths[i] * lengths[j]) if lengths[i] * lengths[j] > 0 else 0.0
            for j, value in enumerate(row)
        ]
        for i, row in enumerate(gram)
    ]


def _picture(results: Results) -> str:
    """Bars of accuracy by client on the left, cosines of the task vectors on the right."""
    clients = shown(results)
    rows = [*clients, "mean"]
    row_height, bar_height = 84, 16
    height = 90 + row_height * len(rows)
    matrix_left, cell = 780, max(18, min(64, 480 // max(1, len(clients))))
    width = matrix_left
    cosines = overlap(results)
    if cosines:
        width = matrix_left + 120 + cell * len(clients)
        height = max(height, 130 + cell * len(clients))
    parts = [text(20, 28, "Accuracy by client", bold=True)]
    for index, (title, _, colour) in enumerate(BARS):
        left = 20 + 180 * index
        parts.append(f'<rect x="{left}" y="42" width="12" height="12" fill="{colour}"/>')
        parts.append(text(left + 17, 53, title))
    for index, name in enumerate(rows):
        top = 74 + row_height * index
        figures = results if name == "mean" else results["per_client"][name]
        parts.append(text(20, top + 40, name[:18], bold=name == "mean"))
        for bar, (_, key, colour) in enumerate(BARS):
            value, y = figures[key], top + bar * (bar_height + 2)
            length = 480 * (value or 0)
            parts.append(
                f'<rect x="150" y="{y}" width="{length:.1f}" height="{bar_height}" '
                f'fill="{colour}"/>'
            )
            parts.append(text(156 + length, y + 13, percent(value)))
    if cosines:
        parts += _matrix(results, cosines, matrix_left, cell)
    return document(width, height, parts)


def _matrix(results: Results, cosines: list[list[float]], left: int, cell: int) -> list[str]:
    clients = results["diagnostics"]["clients"]
    parts = [text(left, 28, "Cosine of task vectors, Fisher metric", bold=True)]
    for i, row in enumerate(cosines):
        parts.append(text(left, 74 + cell * i + cell // 2 + 5, clients[i][:14]))
        for j, value in enumerate(row):
            x, y = left + 100 + cell * j, 74 + cell * i
            strength = min(1.0, abs(value))
            hue = (47, 111, 143) if value >= 0 else (190, 80, 60)
            colour = ",".join(str(round(255 + (c - 255) * strength)) for c in hue)
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell - 2}" height="{cell - 2}" '
                f'fill="rgb({colour})"><title>{value:+.3f}</title></rect>'
            )
            if cell >= 40:
                ink = "white" if strength > 0.6 else "#1f2933"
                parts.append(
                    f'<text x="{x + cell / 2 - 1}" y="{y + cell / 2 + 4}" fill="{ink}" '
                    f'text-anchor="middle">{value:.2f}</text>'
                )
    return parts


def document(width: float, height: float, parts: Sequence[str]) -> str:
    """Make an SVG file of its parts."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            'font-family="system-ui, sans-serif" font-size="13" fill="#1f2933">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


def text(x: float, y: float, words: str, *, bold: bool = False, anchor: str = "start") -> str:
    """Make a line of text; ``anchor`` (start, middle, end) is its point at ``x``."""
    style = "" if anchor == "start" else f' text-anchor="{anchor}"'
    style += ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{escape(printable(words))}</text>'
