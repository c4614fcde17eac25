"""The tables of a comparison, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedcompo.export.model_card import table

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
    """Format the tables: accuracy and cost, specialising and removing."""
    parts = ["Accuracy, % (mean ± standard deviation over seeds), and cost:", _accuracy(rows)]
    changing = [row for row in rows if row.mean(key("removal", "control")) is not None]
    if changing:
        parts += [
            "First, central and last client: the model of that client alone (*specialised*) and "
            "the model without it (*removed*), class-IL of its own task (target) and mean of the "
            "others' (control), %; after a removal the target is its task-IL with the head that "
            "was kept from before:",
            _changes(changing),
        ]
    return "\n\n".join(parts)


def _accuracy(rows: list[Row]) -> str:
    head = ["method", "kind", "seeds", "λ", "class-IL", "own heads", "task-IL", "own task", "Ω"]
    lines = [[*head, "sent by a client, MB", "sent to it, MB", "seconds"]]
    for row in rows:
        shown = ("class_il", "own_heads", "task_il", "own_task")
        cells = [spread(row.values(key(name))) for name in shown]
        gap = row.mean(key("gap"))
        cells.append("" if gap is None else f"{gap:.2g}")
        cost = [spread(row.values(key(name))[:1], factor=1e-6, digits=2) for name in ("up", "down")]
        seconds = spread(row.values(key("seconds"))[:1], factor=1, digits=0)
        scale = spread(row.values(key("scale")), factor=1)
        lines.append([row.title, row.kind, str(len(row.seeds)), scale, *cells, *cost, seconds])
    return table(lines[0], lines[1:], numbers=True)


def _changes(rows: list[Row]) -> str:
    parts = [("specialised", "target"), ("specialised", "control")]
    parts += [("removal", "target"), ("removal", "control_before"), ("removal", "control")]
    head = ["specialised: target", "control", "removed: target", "control before", "control after"]
    lines = [["method", "kind", *head]]
    lines += [[r.title, r.kind, *(spread(r.values(key(*p))) for p in parts)] for r in rows]
    return table(lines[0], lines[1:], numbers=True)
