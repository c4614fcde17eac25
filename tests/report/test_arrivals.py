"""The table of arrivals: the newest always has its row, and few rows stand for many arrivals."""

from __future__ import annotations

import pytest
from rich.console import Console

from fedcompo.report.results import EVERY, arrivals_table


def shown(count: int, *, tasks: bool) -> str:
    names = [f"task-{i}" if tasks else f"client-{i}" for i in range(count)]
    measure = {
        "arrivals": names,
        "course": [None, *(i / count for i in range(1, count))],
        "average": 0.5,
        "forgetting": 0.125,
    }
    results = {"arrivals": {"class_il_accuracy": measure, "task_il_accuracy": measure}}
    if tasks:
        results["tasks"] = {name: ["a", "b", "c"] for name in names}
    console = Console(width=100)
    with console.capture() as captured:
        console.print(arrivals_table(results))
    return captured.get()


def test_each_task_is_shown_with_its_clients_and_what_was_forgotten():
    lines = shown(4, tasks=True).splitlines()
    rows = [line.replace("│", " ").split() for line in lines if "task-" in line]
    assert rows[0] == ["task-0", "3", "–", "–"]
    assert rows[-1] == ["task-3", "3", "75.0", "75.0"]
    assert "12.5" in " ".join(lines[-2:])


@pytest.mark.parametrize("count", [1, EVERY, 500])
def test_few_rows_stand_for_many_arrivals(count):
    rows = [line for line in shown(count, tasks=False).splitlines() if "client-" in line]
    assert 0 < len(rows) <= 2 * EVERY
    assert f"client-{count - 1} " in rows[-1]
