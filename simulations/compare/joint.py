"""Joint training: all clients' images in one place, the upper bound that no federation may reach.

It exists in simulations alone. How it describes and measures everyone at once serves :mod:`merged`
too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.tangent import feature_map
from fedcompo.config.choices import Kind, Statistics
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData, Split, set_aside
from fedcompo.method.contribution import AnyStatistics
from fedcompo.method.deltas import Weights
from fedcompo.method.features import extract_features, fit_mixtures
from fedcompo.method.heads import Head, zero_head
from fedcompo.method.statistics import FeatureSums
from fedcompo.seeds import derive_seed, generator_for
from fedcompo.training.accuracy import accuracy_of
from fedcompo.training.fit import fit_task_vector, pace


def train_joint(
    backbone: Backbone,
    datas: Sequence[ClientData],
    config: RunConfig,
    kind: Kind,
    epochs: int | None = None,
) -> tuple[Weights, Head]:
    """Train one model on the images of all clients, by cross-entropy over all classes.

    Every image is seen as often as in the clients' own training, on average. The head starts at
    zero, and nothing holds the model to where it starts.

    Args:
        backbone: Pre-trained weights.
        datas: Everyone's images.
        config: How a client would train, and the seed.
        kind: How the change of the weights is parametrised.
        epochs: Passes over the images; None: as many as clients make.

    Returns:
        Target weights by name, each (out, in), and the head of all classes.
    """
    start = zero_head(sorted({c for data in datas for c in data.classes}), backbone.num_features)
    labels = [start.indices(data.classes)[data.train.labels] for data in datas]
    together = Split(torch.cat([data.train.images for data in datas]), torch.cat(labels))
    passes = epochs or passes_of(datas, config)
    fitted = fit_task_vector(
        backbone,
        kind,
        together,
        start,
        replace(config.train, local_epochs=passes, local_steps=0),
        generator=generator_for(config.seed, "train", "joint"),
    )
    theta_0 = backbone.theta_0
    changes = fitted.task_vector.dense(theta_0)
    return {name: theta_0[name] + change for name, change in changes.items()}, fitted.head


def passes_of(datas: Sequence[ClientData], config: RunConfig) -> int:
    """Return how many passes a client makes over its images, on average."""
    passes = []
    for data in datas:
        count = len(data.train.labels)
        batch, steps = pace(count, config.train, 1.0)
        passes.append(steps / math.ceil(count / batch))
    return round(fmean(passes))


def described(
    backbone: Backbone,
    theta: Weights,
    datas: Sequence[ClientData],
    config: RunConfig,
    *,
    purpose: str,
    linearised: bool = False,
) -> dict[str, AnyStatistics]:
    """Describe the features of every client, as each client does in a run.

    Args:
        backbone: Pre-trained weights.
        theta: Target weights under which features are taken, by name; those not named, pre-trained.
        datas: The clients' images.
        config: Sort of the statistics, and the seed.
        purpose: ``describe`` or ``realign``: in which phase of a run clients would do it. Images
            kept aside are not realigned on.
        linearised: Whether the weights are composed of tangents.

    Returns:
        Statistics by client.
    """
    forward = feature_map(backbone, theta, tangent=linearised)
    share = config.train.aside if purpose == "realign" else 0.0
    found: dict[str, AnyStatistics] = {}
    for data in datas:
        images, _ = set_aside(data.train, share=share, seed=config.seed, client=data.name)
        features = extract_features(forward, images.images)
        if config.head.statistics is Statistics.SUMS:
            found[data.name] = FeatureSums.of(features, images.labels, data.classes)
        else:
            found[data.name] = fit_mixtures(
                features,
                images.labels,
                data.classes,
                components=config.head.mixture_components,
                seed=derive_seed(config.seed, purpose, data.name),
            )
    return found


def measured(
    backbone: Backbone,
    theta: Weights,
    head: Head,
    datas: Sequence[ClientData],
    *,
    linearised: bool = False,
) -> dict[str, Any]:
    """Measure a model on every client's test images, under the keys of ``results.json``.

    Args:
        backbone: Pre-trained weights.
        theta: Target weights by name; those not named, pre-trained.
        head: Joint head.
        datas: The clients' images.
        linearised: Whether the weights are composed of tangents.

    Returns:
        Means over clients, and each client's figures in ``per_client``.
    """
    per_client = {}
    for data in datas:
        found = accuracy_of(backbone, theta, head, data.classes, data.test, linearised=linearised)
        per_client[data.name] = {
            "class_il_accuracy": found.class_il,
            "task_il_accuracy": found.task_il,
        }
    means = {
        key: fmean(figures[key] for figures in per_client.values())
        for key in ("class_il_accuracy", "task_il_accuracy")
    }
    return {**means, "per_client": per_client}
