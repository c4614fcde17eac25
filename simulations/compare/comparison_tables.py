"""The tables of a comparison, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedcompo.audit.report import markdown_table

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """Figures of one method with one kind, by seed."""

    title: str
    kind: str
    seeds: tuple[Figures, ...]

    def values(self, of: Callable[[Figures], float | None]) -> list[float]:
        """Return one figure of each seed that has it."""
        return [value for seed in self.seeds if (value := of(seed)) is not None]

    def mean(self, of: Callable[[Figures], float | None]) -> float | None:
        """Mean over seeds."""
        values = self.values(of)
        return statistics.fmean(values) if values else None


def spread(values: list[float], *, factor: float = 100, digits: int = 1) -> str:
    """Format mean and standard deviation; empty if there is no value."""
    if not values:
        return ""
    text = f"{factor * statistics.fmean(values):.{digits}f}"
    deviation = factor * statistics.stdev(values) if len(values) > 1 else None
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def key(*path: str) -> Callable[[Figures], float | None]:
    """Return the figure at a path of keys; None if it is missing."""

    def of(figures: Figures) -> float | None:
        value: Any = figures
        for part in path:
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    return of


def tables(rows: list[Row]) -> str:
    """Format the tables: accuracy and cost, specialising and removing, arrivals, alignment, gap."""
    parts = ["Accuracy, % (mean ± standard deviation over seeds), and cost:", _accuracy(rows)]
    composed = [row for row in rows if row.mean(key("heads", "trained")) is not None]
    if composed:
        parts += [
            "The same composed weights under three joint heads, class-IL, %:",
            _heads(composed),
        ]
    changing = [row for row in rows if row.mean(key("removal", "control")) is not None]
    if changing:
        parts += [
            "First, central and last client: the model of that client alone (*specialised*) and "
            "the model without it (*removed*), class-IL of its own task (target) and mean of the "
            "others' (control), %; after a removal the target is its task-IL with the head that "
            "was kept from before:",
            _changes(changing),
        ]
    arriving = [row for row in rows if row.mean(key("arrivals", "final")) is not None]
    if arriving:
        parts += ["One client after the other, class-IL, %:", _arrivals(arriving)]
    aligned = [row for row in rows if row.mean(key("cosine")) is not None]
    if aligned:
        parts += ["Task vectors, and the gap Ω of Theorem 1:", _alignment(aligned)]
    return "\n\n".join(parts)


def _accuracy(rows: list[Row]) -> str:
    head = ["method", "kind", "seeds", "λ", "class-IL", "task-IL", "own task"]
    lines = [[*head, "sent by a client, MB", "sent to it, MB", "seconds"]]
    for row in rows:
        cells = [spread(row.values(key(name))) for name in ("class_il", "task_il", "own_task")]
        cost = [spread(row.values(key(name))[:1], factor=1e-6, digits=2) for name in ("up", "down")]
        seconds = spread(row.values(key("seconds"))[:1], factor=1, digits=0)
        scale = spread(row.values(key("scale")), factor=1)
        lines.append([row.title, row.kind, str(len(row.seeds)), scale, *cells, *cost, seconds])
    return markdown_table(lines)


def _heads(rows: list[Row]) -> str:
    head = [
        "clients' own, as trained",
        "made of θ₀'s features",
        "made of the composed model's",
    ]
    lines = [["method", "kind", *head]]
    for row in rows:
        figures = [key("heads", "trained"), key("heads", "frozen"), key("class_il")]
        lines.append([row.title, row.kind, *(spread(row.values(figure)) for figure in figures)])
    return markdown_table(lines)


def _changes(rows: list[Row]) -> str:
    parts = [("specialised", "target"), ("specialised", "control")]
    parts += [("removal", "target"), ("removal", "control_before"), ("removal", "control")]
    head = ["specialised: target", "control", "removed: target", "control before", "control after"]
    lines = [["method", "kind", *head]]
    lines += [[r.title, r.kind, *(spread(r.values(key(*p))) for p in parts)] for r in rows]
    return markdown_table(lines)


def _arrivals(rows: list[Row]) -> str:
    lines = [["method", "kind", "final", "average", "forgetting"]]
    for row in rows:
        names = ("final", "average", "forgetting")
        lines.append(
            [row.title, row.kind, *(spread(row.values(key("arrivals", n))) for n in names)]
        )
    return markdown_table(lines)


def _alignment(rows: list[Row]) -> str:
    lines = [["method", "kind", "mean cosine of two task vectors", "Ω", "mean norm"]]
    for row in rows:
        gap = row.mean(key("gap"))
        lines.append(
            [
                row.title,
                row.kind,
                spread(row.values(key("cosine")), factor=1, digits=3),
                f"{gap:.2g}" if gap is not None else "",
                spread(row.values(key("norm")), factor=1, digits=2),
            ]
        )
    return markdown_table(lines)
