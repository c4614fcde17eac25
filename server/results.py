"""The results of a run as one JSON value, under keys that stay."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict
from importlib.metadata import version
from statistics import fmean
from typing import Any

from fedcompo.deltas import Weights
from server.exchange import totals
from server.strategy import ItaStrategy

FORMAT_VERSION = 1
ACCURACIES = (
    "class_il_accuracy",
    "task_il_accuracy",
    "frozen_class_il_accuracy",
    "frozen_task_il_accuracy",
    "own_task_accuracy",
)
PACKAGES = ("fedcompo", "torch", "timm", "flwr", "numpy", "safetensors", "scikit-learn")


def collect(strategy: ItaStrategy, *, started: float) -> dict[str, Any]:
    """Gather every figure of a finished run.

    Args:
        strategy: After its ``run``.
        started: When the run began, in seconds since 1970.

    Returns:
        JSON values. Accuracies are fractions in [0, 1]; those of the run are means over clients.
    """
    config, exchange = strategy.config, strategy.exchange
    per_client = {client: _of_client(strategy, client) for client in strategy.pool.clients}
    return {
        "format_version": FORMAT_VERSION,
        "method": "ita",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 3),
        **{name: _mean(per_client, name) for name in ACCURACIES},
        "clients_evaluated": [
            client
            for client, figures in per_client.items()
            if figures["class_il_accuracy"] is not None
        ],
        "realigned_with": sorted(strategy.realigned) if strategy.head_is_realigned else [],
        "per_client": per_client,
        "left_out": [asdict(client) for client in exchange.left_out],
        "notes": exchange.notes,
        "phases": {
            phase: {
                "seconds": round(seconds, 3),
                **totals(exchange.traffic.get(phase, {}).values()),
                "peak_memory_bytes": exchange.memory[phase],
            }
            for phase, seconds in exchange.seconds.items()
        },
        "diagnostics": _diagnostics(strategy),
        "classes": list(strategy.joint_head.classes),
        "backbone": {
            "name": strategy.backbone.name,
            "architecture": strategy.backbone.architecture,
            "fingerprint": strategy.backbone.fingerprint,
            "parameters": sum(p.numel() for p in strategy.backbone.model.parameters()),
            "target_parameters": _count(strategy.backbone.theta_0),
        },
        "seed": config.seed,
        "settings": config.flat(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "platform": {"system": platform.platform(), "machine": platform.machine()},
    }


def _of_client(strategy: ItaStrategy, client: str) -> dict[str, Any]:
    described, reported = strategy.described[client], strategy.metrics[client]
    contribution = next(c for c in strategy.pool if c.client == client)
    index = strategy.diagnostics.clients.index(client)
    traffic = {
        phase: asdict(costs[client])
        for phase, costs in strategy.exchange.traffic.items()
        if client in costs
    }
    return {
        "classes": list(described.classes),
        "kind": str(contribution.task_vector.kind),
        "num_examples": described.num_examples,
        "num_test_examples": described.num_test_examples,
        "coefficient": strategy.coefficients[client],
        **{name: reported.get(name) for name in ACCURACIES},
        "losses": reported["losses"],
        "fisher": reported["fisher"],
        "tau_norm": float(strategy.diagnostics.norms[index]),
        "tau_parameters": _count(contribution.task_vector.tensors),
        "traffic": traffic,
        "lineage": asdict(contribution.lineage),
    }


def _diagnostics(strategy: ItaStrategy) -> dict[str, Any]:
    found = strategy.diagnostics
    return {
        "clients": list(found.clients),
        "fisher_gram": found.gram.tolist(),
        "tau_norms": found.norms.tolist(),
        "composition_gap": found.gap,
        "outliers": list(found.outliers),
    }


def _mean(per_client: dict[str, dict[str, Any]], name: str) -> float | None:
    """Mean over the clients that reported the figure; None where nobody did."""
    values = [figures[name] for figures in per_client.values() if figures[name] is not None]
    return fmean(values) if values else None


def _count(weights: Weights) -> int:
    return sum(tensor.numel() for tensor in weights.values())
