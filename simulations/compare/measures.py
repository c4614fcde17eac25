"""Measure one method with one kind and seed, from the run's results and its registry."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from bench import Bench
from joint import measured as joint_measured
from joint import train_joint
from merged import FROZEN, evaluate_merges
from merging import MERGES
from methods import METHODS

from fedcompo.composition.head import head_of
from fedcompo.config.choices import kinds_of
from fedcompo.errors import ContributionError
from fedcompo.method.contribution import counts_of
from fedcompo.method.heads import Head

MEASURED = "measured"
CHANGED = ("ita", "no-penalty", "iel", "iel-no-penalty", "tmc")
"""Methods whose models are also specialised, and from which clients are removed."""
COMPOSED = (*CHANGED, "softmax", "dense", "paper")
"""Methods whose composed model is also measured under other joint heads."""


def measured(folder: Path, method: str, results: dict, *, changes: bool) -> dict[str, Any]:
    """Measure a method, or return the figures that were measured before.

    Measuring happens in a process of its own, so that several can at a time.

    Args:
        folder: Of the run.
        method: Its name, or that of a method derived from it.
        results: What the run reported.
        changes: Also specialise, remove and compare task vectors where that says something.
    """
    parts = _parts(method, changes=changes)
    files = {part: folder / f"{MEASURED}-{method}-{part}.json" for part in parts}
    if missing := [part for part, file in files.items() if not file.exists()]:
        command = [sys.executable, __file__, str(folder), method, *missing]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            asked = ", ".join(missing)
            print(f"{folder}, {method}, {asked} failed:\n{done.stderr[-3000:]}", file=sys.stderr)
            return {}
    figures = _reported(results)
    for file in files.values():
        figures |= json.loads(file.read_text())
    return figures


def _parts(method: str, *, changes: bool) -> list[str]:
    """Measure what a method's run does not report itself."""
    if METHODS[method].of:
        return ["derived"]
    heads = ["heads"] if method in COMPOSED else []
    return [*heads, "changes"] if changes and method in CHANGED else heads


def _reported(results: dict) -> dict[str, Any]:
    """Return the figures that the run itself reports."""
    clients = max(1, len(results["per_client"]))
    phases = results["phases"].values()
    diagnostics = results.get("diagnostics") or {}
    norms = diagnostics.get("tau_norms")
    arrivals = results.get("arrivals", {}).get("class_il_accuracy")
    return {
        "class_il": results["class_il_accuracy"],
        "task_il": results["task_il_accuracy"],
        "own_task": results.get("own_task_accuracy"),
        "up": sum(phase["bytes_received"] for phase in phases) / clients,
        "down": sum(phase["bytes_sent"] for phase in phases) / clients,
        "seconds": results["seconds"],
        "gap": diagnostics.get("composition_gap"),
        "norm": fmean(norms) if norms else None,
        "arrivals": arrivals,
        "scale": (results.get("scale") or {}).get("scale"),
    }


def first_central_last(clients: tuple[str, ...]) -> tuple[str, ...]:
    """Return the first, central and last client, without repetition."""
    return tuple(dict.fromkeys([clients[0], clients[len(clients) // 2], clients[-1]]))


def specialised_and_removed(bench: Bench) -> dict[str, dict[str, float]]:
    """Measure specialising to the first, central and last client, and removing them."""
    clients = bench.registry.clients
    theta_p = bench.composed(bench.pool)
    kept = bench.head(theta_p, clients)
    before = bench.accuracies(theta_p, kept, clients)
    found: dict[str, list[dict[str, float]]] = {"specialised": [], "removal": []}
    for target in first_central_last(clients):
        others = tuple(client for client in clients if client != target)
        alone = bench.composed(bench.pool.only(target))
        special = bench.accuracies(alone, bench.head(alone, clients), clients)
        without = bench.composed(bench.pool.without(target))
        after = bench.accuracies(without, bench.head(without, others), others)
        found["specialised"].append(
            {
                "target": special[target][0],
                "control": fmean(special[client][0] for client in others),
            }
        )
        found["removal"].append(
            {
                "target_before": before[target][1],
                "target": bench.accuracies(without, kept, [target])[target][1],
                "control_before": _among(bench, theta_p, others),
                "control": fmean(after[client][0] for client in others),
            }
        )
    return {
        change: {name: fmean(one[name] for one in all_) for name in all_[0]}
        for change, all_ in found.items()
    }


def _among(bench: Bench, theta: dict, clients: tuple[str, ...]) -> float:
    """Mean class-IL accuracy of some clients, among their classes alone."""
    head = bench.head(theta, clients)
    return fmean(class_il for class_il, _ in bench.accuracies(theta, head, clients).values())


def under_other_heads(bench: Bench) -> dict[str, dict[str, float]]:
    """Class-IL accuracy of the composed weights with joint heads not fitted to their features.

    *trained*: the clients' own heads side by side, as they left training; *frozen*: the head made
    of θ₀'s features.
    """
    clients, theta_p = bench.registry.clients, bench.composed(bench.pool)
    frozen = head_of(bench.pool, bench.registry.settings)
    own = [(member.head, counts_of(member.statistics)) for member in bench.pool]
    heads = {"trained": side_by_side(own, frozen.classes), "frozen": frozen}
    found = {name: bench.accuracies(theta_p, head, clients) for name, head in heads.items()}
    return {
        "heads": {
            name: fmean(class_il for class_il, _ in all_.values()) for name, all_ in found.items()
        }
    }


def side_by_side(heads: Iterable[tuple[Head, Mapping[str, int]]], classes: Iterable[str]) -> Head:
    """Join the heads of clients into one.

    Args:
        heads: Head of each client and its examples by class; clients that share a class have their
            rows averaged, weighted by their examples of it.
        classes: Names of all classes, in the order of the joint head.

    Returns:
        The joint head.
    """
    heads, classes = list(heads), tuple(classes)
    weights, biases = [], []
    for name in classes:
        owners = [(h.rows([name]), examples[name]) for h, examples in heads if name in h.classes]
        if not owners:
            raise ContributionError(f"No head has the class {name!r}.")
        total = sum(count for _, count in owners)
        weights.append(sum(head.weight[0].double() * (count / total) for head, count in owners))
        biases.append(sum(head.bias[0].double() * (count / total) for head, count in owners))
    return Head(classes, torch.stack(weights).float(), torch.stack(biases).float())  # type: ignore[arg-type]


def mean_cosine(bench: Bench) -> float | None:
    """Mean cosine of two clients' task vectors, one weight at a time."""
    count = len(bench.pool)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for name, weight in bench.backbone.theta_0.items():
        tau = torch.stack([c.task_vector.delta(name, weight).flatten() for c in bench.pool])
        gram += (tau @ tau.T).double()
    length = gram.diagonal().sqrt()
    cosines = gram / (length.unsqueeze(0) * length.unsqueeze(1))
    pairs = [float(cosines[a, b]) for a, b in combinations(range(count), 2)]
    return fmean(pairs) if pairs else None


def derive(bench: Bench, method: str) -> dict[str, Any]:
    """Figures of a method that is derived from the task vectors, or the data, of a run."""
    if method == "joint":
        datas, kind = list(bench.data.values()), kinds_of(bench.config.train.kind)[0]
        theta, head = train_joint(bench.backbone, datas, bench.config, kind)
        return {**_means(joint_measured(bench.backbone, theta, head, datas)), **NO_COST, **UNKNOWN}
    wanted = {method: MERGES[method]} if method in MERGES else {}
    found = evaluate_merges(bench.registry, wanted)[method]
    if "reason" in found:
        sys.exit(found["reason"])
    cost = _statistics_alone(bench) if method == FROZEN else {}
    return {**_means(found), **UNKNOWN, **cost}


UNKNOWN = {"own_task": None, "gap": None, "norm": None, "arrivals": None, "seconds": None}
NO_COST = {"up": None, "down": None}


def _means(found: dict[str, Any]) -> dict[str, float]:
    return {"class_il": found["class_il_accuracy"], "task_il": found["task_il_accuracy"]}


def _statistics_alone(bench: Bench) -> dict[str, Any]:
    """Cost of a frozen backbone: the first phase, with a Fisher that it could do without."""
    results = json.loads((bench.path.parent / "results.json").read_text())
    phase, clients = results["phases"]["describe"], len(bench.registry.clients)
    return {"up": phase["bytes_received"] / clients, "down": phase["bytes_sent"] / clients}


def main() -> None:
    """Measure parts of one method of one run, and write the figures beside it."""
    folder, method, *parts = sys.argv[1:]
    bench = Bench(Path(folder) / "registry")
    measure = {
        "heads": lambda: under_other_heads(bench),
        "changes": lambda: {**specialised_and_removed(bench), "cosine": mean_cosine(bench)},
        "derived": lambda: derive(bench, method),
    }
    for part in parts:
        file = Path(folder) / f"{MEASURED}-{method}-{part}.json"
        file.write_text(json.dumps(measure[part](), indent=1))


if __name__ == "__main__":
    main()
