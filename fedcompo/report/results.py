"""The results of a run as tables in the terminal; as a page: :mod:`fedcompo.report.pages`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from rich.table import Column, Table

from fedcompo.report import units
from fedcompo.report.confusion import worst_line
from fedcompo.report.console import PlainConsole, numbers, table_console

Results = Mapping[str, Any]
"""What ``results.json`` holds."""
SHOWN = 40
"""Clients shown by name; of more, the first so many."""
EVERY = 20
"""Arrivals up to which each has a row."""
COLUMNS = (
    ("frozen", "frozen_class_il_accuracy"),
    ("alone", "own_task_accuracy"),
    ("own heads", "own_heads_accuracy"),
    (units.ALL_CLASSES, "class_il_accuracy"),
    (units.OWN_CLASSES, "task_il_accuracy"),
)
LINES = {
    "frozen": "before any training: right among all classes",
    "alone": "the client's model by itself: right among its own classes",
    "own heads": "composed, but with the clients' own heads: right among all classes",
}
"""A line on each column, by its title."""
CAPTION = "images: to train on + to test on"
OF_SHARDS = "–: another shard of the client measured, on the same test images"


def print_results(results: Results, console: PlainConsole, *, details: bool = False) -> None:
    """Print the accuracies and the traffic of a run: what ``results.json`` holds.

    With details, also the candidates of a vote on λ, and the task vectors: lengths, overlaps, Ω.
    """
    console = table_console(console)
    console.print(_accuracy_table(results))
    if "arrivals" in results:
        console.print(arrivals_table(results))
    if worst := worst_line(results):
        console.print(worst)
    console.print(_traffic_table(results))
    if "scale" in results:
        _print_scale(results["scale"], console, details=details)
    if "diagnostics" in results:
        _print_diagnostics(results, console, details=details)
    for key, what, style in (("left_out", "Left out", "bold red"), ("missed", "Missed", "red")):
        for one in results.get(key, []):
            line = f"{what}: {one['client']} ({one['phase']}): {one['reason']}"
            console.print(line, style=style)
    for note in results["notes"]:
        console.print(f"Note: {note}", style="yellow")


def _print_scale(chosen: Mapping[str, Any], console: PlainConsole, *, details: bool) -> None:
    """Print λ, and with details the candidates where the clients voted."""
    scale = f"λ = {chosen['scale']:.3g}, how much of the task vectors' mean the model takes"
    if not chosen["candidates"]:
        console.print(f"{scale} (by {chosen['by']})")
        return
    console.print(f"{scale}: voted on, by the least loss on {chosen['votes']} images kept aside")
    if not details:
        return
    table = Table(*numbers("λ", "loss", "accuracy in %"), title="Vote on λ")
    best = min(candidate["loss"] for candidate in chosen["candidates"])
    for tried in chosen["candidates"]:
        cells = (f"{tried['scale']:.3g}", f"{tried['loss']:.3g}", units.percent(tried["accuracy"]))
        table.add_row(*cells, style="bold" if tried["loss"] == best else "")
    console.print(table)


def _print_diagnostics(results: Results, console: PlainConsole, *, details: bool) -> None:
    if details:
        console.print(_diagnostics_table(results))
        gap = results["diagnostics"]["composition_gap"]
        console.print(f"Gap Ω of Theorem 1 (mean Fisher, composition's coefficients): {gap:.3g}")
    if outliers := results["diagnostics"]["outliers"]:
        console.print(
            f"Outliers: {units.listed(outliers)}: task vectors far longer or shorter than most, or "
            "against the others'. Look at these clients' data; `--details` shows the figures.",
            style="bold yellow",
        )


def columns_of(results: Results) -> list[tuple[str, str]]:
    """Titles and keys of the accuracies that the results have."""
    return [column for column in COLUMNS if results.get(column[1]) is not None]


def _accuracy_table(results: Results) -> Table:
    columns = columns_of(results)
    counted = numbers("images", *(title for title, _ in columns))
    kinds = {figures["kind"] for figures in results["per_client"].values()}
    kind = ["kind"] if len(kinds) > 1 else []
    lines = [f"{title}: {LINES[title]}" for title, _ in columns if title in LINES]
    tests = [
        figures["num_test_examples"] if figures.get("interval") else units.SMALL
        for figures in results["per_client"].values()
        if figures["num_test_examples"]  # of a client's shards, one measures
    ]
    if any(".shard-" in c and not f["num_test_examples"] for c, f in results["per_client"].items()):
        lines += [OF_SHARDS]
    lines += [units.BRACKETS] if min(tests, default=units.SMALL) < units.SMALL else []
    caption = "\n".join([CAPTION, *lines, units.EXPLAINED])
    style: Any = {"title": "Accuracy, %", "caption": caption, "caption_justify": "left"}
    table = Table(Column("client", no_wrap=True), "classes", *kind, *counted, **style)
    for client in shown(results):
        figures = results["per_client"][client]
        table.add_row(
            client,
            units.shortened(figures["classes"]),
            *(figures[name] for name in kind),
            f"{figures['num_examples']} + {figures['num_test_examples'] or '–'}",
            *_accuracies(figures, columns, figures["num_test_examples"] or units.SMALL),
        )
    if (hidden := len(results["per_client"]) - SHOWN) > 0:
        table.add_row(f"... and {hidden} more")
    table.add_section()
    means = _accuracies(results, columns, sum(tests))
    table.add_row("mean", *([""] * (2 + len(kind))), *means, style="bold")
    return table


def _accuracies(figures: Results, columns: list[tuple[str, str]], images: int) -> list[str]:
    """Cells of a row; the accuracy over all classes with its interval, if test images are few."""
    between = units.percent_between(figures["class_il_accuracy"], figures.get("interval"), images)
    return [
        between if title == units.ALL_CLASSES else units.percent(figures[key])
        for title, key in columns
    ]


def arrivals_table(results: Results) -> Table:
    """Show accuracies over the test images of all that had arrived, and what was forgotten."""
    measured = results["arrivals"]["class_il_accuracy"], results["arrivals"]["task_il_accuracy"]
    members, lost = results.get("tasks", {}), units.percent(measured[0]["forgetting"])
    table = Table(
        "arrival",
        "clients",
        *numbers(units.ALL_CLASSES, units.OWN_CLASSES),
        title="Accuracy after each arrival, %",
        caption=f"all classes: of all that had arrived; forgotten of them since their best: {lost}",
        caption_justify="left",
    )
    arrivals, step = measured[0]["arrivals"], max(1, len(measured[0]["arrivals"]) // EVERY)
    for place, arrival in enumerate(arrivals):
        if (len(arrivals) - 1 - place) % step == 0:
            courses = (units.percent(one["course"][place]) for one in measured)
            table.add_row(arrival, str(len(members.get(arrival, [arrival]))), *courses)
    table.add_section()
    table.add_row("average", "", *(units.percent(one["average"]) for one in measured), style="bold")
    return table


def _traffic_table(results: Results) -> Table:
    by_name = phases_of(results)
    alone = [name for name, parts in by_name.items() if not total(parts, "bytes_sent")]
    seconds = ", ".join(f"{name} {total(by_name[name], 'seconds'):.1f} s" for name in alone)
    table = Table(
        title="Bytes sent, time, memory",
        caption=f"On the server alone: {seconds}. Peak memory: of one client",
    )
    table.add_column("client", no_wrap=True)
    phases = {name: parts for name, parts in by_name.items() if name not in alone}

    def add(title: str, counts: Iterable[int]) -> None:
        table.add_row(title, *(units.size(count) if count else "" for count in counts))

    for name, parts in phases.items():
        title = f"{name} × {len(parts)}" if len(parts) > 1 else name
        table.add_column(title, justify="right", no_wrap=True)
    for client in shown(results):
        traffic = results["per_client"][client]["traffic"]
        own = [[traffic[part] for part in parts if part in traffic] for parts in phases.values()]
        add(client, (sum(cost["bytes_received"] for cost in costs) for costs in own))
    table.add_section()
    add("server", (total(parts, "bytes_sent") for parts in phases.values()))
    table.add_row("seconds", *(f"{total(parts, 'seconds'):.1f}" for parts in phases.values()))
    peaks = [[one["peak_memory_bytes"] for one in parts.values()] for parts in phases.values()]
    add("peak memory", (max(peak.get("client", 0) for peak in own) for own in peaks))
    return table


def shown(results: Results) -> list[str]:
    """Names of the clients that are shown."""
    return list(islice(results["per_client"], SHOWN))


def cosines_of(gram: Sequence[Sequence[float]]) -> list[list[float]]:
    """Cosines from a Gram matrix; 0 for a vector of no length."""
    lengths = [math.sqrt(max(0.0, row[index])) for index, row in enumerate(gram)]
    return [
        [
            value / (lengths[i] * lengths[j]) if lengths[i] * lengths[j] > 0 else 0.0
            for j, value in enumerate(row)
        ]
        for i, row in enumerate(gram)
    ]


def phases_of(results: Results) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Group phases by name: all rounds, for example, under one."""
    by_name: dict[str, dict[str, Mapping[str, Any]]] = {}
    for label, phase in results["phases"].items():
        by_name.setdefault(label.partition(", ")[0], {})[label] = phase
    return by_name


def total(parts: Mapping[str, Mapping[str, Any]], name: str) -> Any:
    """Sum up a figure of phases."""
    return sum(part[name] for part in parts.values())


def _diagnostics_table(results: Results) -> Table:
    diagnostics = results["diagnostics"]
    gram = diagnostics["fisher_gram"]
    cosines = cosines_of(gram) if gram and len(gram) <= SHOWN else []
    title = "Task vectors: length" + (", and cosine in the Fisher metric" if cosines else "")
    more = numbers("τᵀF̄τ", *diagnostics["clients"]) if cosines else []
    columns = [*numbers("‖τ‖"), *more]
    table = Table("client", *columns, title=title, padding=(0, 1, 0, 0))  # fits five clients
    for index, client in enumerate(diagnostics["clients"][:SHOWN]):
        row = [client, f"{diagnostics['tau_norms'][index]:.3g}"]
        if cosines:
            row.append(f"{diagnostics['fisher_gram'][index][index]:.2g}")
            row += [f"{value:+.2f}" for value in cosines[index]]
        table.add_row(*row)
    return table
