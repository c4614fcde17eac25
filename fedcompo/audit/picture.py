"""Draws an audit: AUC with intervals, and accuracies."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from fedcompo.audit.measure import CLASS_IL, FIGURES, TASK_IL
from fedcompo.audit.models import AFTER, BEFORE, GOLD
from fedcompo.report.picture import document, text
from fedcompo.report.units import ALL_CLASSES, OWN_CLASSES, percent

Values = Mapping[str, Any]
Groups = Sequence[tuple[str, Mapping[str, Values]]]
"""Label, and an estimate (``value``, ``low``, ``high``) by model."""

TITLES = {CLASS_IL: ALL_CLASSES, TASK_IL: OWN_CLASSES}
MODELS = {
    BEFORE: ("everyone", "#9aa5b1"),
    AFTER: ("the client removed", "#2f6f8f"),
    GOLD: ("the client never took part", "#e0a458"),
}
"""Of each model: what it is composed of, and its colour."""


def picture(values: Values, facts: Sequence[str]) -> str:
    """Return an SVG: AUC with intervals on the left, accuracies on the right, facts below."""
    names = list(values["models"])
    groups = [
        (attack.replace("-", " "), {name: by_model[name]["auc"] for name in names})
        for attack, by_model in values["membership"].items()
    ]
    top, row = 122, 100
    parts = [
        text(20, 30, f"Does the model forget {_named(values)}?", bold=True),
        *_legend(names),
        text(20, 100, "Membership inference: AUC, 95 % interval", bold=True),
        *interval_chart(groups, left=140, top=top, width=330, row=row),
        *(text(20, top + row * len(groups) + 66 + 20 * i, fact) for i, fact in enumerate(facts)),
        text(540, 100, "Accuracy, %", bold=True),
        *_bars(values, left=540, top=116),
    ]
    return document(960, 130 + 4 * _group_height(names), parts)


def _legend(names: Sequence[str]) -> list[str]:
    """Name the models' colours in a line."""
    parts, left, top = [], 20.0, 46
    for name in names:
        what, colour = MODELS[name]
        parts.append(f'<rect x="{left}" y="{top}" width="12" height="12" fill="{colour}"/>')
        parts.append(text(left + 17, top + 11, f"{name}: {what}"))
        left += 60 + 6.6 * len(f"{name}: {what}")
    return parts


def interval_chart(
    groups: Groups, *, left: float, top: float, width: float, row: float
) -> list[str]:
    """Draw estimates as points with whiskers, a group a row, over one axis with chance marked."""
    estimates = [estimate for _, by_model in groups for estimate in by_model.values()]
    first = math.floor(10 * min(0.4, *(float(e["low"]) for e in estimates))) / 10
    last = math.ceil(10 * max(0.6, *(float(e["high"]) for e in estimates))) / 10
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
    for index, (label, by_model) in enumerate(groups):
        middle = top + row * (index + 0.5)
        parts.append(text(left - 12, middle + 5, label, anchor="end"))
        for place, (name, estimate) in enumerate(by_model.items()):
            y = middle + (place - (len(by_model) - 1) / 2) * min(26.0, row / (len(by_model) + 0.5))
            parts += _point(x, y, estimate, MODELS[name][1])
    return parts


def _point(x: Callable[[float], float], y: float, estimate: Values, colour: str) -> list[str]:
    low, value, high = (x(float(estimate[key])) for key in ("low", "value", "high"))
    return [
        f'<path d="M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 4:.1f}v8M{high:.1f} {y - 4:.1f}v8" '
        f'stroke="{colour}" stroke-width="2" fill="none"/>',
        f'<circle cx="{value:.1f}" cy="{y:.1f}" r="5" fill="{colour}">'
        f"<title>{estimate['low']:.3f} to {estimate['high']:.3f}</title></circle>",
        text(high + 8, y + 4, f"{estimate['value']:.2f}"),
    ]


def _group_height(names: Collection[str]) -> int:
    return 22 * len(names) + 26


def _bars(values: Values, *, left: float, top: float) -> list[str]:
    """Bars of accuracy: the removed client's images, then the mean of the others'."""
    parts = []
    client, mean = _named(values), "mean of the remaining"
    shown = [
        (f"{client}, {ALL_CLASSES}", "removed", CLASS_IL),
        (f"{client}, {OWN_CLASSES} with the rows of before", "removed", TASK_IL),
    ]
    if values["accuracy"]["remaining"]:
        shown += [(f"{mean}, {TITLES[key]}", "remaining", key) for key in FIGURES]
    for index, (label, part, key) in enumerate(shown):
        y = top + index * _group_height(values["models"])
        parts.append(text(left, y + 12, label))
        for place, (name, about) in enumerate(values["models"].items()):
            share = values["accuracy"][part][name][key]
            at = y + 18 + 22 * place
            no_rows = part == "removed" and key == CLASS_IL and not about["rows_of_client"]
            caption = "0.0: its head has no rows of these classes" if no_rows else percent(share)
            parts.append(
                f'<rect x="{left}" y="{at}" width="{320 * share:.1f}" height="18" '
                f'fill="{MODELS[name][1]}"/>'
            )
            parts.append(text(left + 320 * share + 6, at + 14, caption))
    return parts


def _named(values: Values) -> str:
    """The client's name, as far as there is room."""
    client = str(values["client"])
    return client if len(client) <= 24 else f"{client[:23]}…"
