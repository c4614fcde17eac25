"""Measure one method with one kind and seed, from the run's results and its registry."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from average_factors import average_factors
from bench import Accuracies, Bench
from joint import train_joint
from methods import METHODS

from fedcompo.config.choices import kinds_of
from fedcompo.export.selection import from_registry
from fedcompo.method.deltas import Weights

RULES = {"ties": "ties", "fisher_weighted": "fisher"}
"""Methods that are rules of composition, at λ = 1."""
CHANGED = ("ita", "no-penalty", "iel", "iel-no-penalty", "tmc")
"""Methods whose models are also specialised, and from which clients are removed."""


def measured(folder: Path, method: str, results: dict, *, changes: bool) -> dict[str, Any]:
    """Figures of a method: what its run reported, and what was or is measured here.

    The method is the one that was run in the folder, or derived from it. Changes: also specialise
    and remove, where that says something.
    """
    derived, figures = bool(METHODS[method].of), _reported(results)
    if not derived and not (changes and method in CHANGED):
        return figures
    file = folder / f"measured-{method}.json"
    if not file.exists():
        bench = Bench(folder / "registry")
        found = derive(bench, method) if derived else specialised_and_removed(bench)
        file.write_text(json.dumps(found, indent=1))
    return figures | json.loads(file.read_text())


def _reported(results: dict) -> dict[str, Any]:
    """Return the figures that the run itself reports."""
    clients = max(1, len(results["per_client"]))
    phases = results["phases"].values()
    diagnostics = results.get("diagnostics") or {}
    return {
        "class_il": results["class_il_accuracy"],
        "task_il": results["task_il_accuracy"],
        "own_task": results.get("own_task_accuracy"),
        "own_heads": results.get("own_heads_accuracy"),
        "up": sum(phase["bytes_received"] for phase in phases) / clients,
        "down": sum(phase["bytes_sent"] for phase in phases) / clients,
        "seconds": results["seconds"],
        "gap": diagnostics.get("composition_gap"),
        "scale": (results.get("scale") or {}).get("scale"),
    }


def specialised_and_removed(bench: Bench) -> dict[str, dict[str, float]]:
    """Measure specialising to the first, central and last client, and removing them."""
    clients = bench.registry.clients
    theta_p = bench.registry.theta_p()
    kept = bench.head(theta_p, clients)
    found: dict[str, list[dict[str, float]]] = {"specialised": [], "removal": []}
    for target in dict.fromkeys([clients[0], clients[len(clients) // 2], clients[-1]]):
        others = tuple(client for client in clients if client != target)
        alone, without = bench.composed(target), bench.composed(*others)
        special = bench.accuracies(alone, bench.head(alone, clients), clients)
        found["specialised"].append(
            {
                "target": special[target][0],
                "control": fmean(special[client][0] for client in others),
            }
        )
        found["removal"].append(
            {
                "target": bench.accuracies(without, kept, [target])[target][1],
                "control_before": _class_il(bench, theta_p, others),
                "control": _class_il(bench, without, others),
            }
        )
    return {
        change: {name: fmean(one[name] for one in all_) for name in all_[0]}
        for change, all_ in found.items()
    }


def _class_il(bench: Bench, theta: Weights, clients: tuple[str, ...]) -> float:
    """Mean class-IL accuracy of some clients, among their classes alone."""
    head = bench.head(theta, clients)
    return fmean(class_il for class_il, _ in bench.accuracies(theta, head, clients).values())


def derive(bench: Bench, method: str) -> dict[str, Any]:
    """Figures of a method that is derived from the task vectors, or the data, of a run."""
    clients, theta_0 = bench.registry.clients, bench.backbone.theta_0
    if method == "joint":
        datas = [client.data for client in bench.clients.values()]
        kind = kinds_of(bench.config.train.kind)[0]
        theta, head = train_joint(bench.backbone, datas, bench.config, kind)
        return {**_means(bench.accuracies(theta, head, clients)), **UNKNOWN, **NO_COST}
    if method == "frozen":
        found = bench.accuracies({}, bench.frozen_head(clients), clients)
        return {**_means(found), **UNKNOWN, **_statistics_alone(bench)}
    if method in RULES:
        theta = dict(from_registry(bench.registry, rule=RULES[method], scale=1.0).stream())
    else:
        theta = average_factors(bench.pool, theta_0)
    return {**_means(bench.accuracies(theta, bench.head(theta, clients), clients)), **UNKNOWN}


UNKNOWN = dict.fromkeys(("own_task", "own_heads", "gap", "seconds"))
NO_COST = {"up": None, "down": None}


def _means(found: Accuracies) -> dict[str, float]:
    class_il, task_il = (fmean(figures) for figures in zip(*found.values(), strict=True))
    return {"class_il": class_il, "task_il": task_il}


def _statistics_alone(bench: Bench) -> dict[str, Any]:
    """Cost of a frozen backbone: the first phase, with a Fisher that it could do without."""
    results = json.loads((bench.path.parent / "results.json").read_text())
    phase, clients = results["phases"]["describe"], len(bench.registry.clients)
    return {"up": phase["bytes_received"] / clients, "down": phase["bytes_sent"] / clients}
