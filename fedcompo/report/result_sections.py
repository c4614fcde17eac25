"""Sections of a report on the clients' figures: accuracy, rounds, a removal, who was left out."""

from __future__ import annotations

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
    own = results.get("per_client", {})
    if results.get("class_il_accuracy") is None:
        return Section("Accuracy", [])
    columns = [(title, key) for title, key in COLUMNS if results.get(key) is not None]
    series = [
        Series(
            TITLES[key],
            colour,
            [f[key] for f in own.values()],
            [f.get("interval") for f in own.values()] if key == "class_il_accuracy" else None,
        )
        for key, colour in COLOURS.items()
        if results.get(key) is not None
    ]
    intervals = ["95 % interval"] if any(f.get("interval") for f in own.values()) else []
    kinds = {f["kind"] for f in own.values()}
    kind = ["kind"] if len(kinds) > 1 else []
    titles = named(*kind, words=len(kind)) + numbers("train images", "test images")
    titles += [*numbers(*(title for title, _ in columns), *intervals), Column("classes")]

    def row(client: str) -> list[str]:
        f = own[client]
        counts = [f["num_examples"], f["num_test_examples"] or "–"]
        figures = [
            *(percent(f[key]) for _, key in columns),
            *(between(f["interval"]) for _ in intervals),
        ]
        return [client, *(f[name] for name in kind), *counts, *figures, listed(f["classes"])]

    tables = [Table("Accuracy by client, %", titles, [row(client) for client in own])]
    if tables[0].closed:
        measured = sorted(results["clients_evaluated"], key=lambda c: own[c]["class_il_accuracy"])
        lowest = [row(client) for client in measured[:LOWEST]]
        tables.insert(0, Table(f"The {len(lowest)} lowest, %", titles, lowest))
    mean = ["mean", *(percent(results[key]) for _, key in columns)]
    mean += [between(results.get("interval")) for _ in intervals]
    whiskers = intervals and len(own) <= NAMED
    lines = [f"{title}: {LINES[title]}." for title, _ in columns if title in LINES]
    return Section(
        "Accuracy",
        [
            Picture(
                "Accuracy by client",
                drawing.points("Accuracy by client", list(own), series),
                "Per cent of the client's test images"
                + (f"; lines are 95 % intervals of {ALL_CLASSES}." if whiskers else "."),
            ),
            Table("Mean over clients, %", named(*(t for t, _ in columns), *intervals), [mean]),
            *tables,
        ],
        [*lines, *(f"{line}." for line in EXPLAINED.splitlines())],
    )


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
                drawing.lines("Loss by round", "round", "loss", {"loss": curve}),
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
