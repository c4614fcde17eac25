"""Figures and cells of a report: what of the results is drawn, and what stands in tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fedcompo.report import drawing
from fedcompo.report.drawing import Series
from fedcompo.report.results import COLUMNS, Results, cosines_of, total
from fedcompo.report.units import between, percent

TITLES = {key: title for title, key in COLUMNS}
COLOURS = {
    "frozen_class_il_accuracy": drawing.GREY,
    "own_task_accuracy": drawing.ORANGE,
    "task_il_accuracy": drawing.GREEN,
    "class_il_accuracy": drawing.BLUE,
}
"""Accuracies that are drawn, by their keys."""

Values = Mapping[str, Any]


def accuracies(results: Results) -> Markup:
    """Draw the accuracies by client."""
    own = results["per_client"].values()
    series = [
        Series(
            TITLES[key],
            colour,
            [figures[key] for figures in own],
            [figures.get("interval") for figures in own] if key == "class_il_accuracy" else (),
        )
        for key, colour in COLOURS.items()
        if results.get(key) is not None
    ]
    return drawing.points("Accuracy by client", list(results["per_client"]), series)


def classes(by_class: Values) -> Markup:
    """Draw the accuracy by class, the lowest first."""
    names = sorted(by_class, key=lambda name: by_class[name]["accuracy"])
    values, intervals = ([by_class[n][key] for n in names] for key in ("accuracy", "interval"))
    return drawing.points(
        "Accuracy by class", names, [Series("accuracy", drawing.BLUE, values, intervals)]
    )


def confusions(results: Results) -> Markup:
    """Draw the shares of each true class: right ones blue, wrong ones orange."""
    names, counts = results["confusion"]["classes"], results["confusion"]["counts"]
    shares = [[0.0] * len(names) for _ in names]
    for true, taken, count in counts:
        share = count / results["by_class"][names[true]]["images"]
        shares[true][taken] = share if true == taken else -share
    texts = {(true, taken): str(count) for true, taken, count in counts}
    return drawing.matrix("Confusion matrix", names, shares, texts, ("taken for", "true class"))


def mistakes(counts: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Sort out what is right; the most frequent mistakes are first."""
    return sorted((c for c in counts if c[0] != c[1]), key=lambda c: (-c[2], c[0], c[1]))


def overlap(clients: list[str], gram: list[list[float]]) -> Markup:
    """Draw the cosines of task vectors."""
    cosines = cosines_of(gram)
    texts = {(i, j): f"{v:+.2f}" for i, row in enumerate(cosines) for j, v in enumerate(row)}
    return drawing.matrix("Overlap of the task vectors", clients, cosines, texts)


def phases(by_name: Mapping[str, Mapping[str, Values]]) -> Markup:
    """Draw seconds and bytes by phase; rounds of one phase together."""
    sums = {
        title: [total(parts, key) / unit for parts in by_name.values()]
        for title, key, unit in (
            ("seconds", "seconds", 1),
            ("MB sent", "bytes_sent", 1e6),
            ("MB received", "bytes_received", 1e6),
        )
    }
    return drawing.bars("By phase", list(by_name), sums)


def vote(candidates: Iterable[Values]) -> Markup:
    """Draw the loss by λ, at the best shrinkage of each."""
    best = {c["scale"]: c["loss"] for c in sorted(candidates, key=lambda c: -c["loss"])}
    xs = sorted(best)
    return drawing.line("Vote on λ", ("λ", "loss"), xs, [best[x] for x in xs])


def cells(figures: Values, columns: Iterable[tuple[str, str]]) -> list[str]:
    """Accuracies of a client or of the run, then the interval of the one among all classes."""
    return [*(percent(figures[key]) for _, key in columns), between(figures.get("interval"))]


def lowest(results: Results) -> list[str]:
    """Clients that were measured, the lowest accuracy first."""
    own = results["per_client"]
    return sorted(results["clients_evaluated"], key=lambda c: own[c]["class_il_accuracy"])


def taken(of_class: Values) -> str:
    """What a class is mistaken for, and how often."""
    return ", ".join(f"{other} ({count})" for other, count in of_class["mistaken_for"])


def signed(values: Sequence[float]) -> list[str]:
    """Write cosines."""
    return [f"{value:+.3f}" for value in values]
