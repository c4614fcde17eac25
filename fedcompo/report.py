"""Results for people: tables in the terminal, a picture beside the figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from rich.console import Console
from rich.table import Table

from fedcompo.tensorfile import write_atomically
from fedcompo.units import percent, shortened, size

PICTURE = "report.svg"

Results = Mapping[str, Any]

COLUMNS = (
    ("frozen", "frozen_class_il_accuracy"),
    ("own", "own_task_accuracy"),
    ("class-IL", "class_il_accuracy"),
    ("task-IL", "task_il_accuracy"),
)
CAPTION = """frozen: pre-trained backbone, aligned head, all classes
own: each client's own module on its own classes
class-IL, task-IL: the composed model, all classes; the client's classes"""
PIPE_WIDTH = 120
"""Columns of a table that no terminal will show."""
BARS = (
    ("frozen backbone, class-IL", "frozen_class_il_accuracy", "#9aa5b1"),
    ("own module, own task", "own_task_accuracy", "#e0a458"),
    ("composed, class-IL", "class_il_accuracy", "#2f6f8f"),
    ("composed, task-IL", "task_il_accuracy", "#7fb7be"),
)


def print_results(results: Results, console: Console) -> None:
    """Print accuracies, traffic and diagnostics of a run.

    Args:
        results: What ``results.json`` holds.
        console: Where to.
    """
    if not console.is_terminal:
        console = Console(file=console.file, width=max(PIPE_WIDTH, console.width))
    console.print(_accuracy_table(results))
    console.print(_traffic_table(results))
    if "diagnostics" in results:
        _print_diagnostics(results, console)
    for client in results["left_out"]:
        line = f"Left out: {client['client']} ({client['phase']}): {client['reason']}"
        console.print(line, style="bold red", markup=False)
    for note in results["notes"]:
        console.print(f"Note: {note}", style="yellow", markup=False)


def _print_diagnostics(results: Results, console: Console) -> None:
    console.print(_diagnostics_table(results))
    gap = results["diagnostics"]["composition_gap"]
    console.print(f"Gap Ω of Theorem 1 (mean Fisher, composition's coefficients): {gap:.3g}")
    outliers = results["diagnostics"]["outliers"]
    if outliers:
        console.print(f"Outliers: {', '.join(outliers)}", style="bold yellow")


def write_report(folder: Path, results: Results) -> None:
    """Draw accuracies, and the overlap of the task vectors if there are any, to ``report.svg``."""
    write_atomically(folder / PICTURE, _picture(results).encode())


def _accuracy_table(results: Results) -> Table:
    table = Table(title="Accuracy, %", caption=CAPTION, caption_justify="left")
    for name in ("client", "classes", "kind", "images"):
        table.add_column(name, justify="right" if name == "images" else "left")
    for title, _ in COLUMNS:
        table.add_column(title, justify="right")
    for client, figures in results["per_client"].items():
        table.add_row(
            client,
            shortened(figures["classes"]),
            figures["kind"],
            f"{figures['num_examples']} + {figures['num_test_examples'] or '–'}",
            *(percent(figures[key]) for _, key in COLUMNS),
        )
    table.add_section()
    table.add_row("mean", "", "", "", *(percent(results[key]) for _, key in COLUMNS), style="bold")
    return table


def _traffic_table(results: Results) -> Table:
    alone = [p for p, totals in results["phases"].items() if not totals["bytes_sent"]]
    seconds = ", ".join(f"{p} {results['phases'][p]['seconds']:.1f} s" for p in alone)
    table = Table(
        title="Bytes sent, time, memory",
        caption=f"On the server alone: {seconds}. Peak memory: of one client",
    )
    table.add_column("client", no_wrap=True)
    phases = {p: totals for p, totals in results["phases"].items() if totals["bytes_sent"]}
    for phase in phases:
        table.add_column(phase, justify="right", no_wrap=True)
    for client, figures in results["per_client"].items():
        sent = [figures["traffic"].get(phase, {}).get("bytes_received", 0) for phase in phases]
        table.add_row(client, *(size(count) if count else "" for count in sent))
    table.add_section()
    sent = [totals["bytes_sent"] for totals in phases.values()]
    table.add_row("server", *(size(count) if count else "" for count in sent))
    table.add_row("seconds", *(f"{totals['seconds']:.1f}" for totals in phases.values()))
    peaks = [totals["peak_memory_bytes"].get("client", 0) for totals in phases.values()]
    table.add_row("peak memory", *(size(peak) if peak else "" for peak in peaks))
    return table


def _diagnostics_table(results: Results) -> Table:
    found = results["diagnostics"]
    title = "Task vectors: length, and cosine in the Fisher metric"
    table = Table(title=title, padding=(0, 1, 0, 0))  # five clients fit a terminal
    table.add_column("client")
    table.add_column("‖τ‖", justify="right")
    table.add_column("τᵀF̄τ", justify="right")
    for client in found["clients"]:
        table.add_column(client, justify="right")
    for index, client in enumerate(found["clients"]):
        cosines = [f"{value:+.2f}" for value in cosines_of(found["fisher_gram"])[index]]
        own = found["fisher_gram"][index][index]
        table.add_row(client, f"{found['tau_norms'][index]:.3g}", f"{own:.2g}", *cosines)
    return table


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
    clients = list(results["per_client"])
    rows = [*clients, "mean"]
    row_height, bar_height = 84, 16
    height = 90 + row_height * len(rows)
    matrix_left, cell = 780, max(18, min(64, 480 // max(1, len(clients))))
    width = matrix_left
    if "diagnostics" in results:
        width = matrix_left + 120 + cell * len(clients)
        height = max(height, 130 + cell * len(clients))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="#1f2933">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(20, 28, "Accuracy by client", bold=True),
    ]
    for index, (title, _, colour) in enumerate(BARS):
        left = 20 + 180 * index
        parts.append(f'<rect x="{left}" y="42" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(left + 17, 53, title))
    for index, name in enumerate(rows):
        top = 74 + row_height * index
        figures = results if name == "mean" else results["per_client"][name]
        parts.append(_text(20, top + 40, name[:18], bold=name == "mean"))
        for bar, (_, key, colour) in enumerate(BARS):
            value, y = figures[key], top + bar * (bar_height + 2)
            length = 480 * (value or 0)
            parts.append(
                f'<rect x="150" y="{y}" width="{length:.1f}" height="{bar_height}" '
                f'fill="{colour}"/>'
            )
            parts.append(_text(156 + length, y + 13, percent(value)))
    if "diagnostics" in results:
        parts += _matrix(results, matrix_left, cell)
    return "\n".join([*parts, "</svg>\n"])


def _matrix(results: Results, left: int, cell: int) -> list[str]:
    found = results["diagnostics"]
    parts = [_text(left, 28, "Cosine of task vectors, Fisher metric", bold=True)]
    for i, row in enumerate(cosines_of(found["fisher_gram"])):
        parts.append(_text(left, 74 + cell * i + cell // 2 + 5, found["clients"][i][:14]))
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


def _text(x: float, y: float, text: str, *, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{weight}>{escape(text)}</text>'
