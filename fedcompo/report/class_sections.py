"""Sections of a report on classes: accuracy of each, confusions, calibration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from fedcompo.report import drawing
from fedcompo.report.drawing import Series
from fedcompo.report.page import Column, Picture, Section, Table, numbers
from fedcompo.report.units import between, listed, percent

Values = Mapping[str, Any]
DRAWN = 200
"""Most classes of a confusion matrix that is drawn."""
NOTE = "; lines are 95 % intervals."
MISTAKES = 200
"""Most mistakes in the table."""


def class_sections(results: Values) -> list[Section]:
    """Make those whose figures the results have."""
    sections = []
    if by_class := results.get("by_class"):
        sections.append(_accuracies(by_class, results.get("worst_classes", [])))
    if (found := results.get("confusion")) and found["counts"]:
        sections.append(_confusions(found["classes"], found["counts"]))
    if (found := results.get("calibration")) and found["error"] is not None:
        sections.append(_calibration(found))
    return sections


def _accuracies(by_class: Values, worst: Sequence[str]) -> Section:
    columns = [Column("class"), Column("clients"), *numbers("test images", "right")]
    columns += [*numbers("accuracy, %", "95 % interval"), Column("mistaken for")]

    def row(name: str) -> list[Any]:
        own = by_class[name]
        taken = ", ".join(f"{other} ({count})" for other, count in own["mistaken_for"])
        figures = [own["images"], own["correct"], percent(own["accuracy"])]
        return [name, listed(own["clients"]), *figures, between(own["interval"]), taken]

    names = sorted(by_class, key=lambda name: by_class[name]["accuracy"])
    values = [by_class[name]["accuracy"] for name in names]
    intervals = [by_class[name]["interval"] for name in names]
    series = [Series("accuracy", drawing.BLUE, values, intervals)]
    tables = [Table("Accuracy by class", columns, [row(name) for name in by_class])]
    if worst:
        tables.insert(0, Table("Worst classes", columns, [row(name) for name in worst]))
    return Section(
        "Classes",
        [
            Picture(
                "Accuracy by class, lowest first",
                drawing.points("Accuracy by class", names, series),
                "Per cent of the class's test images at all clients, among all classes"
                + (NOTE if len(names) <= drawing.NAMED else "."),
            ),
            *tables,
        ],
    )


def _confusions(classes: Sequence[str], counts: Sequence[tuple[int, int, int]]) -> Section:
    """Draw the matrix, in shares of the true class, and list the mistakes."""
    of: dict[int, int] = defaultdict(int)
    for true, _, count in counts:
        of[true] += count
    parts: list[Table | Picture] = []
    if len(classes) <= DRAWN:
        shares = [[0.0] * len(classes) for _ in classes]
        for true, taken, count in counts:
            shares[true][taken] = count / of[true]
        title, texts = "Confusion matrix", {(true, taken): f"{n}" for true, taken, n in counts}
        names = ("taken for", "true class")
        drawn = drawing.matrix(title, classes, shares, texts, axes_names=names, right=True)
        description = (
            "Rows are the true classes, columns what their test images were taken for. The "
            "stronger the colour, the larger the share of the class: blue right, orange wrong."
        )
        parts.append(Picture(title, drawn, description, large=len(classes) > drawing.WRITTEN))
    mistakes = sorted((c for c in counts if c[0] != c[1]), key=lambda c: (-c[2], c[0], c[1]))
    rows = [
        [classes[true], classes[taken], count, percent(count / of[true])]
        for true, taken, count in mistakes[:MISTAKES]
    ]
    columns = [Column("true class"), Column("taken for"), *numbers("images", "% of the class")]
    few = len(mistakes) <= MISTAKES
    title = "Mistakes" if few else f"The {MISTAKES} most frequent of {len(mistakes)} mistakes"
    right = sum(count for true, taken, count in counts if true == taken)
    sentence = f"{right} of {sum(of.values())} test images are right among all classes."
    if not parts:
        sentence += f" A matrix is drawn of up to {DRAWN} classes, not of {len(classes)}."
    return Section(
        "Confusions", [*parts, *([Table(title, columns, rows)] if rows else [])], [sentence]
    )


def _calibration(found: Values) -> Section:
    bins = [one for one in found["bins"] if one["images"]]
    rows = [
        [
            f"{percent(one['from'])} to {percent(one['to'])}",
            one["images"],
            percent(one["confidence"]),
            percent(one["accuracy"]),
        ]
        for one in bins
    ]
    columns = [Column("confidence, %"), *numbers("images", "mean confidence, %", "accuracy, %")]
    return Section(
        "Calibration",
        [
            Picture(
                "Accuracy by confidence",
                drawing.reliability("Accuracy by confidence", bins),
                "Confidence is the probability of the class that the model chose. On the dashed "
                "line it is right as often as it says; below it is too sure. Large points are of "
                "more images.",
            ),
            Table("Bins of confidence", columns, rows, folded=True),
        ],
        [
            f"Expected calibration error: {percent(found['error'])} %, how far confidence and "
            "accuracy are apart."
        ],
    )
