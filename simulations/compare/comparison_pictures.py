"""The pictures of a comparison."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib as mpl
from comparison_tables import Row, key

mpl.use("svg")
import matplotlib.pyplot as plt

KINDS = {"lora": "C0", "full": "C1", "ia3": "C2", "tangent": "C3"}
mpl.rcParams["svg.hashsalt"] = "fedcompo"  # the same picture has the same bytes


def draw(output: Path, rows: list[Row]) -> None:
    """Draw the pictures for which there are figures.

    Args:
        output: Folder of the pictures.
        rows: Methods and kinds.
    """
    _accuracy(output / "accuracy.svg", rows)
    _bytes(output / "bytes.svg", rows)
    _arrivals(output / "arrivals.svg", [r for r in rows if r.mean(key("arrivals", "final"))])
    changing = [r for r in rows if r.mean(key("removal", "control")) is not None]
    _changes(output / "changes.svg", changing)
    _alignment(output / "alignment.svg", [r for r in rows if r.mean(key("cosine")) is not None])


def _accuracy(path: Path, rows: list[Row]) -> None:
    titles = list(dict.fromkeys(row.title for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.5 + 0.42 * len(titles)), sharey=True)
    for axis, (name, title) in zip(
        axes, (("class_il", "class-IL"), ("task_il", "task-IL")), strict=True
    ):
        for index, (kind, colour) in enumerate(KINDS.items()):
            own = [row for row in rows if row.kind == kind and row.values(key(name))]
            places = [titles.index(row.title) + 0.2 * (index - 1.5) for row in own]
            values = [[100 * v for v in row.values(key(name))] for row in own]
            means = [statistics.fmean(v) for v in values]
            errors = [statistics.stdev(v) if len(v) > 1 else 0 for v in values]
            axis.errorbar(means, places, xerr=errors, fmt="o", color=colour, label=kind, ms=4)
        axis.set_xlabel(f"{title}, %")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(titles)), titles)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    _save(figure, path)


def _bytes(path: Path, rows: list[Row]) -> None:
    figure, axis = plt.subplots(figsize=(8, 5))
    for row in rows:
        sent, accuracy = row.mean(key("up")), row.mean(key("class_il"))
        if sent and accuracy is not None:
            axis.plot(sent / 1e6, 100 * accuracy, "o", color=KINDS[row.kind])
            label = f"{row.title}, {row.kind}"
            axis.annotate(label, (sent / 1e6, 100 * accuracy), fontsize=6, rotation=20)
    axis.set_xscale("log")
    axis.set_xlabel("sent by a client, MB")
    axis.set_ylabel("class-IL, %")
    axis.grid(alpha=0.3)
    _save(figure, path)


def _arrivals(path: Path, rows: list[Row]) -> None:
    if not rows:
        return
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for row in rows:
        courses = [seed["arrivals"]["course"] for seed in row.seeds if seed.get("arrivals")]
        length = min(map(len, courses))
        means = [100 * statistics.fmean(course[i] for course in courses) for i in range(length)]
        style = "-" if "ITA" in row.title else "--"
        label = f"{row.title}, {row.kind}"
        axis.plot(range(1, length + 1), means, style, color=KINDS[row.kind], label=label)
    axis.set_xlabel("clients that have arrived")
    axis.set_ylabel("class-IL over those that are there, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    _save(figure, path)


def _changes(path: Path, rows: list[Row]) -> None:
    if not rows:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.5 + 0.3 * len(rows)), sharey=True)
    labels = [f"{row.title}, {row.kind}" for row in rows]
    shown = {
        "specialised": (("target", "its own task", "o"), ("control", "other tasks", "x")),
        "removal": (("control_before", "others, before", "x"), ("control", "others, after", "o")),
    }
    for axis, (change, parts) in zip(axes, shown.items(), strict=True):
        for name, label, marker in parts:
            values = [100 * (row.mean(key(change, name)) or 0) for row in rows]
            axis.plot(values, range(len(rows)), marker, label=label)
        axis.set_title(change)
        axis.set_xlabel("class-IL, %")
        axis.grid(axis="x", alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_yticks(range(len(rows)), labels, fontsize=8)
    axes[0].invert_yaxis()
    _save(figure, path)


def _alignment(path: Path, rows: list[Row]) -> None:
    if not rows:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.5 + 0.3 * len(rows)), sharey=True)
    labels = [f"{row.title}, {row.kind}" for row in rows]
    places = range(len(rows))
    axes[0].barh(places, [row.mean(key("cosine")) or 0 for row in rows])
    axes[0].set_xlabel("mean cosine of two clients' task vectors")
    axes[1].barh(places, [row.mean(key("gap")) or 0 for row in rows])
    axes[1].set_xscale("log")
    axes[1].set_xlabel("gap Ω")
    axes[0].set_yticks(places, labels, fontsize=8)
    axes[0].invert_yaxis()
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
