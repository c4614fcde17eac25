"""The accuracy of the model after each arrival, as a table of what ``results.json`` holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fedcompo.report.console import numbers
from fedcompo.report.units import ALL_CLASSES, OWN_CLASSES, percent

EVERY = 20
"""Arrivals up to which each has a row."""


def arrivals_table(results: Mapping[str, Any]) -> Table:
    """Show accuracies over the test images of all that had arrived, and what was forgotten."""
    measured = results["arrivals"]["class_il_accuracy"], results["arrivals"]["task_il_accuracy"]
    members, lost = results.get("tasks", {}), percent(measured[0]["forgetting"])
    table = Table(
        "arrival",
        "clients",
        *numbers(ALL_CLASSES, OWN_CLASSES),
        title="Accuracy after each arrival, %",
        caption=f"all classes: of all that had arrived; forgotten of them since their best: {lost}",
        caption_justify="left",
    )
    arrivals, step = measured[0]["arrivals"], max(1, len(measured[0]["arrivals"]) // EVERY)
    for place, arrival in enumerate(arrivals):
        if (len(arrivals) - 1 - place) % step == 0:
            courses = (percent(one["course"][place]) for one in measured)
            table.add_row(arrival, str(len(members.get(arrival, [arrival]))), *courses)
    table.add_section()
    table.add_row("average", "", *(percent(one["average"]) for one in measured), style="bold")
    return table
