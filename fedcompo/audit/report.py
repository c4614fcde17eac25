"""Writes an audit for people: tables for the terminal and in Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedcompo.audit.forgetting import ALL
from fedcompo.audit.measure import CLASS_IL, FIGURES, TASK_IL
from fedcompo.audit.models import AFTER, BEFORE, FROZEN, GOLD, REPAIRED
from fedcompo.audit.verdicts import bounded
from fedcompo.export.model_card import escaped, table
from fedcompo.report.console import numbers, say, table_console
from fedcompo.report.units import ALL_CLASSES, EXPLAINED, OWN_CLASSES, listed, percent
from fedcompo.storage.files import write_atomically

JSON, MARKDOWN = "audit.json", "audit.md"
TITLES = {CLASS_IL: ALL_CLASSES, TASK_IL: OWN_CLASSES}
MODELS = {
    BEFORE: "everyone",
    AFTER: "the client removed",
    GOLD: "the client never took part",
    REPAIRED: "the client removed, the others trained on",
    FROZEN: "the pre-trained weights alone",
}
"""What each model is composed of."""

PROBE = "Accuracy of linear probes on the removed client's test images"
ALIKE = "Likeness of features (CKA; 1: the same)"

Values = Mapping[str, Any]
Rows = list[list[str]]

ATTACK = (
    "The attacker kept the joint head of the model before and puts it on each backbone, so that "
    "only the backbones differ. The head was made of statistics of the client's training features "
    "and may tell members by itself: what the loss attack finds where the client never took part "
    "is that. Intervals are 95 %, over images; an AUC of 0.5 is chance, and bold ones exclude it."
)


def write_audit(folder: Path, values: Values) -> None:
    """Write ``audit.json`` and ``audit.md`` into a folder."""
    files = {
        JSON: json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        MARKDOWN: markdown(values),
    }
    for name, text in files.items():
        write_atomically(folder / name, text.encode())


def print_audit(values: Values) -> None:
    """Print the tables and what to know about them."""
    console = table_console()
    for title, rows in _tables(values):
        header, *body = rows
        shown = Table(header[0], *numbers(*header[1:]), title=title)
        for row in body:
            shown.add_row(*map(_styled, row))
        console.print(shown)
    for sentence in [*_sentences(values), "", *values["verdicts"]]:
        say(sentence)


def markdown(values: Values) -> str:
    """Return the audit as a Markdown document."""
    first, *more = map(escaped, _sentences(values))
    found = "\n".join(f"- {verdict}" for verdict in values["verdicts"])
    parts = [f"# Does the model forget {escaped(values['client'])}?", first, found]
    for title, (header, *rows) in _tables(values):
        rows = [[escaped(name), *figures] for name, *figures in rows]
        parts += [f"## {escaped(title)}", table(header, rows, numbers=True)]
    return "\n\n".join([*parts, *more]) + "\n"


def interval(estimate: Values) -> str:
    """An AUC with its interval, in Markdown's bold where that excludes chance."""
    text = bounded(estimate)
    return text if estimate["low"] <= 0.5 <= estimate["high"] else f"**{text}**"


def _tables(values: Values) -> list[tuple[str, Rows]]:
    return [
        ("Accuracy, %", _accuracy_rows(values)),
        (f"Membership inference against {values['client']}", _attack_rows(values)),
        *([(PROBE, _probe_rows(values["probe"]))] if values["probe"] else []),
        *([(ALIKE, rows)] if len(rows := _similarity_rows(values["similarity"])) > 1 else []),
    ]


def _accuracy_rows(values: Values) -> Rows:
    names = list(values["models"])
    first, *others = names
    rows = [["images of", *(h for key in FIGURES for h in (f"{TITLES[key]} {first}", *others))]]
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
    for attack, by_model in values["membership"].items():
        label = attack.replace("-", " ")
        rows.append([label, "AUC", *(interval(by_model[name]["auc"]) for name in names)])
        for rate in by_model[names[0]]["tpr"]:
            estimates = [by_model[name]["tpr"][rate] for name in names]
            rows.append([label, f"TPR at FPR {rate}", *map(bounded, estimates)])
    return rows


def _probe_rows(probe: Values) -> Rows:
    rows = [["fitted to, a class", *probe]]
    for shots in next(iter(probe.values())):
        label = "all images" if shots == ALL else f"{shots} image{'s' * (shots != '1')}"
        rows.append([label, *(bounded(own[shots]) for own in probe.values())])
    return rows


def _similarity_rows(similarity: Values) -> Rows:
    pairs = list(similarity["removed"] or similarity["remaining"])
    rows = [["test images of", *(pair.replace("~", " ~ ") for pair in pairs)]]
    for whose, own in similarity.items():
        if own:
            rows.append([f"the {whose}", *(bounded(own[pair]) for pair in pairs)])
    return rows


def _sentences(values: Values) -> list[str]:
    """Return sentences: the compared models, then how to read the figures."""
    first = "; ".join(
        f"{name}: {MODELS[name]} ({listed(model['clients']) or MODELS[FROZEN]})"
        for name, model in values["models"].items()
    )
    images, far = values["images"], values["distance_to_gold"]
    sentences = [f"{first[0].upper()}{first[1:]}."]
    if far:
        sentences.append(
            f"Distance of the weights to gold: before {far[BEFORE]:.3g}, after {far[AFTER]:.3g}."
            if far[AFTER]
            else "The weights after are those of gold, bit for bit."
        )
    sentences.append(
        f"{images['members']} members, {images['non_members']} non-members. {values['shadows']} "
        f"shadow models, seed {values['seed']}. {ATTACK}"
    )
    retrain = [name for part in values["influence"].values() for name in part]
    if retrain:
        sentences.append(
            f"Trained with something of {values['client']}, and not trained again by a removal: "
            f"{listed(sorted(set(retrain)))}."
        )
    return [*sentences, *(f"{line}." for line in EXPLAINED.splitlines()), *values["notes"]]


def _styled(cell: str) -> Text:
    bold = cell.startswith("**")
    return Text(cell.strip("*") if bold else cell, style="bold" if bold else "")
