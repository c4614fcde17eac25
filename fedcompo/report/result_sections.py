"""Sections of a report on the clients' figures: accuracy, rounds, a removal, who was left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from fedcompo.report import drawing
from fedcompo.report.class_sections import class_sections
from fedcompo.report.drawing import NAMED, Series
from fedcompo.report.page import Column, Picture, Section, Table, named, numbers
from fedcompo.report.results import COLUMNS, LINES, Results
from fedcompo.report.units import ALL_CLASSES, EXPLAINED, OWN_CLASSES, between, listed, percent
from fedcompo.report.vector_sections import vector_section

COLOURS = {
    "frozen_class_il_accuracy": drawing.GREY,
    "own_task_accuracy": drawing.ORANGE,
    "task_il_accuracy": drawing.GREEN,
    "class_il_accuracy": drawing.BLUE,
}
"""Accuracies that are drawn, by their keys."""
TITLES = {key: title for title, key in COLUMNS}
LOWEST = 10
"""Clients listed apart where the table of all is folded."""


def result_sections(results: Results) -> list[Section]:
    """Sections on accuracy and on the task vectors."""
    return [
        _left_out(results),
        _removal(results),
        _accuracy(results),
        *class_sections(results),
        _history(results),
        _arrivals(results),
        vector_section(results),
    ]


def _left_out(results: Results) -> Section:
    rows = [
        [one["client"], what, one["phase"], one["reason"]]
        for key, what in (("left_out", "left out"), ("missed", "missed"))
        for one in results.get(key, [])
    ]
    columns = [Column(title) for title in ("client", "what", "phase", "reason")]
    return Section("Left out and missed", [Table("Clients", columns, rows)] if rows else [])


def _removal(results: Results) -> Section:
    if "removed" not in results:
        return Section("Removal", [])
    retrain = results["to_retrain"]
    sentences = [
        f"{results['removed']} left; {listed(results['survivors']) or 'nobody'} stay.",
        "The model is, bit for bit, the one that was never given this client. "
        + (
            f"Others were trained with something of it; to undo that too, train again: "
            f"{listed(retrain)}."
            if retrain
            else "Nobody who stays was trained with anything of it."
        ),
    ]
    facts = [[key.replace("_", " "), results[key]] for key in ("record", "root_before", "root")]
    parts = [Table("Receipt", [Column("what"), Column("value")], facts)]
    before, after = results["accuracy_before"], results["accuracy_after"]
    keys = ("class_il_accuracy", "task_il_accuracy")
    rows = [
        [client, *(percent(by.get(client, {}).get(key)) for key in keys for by in (before, after))]
        for client in {**before, **after}
    ]
    titles = [
        f"{name}, {when}" for name in (ALL_CLASSES, OWN_CLASSES) for when in ("before", "after")
    ]
    if rows:
        parts.append(Table("Accuracy of those who stay, %", named(*titles), rows))
    return Section("Removal", parts, sentences)


def _accuracy(results: Results) -> Section:
    """Draw and list the accuracies by client."""
    if results.get("class_il_accuracy") is None:
        return Section("Accuracy", [])
    own = results["per_client"].values()
    series = [
        Series(TITLES[key], colour, [f[key] for f in own])
        for key, colour in COLOURS.items()
        if results.get(key) is not None
    ]
    series[-1] = replace(series[-1], intervals=[f.get("interval") for f in own])
    whiskers = len(own) <= NAMED and any(series[-1].intervals or ())
    picture = Picture(
        "Accuracy by client",
        drawing.points("Accuracy by client", list(results["per_client"]), series),
        "Per cent of the client's test images"
        + (f"; lines are 95 % intervals of {ALL_CLASSES}." if whiskers else "."),
    )
    lines = [
        f"{title}: {LINES[title]}"
        for title, key in COLUMNS
        if title in LINES and results.get(key) is not None
    ]
    sentences = [f"{line}." for line in (*lines, *EXPLAINED.splitlines())]
    return Section("Accuracy", [picture, *_accuracy_tables(results)], sentences)


def _accuracy_tables(results: Results) -> Iterable[Table]:
    """List the mean, the lowest if there are many, and all."""
    own = results["per_client"]
    columns = [(title, key) for title, key in COLUMNS if results.get(key) is not None]
    intervals = ["95 % interval"] if any(f.get("interval") for f in own.values()) else []
    kind = ["kind"] if len({f["kind"] for f in own.values()}) > 1 else []
    figures = [*(title for title, _ in columns), *intervals]
    titles = [*named(*kind, words=len(kind)), *numbers("train images", "test images", *figures)]
    titles.append(Column("classes"))

    def figures_of(f: Results) -> list[str]:
        return [
            *(percent(f[key]) for _, key in columns),
            *(between(f["interval"]) for _ in intervals),
        ]

    def row(client: str) -> list[Any]:
        f = own[client]
        counts = f["num_examples"], f["num_test_examples"] or "–"
        return [client, *(f[k] for k in kind), *counts, *figures_of(f), listed(f["classes"])]

    yield Table("Mean over clients, %", named(*figures), [["mean", *figures_of(results)]])
    whole = Table("Accuracy by client, %", titles, [row(client) for client in own])
    if whole.closed:
        measured = sorted(results["clients_evaluated"], key=lambda c: own[c]["class_il_accuracy"])
        lowest = [row(client) for client in measured[:LOWEST]]
        yield Table(f"The {len(lowest)} lowest, %", titles, lowest)
    yield whole


def _history(results: Results) -> Section:
    """List the rounds of a run that has some."""
    rows = [
        [one["round"], len(one["trained"]), f"{one['mean_loss']:.4g}"]
        for one in results.get("rounds", [])
        if one.get("mean_loss") is not None
    ]
    if not rows:
        return Section("Rounds", [])
    curve = [(one[0], float(one[2])) for one in rows]
    return Section(
        "Rounds",
        [
            Picture(
                "Loss by round",
                drawing.line("Loss by round", "round", "loss", curve),
                "Mean training loss of the clients that trained in a round.",
            ),
            Table("Rounds", named("clients", "mean loss", first="round"), rows, folded=True),
        ],
    )


def _arrivals(results: Results) -> Section:
    """List the accuracies after each arrival, where clients came one after the other."""
    parts, sentences = [], []
    for key, found in results.get("arrivals", {}).items():
        title, names = TITLES[key], found["arrivals"]
        rows = [
            [name, *map(percent, row)] for name, row in zip(names, found["matrix"], strict=True)
        ]
        parts.append(Table(f"After each arrival: {title}, %", named(*names, first="after"), rows))
        figures = (
            f"{name} {percent(found[name])} %" for name in ("average", "final", "forgetting")
        )
        sentences.append(f"{title}: {', '.join(figures)}.")
    return Section("Arrivals", parts, sentences)
