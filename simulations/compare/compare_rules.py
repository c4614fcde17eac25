"""Compare rules of composition on the same task vectors: those of finished runs.

    python simulations/compare/compare_rules.py runs/compare-cifar/ita-lora-seed* --json rules.json
    python simulations/compare/compare_rules.py runs/digits --rule mean --rule ties:density=0.5

Each run is a draw (a seed) of one scenario. A rule's total is taken once and added to θ₀ with
several λ. For each, the joint head is aligned again, as in a run, and measured on the clients' test
images, and on the images that they keep aside. λ is chosen on the latter, by the score that clients
vote by; *best* is the largest on test images, an oracle's choice that nobody could make. Seconds
are of the CPU, for the total alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from bench import Bench
from comparison_tables import spread
from torch import Tensor

from fedcompo.composition import fixed_point
from fedcompo.composition.lengths import squared_length
from fedcompo.composition.models import times_of
from fedcompo.composition.rules import Changes, Rule, parse_rule
from fedcompo.composition.rules.parsing import RULES
from fedcompo.composition.scale import norm_preserving
from fedcompo.composition.voting import Votes, elected
from fedcompo.export.model_card import table as markdown_table
from fedcompo.method.deltas import Weights
from fedcompo.method.features import extract_features

SAME_TOTAL = ("norm-preserving", "task-arithmetic")
"""The mean, at a λ that is in its row."""


def main() -> None:
    """Parse the command line, measure, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--rule", action="append", help="repeat for several; default: all")
    parser.add_argument("--json", type=Path, help="file of all figures; what is there is kept")
    given = parser.parse_args()
    texts = given.rule or [name for name in RULES if name not in SAME_TOTAL]
    known: dict[str, dict[str, Any]] = {}
    if given.json and given.json.exists():
        known = json.loads(given.json.read_text())
    for run in given.runs:
        figures, bench = known.setdefault(run.name, {}), Bench(run / "registry")
        for text in texts:
            if text not in figures:
                figures[text] = measured(bench, parse_rule(text))
                print(run.name, text, figures[text], file=sys.stderr)
            if given.json:
                given.json.write_text(json.dumps(known, indent=1) + "\n")
        if "frozen" not in figures:
            members = bench.registry.clients
            found = bench.accuracies({}, bench.frozen_head(members), members)
            figures["frozen"] = fmean(class_il for class_il, _ in found.values())
    print(table([known[run.name] for run in given.runs], texts))


def measured(bench: Bench, rule: Rule) -> dict[str, Any]:
    """Figures of one rule on one run: each λ's accuracy, and what the total costs."""
    pool, settings = bench.registry.pool(with_fisher=True), bench.registry.settings
    times = times_of(pool, settings)
    rule.check(pool.contributions, times)
    began = time.process_time()
    total, squared, lengths = {}, 0.0, dict.fromkeys(times, 0.0)
    for name, weight in sorted(bench.backbone.theta_0.items()):
        squares: dict[str, float] = {}
        changes = Changes(name, weight, pool.contributions, times, squares=squares)
        total[name] = rule.on_grid(changes)
        squared += squared_length(total[name])
        lengths = {client: lengths[client] + squares[client] for client in times}
    seconds = time.process_time() - began
    together = sum(times.values())
    kept = together * norm_preserving({c: (times[c], lengths[c]) for c in times}, squared)
    tried = {}
    for column, scale in (*columns(len(pool)), ("length", kept)):
        theta = dict(composed(bench, total, scale / together))
        tried[column] = {"scale": scale, **accuracy(bench, theta)}
    chosen = list(tried.values())[elected([one["loss"] for one in tried.values()])]
    return {
        "removal": rule.removal,
        "seconds": seconds,
        "tried": tried,
        "chosen": chosen["class_il"],
        "best": max(one["class_il"] for one in tried.values()),
    }


def columns(members: int) -> tuple[tuple[str, float], ...]:
    """Names and values of the λ that are tried: the mean's, its root of T times, the sum's."""
    return ("1", 1.0), ("√T", math.sqrt(members)), ("T", float(members))


def composed(bench: Bench, total: Weights, factor: float) -> Iterator[tuple[str, Tensor]]:
    r"""Yield the weights :math:`\theta_0 + \lambda' \cdot \mathrm{total}`, each (out, in)."""
    for name, weight in bench.backbone.theta_0.items():
        yield name, fixed_point.compose(weight, total[name], factor=factor)


def accuracy(bench: Bench, theta: Weights) -> dict[str, float]:
    """Class-IL on test images, and the clients' votes, under the head of these weights."""
    members = bench.registry.clients
    head = bench.head(theta, members)
    found = bench.accuracies(theta, head, members)
    votes = Votes.none(1)
    for name in members:
        client = bench.clients[name]
        aside = client.split[1]
        features = extract_features(bench.backbone.forward(theta), aside.images)
        labels = head.indices(client.data.classes)[aside.labels]
        votes += Votes.of([head(features)], labels)
    loss = votes.losses[0] / max(1, votes.num_examples)
    return {"class_il": fmean(class_il for class_il, _ in found.values()), "loss": loss}


def table(seeds: list[dict[str, Any]], texts: list[str]) -> str:
    """Format the figures of all runs as one table, in Markdown."""
    names = [*(name for name, _ in columns(1)), "length"]
    lines = [["rule", *(f"λ = {name}" for name in names[:-1]), "as long as a member", "its λ"]]
    lines[0] += ["chosen aside", "best", "seconds", "removal"]
    for text in texts:
        rows = [seed[text] for seed in seeds if text in seed]
        cells = [spread([row["tried"][name]["class_il"] for row in rows]) for name in names]
        cells += [spread([row["tried"]["length"]["scale"] for row in rows], factor=1)]
        cells += [spread([row[key] for row in rows]) for key in ("chosen", "best")]
        cells += [spread([fmean(row["seconds"] for row in rows)], factor=1)]
        lines.append([text, *cells, rows[0]["removal"]])
    frozen, text = (
        spread([seed["frozen"] for seed in seeds]),
        markdown_table(lines[0], lines[1:], numbers=True),
    )
    return f"Frozen: {frozen}; {len(seeds)} run(s).\n\n{text}"


if __name__ == "__main__":
    with torch.inference_mode():
        main()
