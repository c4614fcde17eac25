"""Collect the results of a run as one JSON value; the keys are a format that users rely on."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any

from torch import Tensor

from fedcompo.backbone.backbone import Backbone
from fedcompo.config.run import RunConfig
from fedcompo.runtime import version
from server import accounting
from server.averaging import Averaging
from server.exchange.books import totals
from server.exchange.exchange import Exchange
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
    """Collect every figure of a finished run.

    Args:
        strategy: After its ``run``.

    Returns:
        JSON values. Accuracies are fractions in [0, 1]; those of the run are means over clients.
    """
    config, exchange, composing = strategy.config, strategy.exchange, strategy.composing
    registry = strategy.registry
    per_client = {client: _of_client(strategy, client) for client in registry.clients}
    return {
        **_common(
            config,
            exchange,
            strategy.backbone,
            method=str(config.method.method),
        ),
        "schedule": str(config.method.schedule),
        **strategy.report(),
        **{name: _mean(per_client, name) for name in ACCURACIES},
        "clients_evaluated": _evaluated(per_client),
        "scale": strategy.choosing.report(),
        "realigned_with": list(registry.clients) if registry.realigned else [],
        "registry": {
            "path": str(registry.path),
            "root": registry.state.root,
            "joined": list(strategy.trained),
        },
        "per_client": per_client,
        "diagnostics": _diagnostics(composing),
        "classes": list(registry.classes),
    }


def collect_averaging(averaging: Averaging) -> dict[str, Any]:
    """Collect every figure of a finished run of FedAvg or FedProx.

    Keys are those of :func:`collect` where they mean the same. Without task vectors there are no
    diagnostics, no lineage and no registry.
    """
    config, exchange = averaging.config, averaging.exchange
    method = str(config.method.method)
    per_client = {client: _of_averaged(averaging, client) for client in averaging.trained}
    return {
        **_common(config, exchange, averaging.backbone, method=method),
        "rounds": averaging.history,
        **{name: _mean(per_client, name) for name in ACCURACIES},
        "clients_evaluated": _evaluated(per_client),
        "model": {"path": str(averaging.folder), "parameters_sent": averaging.num_parameters},
        "per_client": per_client,
        "classes": list(averaging.head.classes),
    }


def collect_removal(removal: Unlearning) -> dict[str, Any]:
    """Collect every figure of a finished removal, as JSON values."""
    config, exchange, backbone = removal.config, removal.exchange, removal.backbone
    return {
        **_common(config, exchange, backbone, method="removal"),
        **removal.results(),
    }


def _common(
    config: RunConfig, exchange: Exchange, backbone: Backbone, *, method: str
) -> dict[str, Any]:
    """Results that every kind of run has."""
    books = exchange.books
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
    reported = fitting.figures.get(client, {}) | composing.figures.get(client, {})
    contribution = strategy.registry.contribution(client)
    index = composing.diagnostics.clients.index(client)
    return {
        "classes": list(contribution.head.classes),
        "kind": str(contribution.task_vector.kind),
        "num_examples": contribution.num_examples,
        "num_test_examples": described.num_test_examples if described else None,
        "coefficient": composing.coefficients[client],
        **{name: reported.get(name) for name in ACCURACIES},
        "losses": reported.get("losses", []),
        "distance": reported.get("distance"),
        "held": reported.get("held"),
        "fisher": reported.get("fisher", {}),
        **_caps(strategy.exchange, client, strategy.config),
        "tau_norm": float(composing.diagnostics.norms[index]),
        "tau_parameters": _count(contribution.task_vector.tensors),
        "traffic": _traffic(strategy.exchange, client),
        "lineage": asdict(contribution.lineage),
    }


def _of_averaged(averaging: Averaging, client: str) -> dict[str, Any]:
    described = averaging.roster.participants.described
    reported = averaging.figures[client]
    together = sum(described[name].num_examples for name in averaging.trained)
    return {
        "classes": list(described[client].classes),
        "kind": str(averaging.kind),
        "num_examples": described[client].num_examples,
        "num_test_examples": described[client].num_test_examples,
        "coefficient": described[client].num_examples / together,
        **{name: reported.get(name) for name in ACCURACIES},
        "losses": reported["losses"],
        **_caps(averaging.exchange, client, averaging.config),
        "traffic": _traffic(averaging.exchange, client),
    }


def _caps(exchange: Exchange, client: str, config: RunConfig) -> dict[str, Any]:
    """A client's report of its caps, and the ε of its noise."""
    caps = exchange.books.caps.get(client, [])
    return {"caps": caps, "privacy": accounting.spent(caps, delta=config.caps.dp_delta)}


def _traffic(exchange: Exchange, client: str) -> dict[str, Any]:
    """The cost of each phase for one client."""
    costs = {phase: costs.get(client) for phase, costs in exchange.books.traffic.items()}
    return {phase: asdict(cost) for phase, cost in costs.items() if cost is not None}


def _evaluated(per_client: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Clients that measured the final model."""
    return [c for c, figures in per_client.items() if figures["class_il_accuracy"] is not None]


def _diagnostics(composing: Composing) -> dict[str, Any]:
    diagnostics = composing.diagnostics
    return {
        "clients": list(diagnostics.clients),
        "fisher_gram": diagnostics.gram.tolist() if diagnostics.gram is not None else None,
        "tau_norms": diagnostics.norms.tolist(),
        "composition_gap": diagnostics.gap,
        "outliers": list(diagnostics.outliers),
    }


def _mean(per_client: dict[str, dict[str, Any]], name: str) -> float | None:
    """Mean over the clients that reported the figure; None if there are none."""
    values = [figures[name] for figures in per_client.values() if figures[name] is not None]
    return fmean(values) if values else None


def _count(weights: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in weights.values())
