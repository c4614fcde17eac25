"""What is pinned of a registry and of the command line; knows neither modules nor files of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def facts_of(registry: Any) -> dict[str, Any]:
    """All that a registry says, as JSON values; of the weights, digests.

    The classifier alone is not on the grid: it is fitted with the machine's own arithmetic.
    """
    composed, classifier = dict(registry.composed()), registry.backbone.classifier
    rows = [composed.pop(f"{classifier}.{part}").tolist() for part in ("weight", "bias")]
    some = registry.model(only=[registry.clients[0], registry.clients[-1]]).state_dict()
    facts = {
        "root": registry.state.root,
        "clients": registry.clients,
        "classes": registry.classes,
        "realigned": registry.realigned,
        "linearised": registry.linearised,
        "kept": sorted(registry.state.kept),
        "backbone": digest(registry.backbone.tensors),
        "running sum": digest(registry.running_sum()),
        "composed": digest(composed),
        "composed of the first and the last": digest(
            {name: some[name] for name in sorted(some) if f"{classifier}." not in name}
        ),
        "classifier": rows,
        "members": {client: _member(registry, client) for client in registry.clients},
    }
    return json.loads(json.dumps(facts))


def _member(registry: Any, client: str) -> dict[str, Any]:
    contribution = registry.contribution(client, with_fisher=True)
    fisher, head = contribution.fisher, contribution.head
    mixtures = {
        f"{name}/{part}": getattr(mixture, part)
        for name, mixture in contribution.statistics.items()
        for part in ("weights", "means", "variances")
    }
    return {
        **registry.member(client).values,
        "base": contribution.task_vector.base,
        "task vector": digest(contribution.task_vector.tensors),
        "head": digest({"weight": head.weight, "bias": head.bias}),
        "mixtures": digest(mixtures),
        "mixtures' examples": {n: m.num_examples for n, m in contribution.statistics.items()},
        "fisher": fisher and [digest(fisher.sums), fisher.num_examples],
        "settings": hashlib.sha256(json.dumps(contribution.settings).encode()).hexdigest(),
    }


def commands_of(command: Any) -> dict[str, Any]:
    """Commands of a click group by name, each with its arguments and options; "" is the group."""
    everyone = {"": command, **command.commands}
    return {
        name: {_spelling(parameter): _parameter(parameter) for parameter in one.params}
        for name, one in sorted(everyone.items())
    }


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.name)
    return ", ".join([*parameter.opts, *parameter.secondary_opts])


def _parameter(parameter: Any) -> dict[str, Any]:
    default = parameter.default
    plain = isinstance(default, str | int | float)  # "nothing" differs between click's versions
    choices = getattr(parameter.type, "choices", ())
    return {
        "default": default if plain else None,
        "required": parameter.required,
        "many": parameter.multiple or parameter.nargs == -1,
        "type": parameter.type.name,
        "choices": [str(getattr(choice, "value", choice)) for choice in choices],
    }


TAKEN_ELSEWHERE = {
    "created", "seconds", "phases", "traffic", "versions", "platform", "output", "path", "root",
    "by_class", "worst_classes", "confusion", "calibration", "interval",
}  # fmt: skip
"""What ``results.json`` says of the time, the machine, the folder, the bits of the floats, and of
single images, of which another processor may classify one differently."""


def figures_of(results: Any) -> Any:
    """The figures of a run's results that do not depend on where and when it ran."""
    if isinstance(results, dict):
        return {k: figures_of(v) for k, v in results.items() if k not in TAKEN_ELSEWHERE}
    return results


def nearly(figures: Any, name: str = "") -> Any:
    """The same figures with their floats to be compared as another processor rounds them.

    A processor without AVX-512 gave all accuracies and settings as one with it, losses and norms
    within 1.1e-5, errors by a smaller form of the Fisher within 1.1e-4, overlaps of Fishers within
    2.7e-4. An accuracy may differ by one image of 88.
    """
    if isinstance(figures, dict):
        return {key: nearly(value, key) for key, value in figures.items()}
    if isinstance(figures, list):
        return [nearly(value, name) for value in figures]
    if isinstance(figures, float):
        return pytest.approx(figures, rel=1e-3, abs=0.012 if name.endswith("accuracy") else 1e-9)
    return figures
