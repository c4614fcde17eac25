"""An audit for people: tables for the terminal and as Markdown, and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedcompo.audit import CLASS_IL, FIGURES, TASK_IL
from fedcompo.audited_models import AFTER, BEFORE, GOLD
from fedcompo.cli_common import say, table_console
from fedcompo.tensorfile import write_atomically
from fedcompo.units import percent

JSON, MARKDOWN, PICTURE = "audit.json", "audit.md", "audit.svg"

Values = Mapping[str, Any]
Rows = list[list[str]]

TITLES = {CLASS_IL: "class-IL", TASK_IL: "task-IL"}
MODELS = {
    BEFORE: ("before", "everyone", "#9aa5b1"),
    AFTER: ("after", "the client removed", "#2f6f8f"),
    GOLD: ("gold", "the client never took part", "#e0a458"),
}
"""Of each model: its name, what it is composed of, its colour."""
ATTACK = (
    "The attacker kept the joint head of the model before and puts it on each backbone, so that "
    "only the backbones differ. The head was fitted to mixtures of the client's training features "
    "and may tell members by itself; what the loss attack finds on gold is that. Intervals are "
    "95 %, over images; an AUC of 0.5 is chance, and bold ones exclude it."
)


def write_audit(folder: Path, values: Values) -> None:
    """Write ``audit.json``, ``audit.md`` and ``audit.svg`` into a folder."""
    files = {
        JSON: json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        MARKDOWN: markdown(values),
        PICTURE: picture(values),
    }
    for name, text in files.items():
        write_atomically(folder / name, text.encode())


def print_audit(values: Values) -> None:
    """Print the tables and what to know about them."""
    console = table_console()
    for title, rows in _tables(values):
        header, *body = rows
        table = Table(title=title)
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left")
        for row in body:
            table.add_row(*(_styled(cell) for cell in row))
        console.print(table)
    for sentence in _sentences(values):
        say(sentence, Console())


def markdown(values: Values) -> str:
    """Return the audit as a Markdown document."""
    parts = [f"# Does the model forget {values['client']}?", *_sentences(values)[:1]]
    for title, rows in _tables(values):
        parts += [f"## {title}", markdown_table(rows)]
    return "\n\n".join([*parts, *_sentences(values)[1:], f"![The same as a picture]({PICTURE})\n"])


def markdown_table(rows: Rows) -> str:
    """Return a Markdown table; the first row is its header."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def interval(estimate: Values) -> str:
    """An AUC with its interval, in Markdown's bold where that excludes chance."""
    text = f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"
    return text if estimate["low"] <= 0.5 <= estimate["high"] else f"**{text}**"


def _tables(values: Values) -> list[tuple[str, Rows]]:
    return [
        ("Accuracy, %", _accuracy_rows(values)),
        (f"Telling the training images of {values['client']}", _attack_rows(values)),
    ]


def _accuracy_rows(values: Values) -> Rows:
    names = list(values["models"])
    rows = [["images of", *(f"{TITLES[key]} {name}" for key in FIGURES for name in names)]]
    accuracy = values["accuracy"]
    for client, figures in accuracy["per_client"].items():
        label = f"{client} (removed)" if client == values["client"] else client
        rows.append([label, *(percent(figures[n][key]) for key in FIGURES for n in names)])
    if mean := accuracy["remaining"]:
        cells = [percent(mean[name][key]) for key in FIGURES for name in names]
        rows.append(["mean of the remaining", *cells])
    return rows


def _attack_rows(values: Values) -> Rows:
    names = list(values["models"])
    rows = [["attack", "figure", *names]]
    for attack, found in values["membership"].items():
        label = attack.replace("-", " ")
        rows.append([label, "AUC", *(interval(found[name]["auc"]) for name in names)])
        for rate in found[names[0]]["tpr"]:
            estimates = [found[name]["tpr"][rate] for name in names]
            cells = [f"{e['value']:.2f} [{e['low']:.2f}, {e['high']:.2f}]" for e in estimates]
            rows.append([label, f"TPR at FPR {rate}", *cells])
    return rows


def _sentences(values: Values) -> list[str]:
    """What was compared; then how to read it."""
    images = values["images"]
    first = "; ".join(
        f"{name}: {what} ({len(values['models'][name]['clients'])} clients)"
        for name, what, _ in MODELS.values()
        if name in values["models"]
    )
    attack = (
        f"{images['members']} members, {images['non_members']} non-members, {values['shadows']} "
        f"shadow models, seed {values['seed']}. {ATTACK}"
    )
    sentences = [f"{first[0].upper()}{first[1:]}.", *_closeness(values), attack]
    retrain = [name for part in values["influence"].values() for name in part]
    if retrain:
        sentences.append(
            f"Trained with something of {values['client']}, and not trained again by a removal: "
            f"{', '.join(sorted(set(retrain)))}."
        )
    return [*sentences, *values["notes"]]


def _closeness(values: Values) -> list[str]:
    far = values["distance_to_gold"]
    if not far:
        return []
    if not far[AFTER]:
        return ["The weights after are those of gold, bit for bit."]
    return [
        f"Length of the difference of the weights from gold: before {far[BEFORE]:.3g}, "
        f"after {far[AFTER]:.3g}."
    ]


def _styled(cell: str) -> Text:
    bold = cell.startswith("**")
    return Text(cell.strip("*") if bold else cell, style="bold" if bold else "")


# -- picture --------------------------------------------------------------------------------------


def picture(values: Values) -> str:
    """Return an SVG: AUC with intervals on the left, accuracies on the right."""
    client, names = values["client"], list(values["models"])
    groups = [
        (attack.replace("-", " "), {n: found[n]["auc"] for n in names})
        for attack, found in values["membership"].items()
    ]
    height = 128 + 4 * (22 * len(names) + 26)
    parts = [
        text(20, 28, f"Telling the training images of {client}: AUC", bold=True),
        text(520, 28, "Accuracy, %", bold=True),
        *legend(20, 46, names),
        *interval_chart(groups, left=140, top=76, width=330, row=_bars_height(names) * 2),
        *_bars(values, left=520, top=76),
    ]
    return document(960, height, parts)


def document(width: float, height: float, parts: Sequence[str]) -> str:
    """Return a whole SVG."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            'font-family="system-ui, sans-serif" font-size="13" fill="#1f2933">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


def legend(left: float, top: float, names: Sequence[str]) -> list[str]:
    """Name the models' colours in a line."""
    parts = []
    for name in names:
        title, what, colour = MODELS[name]
        parts.append(f'<rect x="{left}" y="{top}" width="12" height="12" fill="{colour}"/>')
        parts.append(text(left + 17, top + 11, f"{title}: {what}"))
        left += 60 + 6.6 * len(f"{title}: {what}")
    return parts


def interval_chart(
    groups: Sequence[tuple[str, Mapping[str, Values]]],
    *,
    left: float,
    top: float,
    width: float,
    row: float,
) -> list[str]:
    """Draw estimates as points with whiskers over one axis, with the line of chance.

    Args:
        groups: Label, and an estimate (``value``, ``low``, ``high``) by model; a group a row.
        left: Where the axis begins; labels stand before it.
        top: Where the first row begins.
        width: Length of the axis.
        row: Height of a row.
    """
    estimates = [estimate for _, found in groups for estimate in found.values()]
    first = math.floor(10 * min(0.4, *(e["low"] for e in estimates))) / 10
    last = math.ceil(10 * max(0.6, *(e["high"] for e in estimates))) / 10
    bottom = top + row * len(groups)

    def x(value: float) -> float:
        return left + width * (value - first) / (last - first)

    parts = []
    for tick in range(round(10 * first), round(10 * last) + 1):
        at = x(tick / 10)
        line = 'stroke="#52606d" stroke-dasharray="5 4"' if tick == 5 else 'stroke="#e4e7eb"'
        parts.append(f'<path d="M{at:.1f} {top}V{bottom}" {line}/>')
        parts.append(text(at, bottom + 18, f"{tick / 10:.1f}", anchor="middle"))
    parts.append(text(x(0.5), bottom + 34, "chance", anchor="middle"))
    for index, (label, found) in enumerate(groups):
        middle = top + row * (index + 0.5)
        parts.append(text(left - 12, middle + 5, label, anchor="end"))
        for place, (name, estimate) in enumerate(found.items()):
            y = middle + (place - (len(found) - 1) / 2) * min(26.0, row / (len(found) + 0.5))
            parts += _point(x, y, estimate, MODELS[name][2])
    return parts


def _point(x: Any, y: float, estimate: Values, colour: str) -> list[str]:
    low, value, high = (x(estimate[key]) for key in ("low", "value", "high"))
    return [
        f'<path d="M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 4:.1f}v8M{high:.1f} {y - 4:.1f}v8" '
        f'stroke="{colour}" stroke-width="2" fill="none"/>',
        f'<circle cx="{value:.1f}" cy="{y:.1f}" r="5" fill="{colour}">'
        f"<title>{interval(estimate).strip('*')}</title></circle>",
        text(high + 8, y + 4, f"{estimate['value']:.2f}"),
    ]


def _bars_height(names: Sequence[str]) -> int:
    return 22 * len(names) + 26


def _bars(values: Values, *, left: float, top: float) -> list[str]:
    """Bars of accuracy: the removed client's images, then the mean of the others'."""
    parts = []
    whose = {"removed": values["client"], "remaining": "mean of the remaining"}
    shown = [
        (f"{whose[part]}, {TITLES[key]}", part, key)
        for part in whose
        for key in FIGURES
        if values["accuracy"][part]
    ]
    for index, (label, part, key) in enumerate(shown):
        y = top + index * _bars_height(list(values["models"]))
        parts.append(text(left, y + 12, label))
        for place, (name, about) in enumerate(values["models"].items()):
            share = values["accuracy"][part][name][key]
            at = y + 18 + 22 * place
            no_rows = part == "removed" and key == CLASS_IL and not about["rows_of_client"]
            said = "0.0: its head has no rows of these classes" if no_rows else percent(share)
            parts.append(
                f'<rect x="{left}" y="{at}" width="{320 * share:.1f}" height="18" '
                f'fill="{MODELS[name][2]}"/>'
            )
            parts.append(text(left + 320 * share + 6, at + 14, said))
    return parts


def text(x: float, y: float, words: str, *, bold: bool = False, anchor: str = "start") -> str:
    """Return an SVG text."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'
