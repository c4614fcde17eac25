"""Collect the results of a run as one JSON value; the keys are a format that users rely on."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from torch import Tensor

from fedcompo.data.tasks import shard_of
from fedcompo.messages.answers import EvaluateAnswer
from fedcompo.report.confusion import by_class, interval, interval_of_mean
from fedcompo.runtime import version
from server import accounting
from server.averaging import Averaging
from server.exchange.books import totals
from server.phases.composing import Composing
from server.strategy import Strategy
from server.unlearning import Unlearning

FORMAT_VERSION = 1
ACCURACIES = (
    "class_il_accuracy",
    "task_il_accuracy",
    "frozen_class_il_accuracy",
    "frozen_task_il_accuracy",
    "own_task_accuracy",
    "own_heads_accuracy",
)
PACKAGES = ("fedcompo", "torch", "timm", "flwr", "numpy", "safetensors", "scikit-learn")


def collect(strategy: Strategy) -> dict[str, Any]:
    """Collect every figure of a finished run, as JSON values.

    Accuracies are fractions in [0, 1]; those of the run are means over clients.
    """
    registry = strategy.registry
    per_client = {client: _of_client(strategy, client) for client in registry.clients}
    return {
        **_common(strategy, method=str(strategy.config.method.method)),
        "schedule": str(strategy.config.method.schedule),
        **strategy.report(),
        **_over_clients(per_client, strategy.composing.answers, registry.classes),
        "scale": strategy.choosing.report(),
        "realigned_with": list(registry.clients) if registry.realigned else [],
        "registry": {
            "path": str(registry.path),
            "root": registry.state.root,
            "joined": list(strategy.trained),
        },
        "diagnostics": _diagnostics(strategy.composing),
        "classes": list(registry.classes),
    }


def collect_averaging(averaging: Averaging) -> dict[str, Any]:
    """Collect every figure of a finished run of FedAvg or FedProx.

    Keys are those of :func:`collect` where they mean the same. Without task vectors there are no
    diagnostics, no lineage and no registry.
    """
    per_client = {client: _of_averaged(averaging, client) for client in averaging.trained}
    return {
        **_common(averaging, method=str(averaging.config.method.method)),
        "rounds": averaging.history,
        **_over_clients(per_client, averaging.answers, averaging.head.classes),
        "model": {"path": str(averaging.folder), "parameters_sent": averaging.num_parameters},
        "classes": list(averaging.head.classes),
    }


def collect_removal(removal: Unlearning) -> dict[str, Any]:
    """Collect every figure of a finished removal, as JSON values."""
    return {**_common(removal, method="removal"), **removal.results()}


def _common(run: Strategy | Averaging | Unlearning, *, method: str) -> dict[str, Any]:
    """Results that every kind of run has."""
    config, backbone, books = run.config, run.backbone, run.exchange.books
    return {
        "format_version": FORMAT_VERSION,
        "method": method,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(books.started)),
        "seconds": round(time.time() - books.started, 3),
        "left_out": [asdict(client) for client in books.left_out],
        "missed": [asdict(client) for client in books.missed],
        "notes": [*books.notes, *accounting.notes(books.caps, delta=config.caps.dp_delta)],
        "phases": {
            phase: {
                "seconds": round(seconds, 3),
                **totals(books.traffic.get(phase, {}).values()),
                "peak_memory_bytes": books.memory[phase],
            }
            for phase, seconds in books.seconds.items()
        },
        "backbone": {
            "name": backbone.name,
            "architecture": backbone.architecture,
            "fingerprint": backbone.fingerprint,
            "parameters": sum(p.numel() for p in backbone.model.parameters()),
            "target_parameters": _count(backbone.theta_0),
        },
        "seed": config.seed,
        "settings": config.flat(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "platform": {"system": platform.platform(), "machine": platform.machine()},
    }


def _of_client(strategy: Strategy, client: str) -> dict[str, Any]:
    fitting, composing = strategy.fitting, strategy.composing
    described = strategy.roster.participants.described.get(client)
    answer = composing.answers.get(client)
    tested = answer.num_examples if answer and answer.num_examples else None
    if not tested and described and shard_of(client) is None:
        tested = described.num_test_examples  # of shards, that of the one that measured
    reported = fitting.figures.get(client, {}) | composing.figures.get(client, {})
    contribution = strategy.registry.contribution(client)
    index = composing.diagnostics.clients.index(client)
    return {
        "classes": list(contribution.head.classes),
        "kind": str(contribution.task_vector.kind),
        "num_examples": contribution.num_examples,
        "num_test_examples": tested,
        "coefficient": composing.coefficients[client],
        **_reported(strategy, client, reported, tested),
        "distance": reported.get("distance"),
        "held": reported.get("held"),
        "fisher": reported.get("fisher", {}),
        "tau_norm": float(composing.diagnostics.norms[index]),
        "tau_parameters": _count(contribution.task_vector.tensors),
        "lineage": dict(vars(contribution.lineage)),
    }


def _of_averaged(averaging: Averaging, client: str) -> dict[str, Any]:
    described = averaging.roster.participants.described
    tested = described[client].num_test_examples
    together = sum(averaging.weights[name] for name in averaging.trained)
    return {
        "classes": list(described[client].classes),
        "kind": str(averaging.kind),
        "num_examples": described[client].num_examples,
        "num_test_examples": tested,
        "coefficient": averaging.weights[client] / together,
        **_reported(averaging, client, averaging.figures[client], tested),
    }


def _reported(
    run: Strategy | Averaging, client: str, figures: Mapping[str, Any], tested: int | None
) -> dict[str, Any]:
    """A client's figures, caps, ε of its noise, and the cost of each phase for it."""
    books, delta = run.exchange.books, run.config.caps.dp_delta
    caps = books.caps.get(client, [])
    return {
        **{name: figures.get(name) for name in ACCURACIES},
        "interval": interval(figures.get("class_il_accuracy"), tested),
        "losses": figures.get("losses", []),
        "caps": caps,
        "privacy": accounting.spent(caps, delta=delta),
        "traffic": {
            phase: asdict(costs[client])
            for phase, costs in books.traffic.items()
            if client in costs
        },
    }


def _over_clients(
    per_client: Mapping[str, Mapping[str, Any]],
    answers: Mapping[str, EvaluateAnswer],
    classes: Sequence[str],
) -> dict[str, Any]:
    """The clients' figures, their means over those that reported them, and figures by class."""
    reported = {
        name: [figures[name] for figures in per_client.values() if figures[name] is not None]
        for name in ACCURACIES
    }
    measured = {c: f for c, f in per_client.items() if f["class_il_accuracy"] is not None}
    pairs = [(f["class_il_accuracy"], f["interval"]) for f in measured.values()]
    tallies = {c: a.tally for c, a in answers.items() if a.tally and c in per_client}
    return {
        **{name: fmean(values) if values else None for name, values in reported.items()},
        "interval": interval_of_mean(pairs) if all(own for _, own in pairs) else None,
        "clients_evaluated": list(measured),
        "per_client": per_client,
        **by_class(tallies, classes),
    }


def _diagnostics(composing: Composing) -> dict[str, Any]:
    diagnostics = composing.diagnostics
    return {
        "clients": list(diagnostics.clients),
        "fisher_gram": diagnostics.gram.tolist() if diagnostics.gram is not None else None,
        "tau_norms": diagnostics.norms.tolist(),
        "composition_gap": diagnostics.gap,
        "outliers": list(diagnostics.outliers),
    }


def _count(weights: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in weights.values())
