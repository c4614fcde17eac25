"""The report of a run, from its ``results.json``, and that of a registry.

Results that an earlier version wrote lack some figures; their sections are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedcompo.config.run import RunConfig
from fedcompo.report import drawing
from fedcompo.report.page import (
    REPORT,
    Alert,
    Column,
    Page,
    Picture,
    Section,
    Table,
    Tile,
    named,
)
from fedcompo.report.registry_sections import registry_alerts, registry_sections
from fedcompo.report.result_sections import result_sections
from fedcompo.report.results import Results, phases_of, total
from fedcompo.report.units import ALL_CLASSES, OWN_CLASSES, between, duration, listed, percent, size
from fedcompo.storage.files import write_atomically

Values = Mapping[str, Any]
TOLD = 10
"""Clients left out that are told at the top; a table holds all."""


def write_report(folder: Path, results: Results, registry: Values | None = None) -> None:
    """Write ``report.html``.

    Args:
        folder: Of the run.
        results: What ``results.json`` holds.
        registry: The run's registry, as :func:`fedcompo.registry.story.story` describes it.
    """
    write_atomically(folder / REPORT, run_page(results, registry).html().encode())


def run_page(results: Results, registry: Values | None = None) -> Page:
    """Make the report of a run, a removal or a baseline; arguments as of :func:`write_report`."""
    what = f"removal of {results['removed']}" if "removed" in results else results["method"]
    alerts = _alerts(results)
    if registry:
        alerts = [*_changed(results, registry), *alerts, *registry_alerts(registry)]
    return Page(
        title=f"fedcompo: {what} on {results['settings'].get('data', '')}",
        subtitle=f"Started {results['created']}, took {duration(results['seconds'])}. "
        f"Backbone {results['backbone']['name']}, seed {results['seed']}.",
        tiles=_tiles(results),
        alerts=alerts,
        sections=[
            *result_sections(results),
            *(registry_sections(registry) if registry else ()),
            _traffic(results),
            _what_ran(results),
        ],
    )


def registry_page(registry: Values, results: Results | None = None) -> Page:
    """Make the report of a registry.

    Args:
        registry: As :func:`fedcompo.registry.story.story` describes it.
        results: Of the run that made it, for the accuracies; None: there are none.
    """
    changed = _changed(results, registry) if results else []
    clients = registry["clients"]
    images = sum(one["num_examples"] for one in clients)
    return Page(
        title=f"fedcompo: registry {registry['registry']}",
        subtitle=f"Created {registry['created']}, last changed {registry['changed']}.",
        tiles=[
            Tile("members", str(len(clients)), f"{images} images"),
            Tile("classes", str(len(registry["classes"]))),
            Tile("removed", str(len(registry["removed"]))),
            Tile("λ", f"{registry['scale']:.4g}", f"by {registry['factor_by'] or 'nobody'}"),
        ],
        alerts=[*changed, *registry_alerts(registry)],
        sections=[*registry_sections(registry), *(result_sections(results) if results else ())],
    )


def _changed(results: Results, registry: Values) -> list[Alert]:
    """Say that the registry is not any more what the run left."""
    left = results["root"] if "removed" in results else results["registry"]["root"]
    if left == registry["root"]:
        return []
    text = f"The accuracies are those of the run of {results['created']}; the registry has changed "
    return [Alert(f"{text}since. `fedcompo evaluate` measures it anew.", grave=True)]


def _tiles(results: Results) -> list[Tile]:
    tiles = []
    if "removed" in results:
        tiles = [
            Tile("removed", results["removed"]),
            Tile("stay", str(len(results["survivors"]))),
            Tile("to train again", str(len(results["to_retrain"])), "trained with something of it"),
        ]
    if results.get("class_il_accuracy") is not None:
        interval = results.get("interval")
        found = f"95 % interval {between(interval)}" if interval else ""
        tiles = [
            Tile(ALL_CLASSES, f"{percent(results['class_il_accuracy'])} %", found),
            Tile(OWN_CLASSES, f"{percent(results['task_il_accuracy'])} %"),
            Tile(
                "before training",
                f"{percent(results['frozen_class_il_accuracy'])} %",
                f"frozen backbone, {ALL_CLASSES}",
            ),
        ]
    if "per_client" in results:
        measured = len(results["clients_evaluated"])
        tiles.append(Tile("clients", str(len(results["per_client"])), f"{measured} measured"))
        tiles.append(Tile("classes", str(len(results["classes"]))))
    phases = results["phases"].values()
    sent, received = (sum(p[f"bytes_{way}"] for p in phases) for way in ("sent", "received"))
    tiles.append(Tile("sent to clients", size(sent), f"received {size(received)}"))
    return [*tiles, Tile("duration", duration(results["seconds"]))]


def _alerts(results: Results) -> list[Alert]:
    alerts = []
    for key, what in (("left_out", "Left out"), ("missed", "Missed")):
        clients = results.get(key, [])
        for one in clients[:TOLD]:
            text = f"{what}: {one['client']} ({one['phase']}): {one['reason']}"
            alerts.append(Alert(text, grave=key == "left_out"))
        if more := clients[TOLD:]:
            alerts.append(Alert(f"{what}: {len(more)} more, see the table", grave=True))
    if outliers := results.get("diagnostics", {}).get("outliers"):
        text = "task vectors far longer or shorter than most, or against the others'."
        alerts.append(Alert(f"Outliers: {listed(outliers)}: {text}"))
    return [*alerts, *(Alert(note) for note in results["notes"])]


def _traffic(results: Results) -> Section:
    """Draw and list bytes, seconds and memory by phase; rounds of one phase together."""
    by_name = phases_of(results)
    ways = {w: [total(p, f"bytes_{w}") for p in by_name.values()] for w in ("sent", "received")}
    seconds = [total(parts, "seconds") for parts in by_name.values()]
    rows = []
    for at, (name, parts) in enumerate(by_name.items()):
        peaks = [phase["peak_memory_bytes"] for phase in parts.values()]
        memory = [
            max((peak.get(who, 0) for peak in peaks), default=0) for who in ("client", "server")
        ]
        figures = [f"{seconds[at]:.1f}", size(ways["sent"][at]), size(ways["received"][at])]
        rows.append([name, len(parts), *figures, *(size(peak) if peak else "–" for peak in memory)])
    titles = ("times", "seconds", "sent to clients", "received", "peak memory of a client")
    columns = named(*titles, "peak memory of the server", first="phase")
    in_mb = [(f"{w}", [count / 1e6 for count in counts]) for w, counts in ways.items()]
    panels = [("seconds", [("", seconds)]), ("MB", in_mb)]
    return Section(
        "Bytes and seconds",
        [
            Picture(
                "By phase",
                drawing.bars("By phase", list(by_name), panels),
                "Seconds on the clock; bytes that the server sent to all clients, and received.",
            ),
            Table("Phases", columns, rows),
        ]
        if rows
        else [],
    )


def _what_ran(results: Results) -> Section:
    """List settings, backbone, versions."""
    defaults = RunConfig().flat()
    settings = results["settings"]
    changed = [
        [key, str(value), str(defaults.get(key, "none"))]
        for key, value in settings.items()
        if key != "output" and value != defaults.get(key)
    ]
    backbone = [[key.replace("_", " "), str(v)] for key, v in results["backbone"].items()]
    versions = [*results["versions"].items(), *results["platform"].items()]
    pair = [Column("name"), Column("value")]
    names = [Column("setting"), Column("value"), Column("default")]
    return Section(
        "What ran",
        [
            *([Table("Settings that differ from the defaults", names, changed)] if changed else []),
            Table("Backbone", pair, backbone),
            Table("Versions", pair, versions),
            Table("All settings", pair, [[k, str(v)] for k, v in settings.items()], folded=True),
        ],
        [] if changed else ["Every setting has its default."],
    )
