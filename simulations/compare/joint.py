"""Joint training: all clients' images in one place, the upper bound that no federation may reach.

It exists in simulations alone. How it describes and measures everyone at once serves :mod:`merged`
too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.tangent import feature_map
from fedcompo.composition.head import joint_head
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Kind
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData, Split
from fedcompo.method.deltas import Weights
from fedcompo.method.features import Mixtures, extract_features, fit_mixtures
from fedcompo.method.heads import Head
from fedcompo.seeds import derive_seed, generator_for
from fedcompo.training.accuracy import accuracy_of
from fedcompo.training.fit import fit_task_vector


def train_joint(
    backbone: Backbone,
    datas: Sequence[ClientData],
    config: RunConfig,
    kind: Kind,
    epochs: int | None = None,
) -> tuple[Weights, Head]:
    """Train one model on the images of all clients, by cross-entropy over all classes.

    Every image is seen as often as in the clients' own training. Nothing holds the model to where
    it starts: the pre-trained weights and the joint head, aligned as clients' heads are.

    Args:
        backbone: Pre-trained weights.
        datas: Everyone's images.
        config: How a client would train, and the seed.
        kind: How the change of the weights is parametrised.
        epochs: Passes over the images; None: ``local-epochs``.

    Returns:
        Target weights by name, each (out, in), and the head of all classes.
    """
    start = joint_head(
        described(backbone, {}, datas, config, purpose="features"),
        CompositionSettings.of(config),
    )
    labels = [start.indices(data.classes)[data.train.labels] for data in datas]
    together = Split(torch.cat([data.train.images for data in datas]), torch.cat(labels))
    passes = epochs or config.train.local_epochs
    fitted = fit_task_vector(
        backbone,
        kind,
        together,
        start,
        replace(config.train, local_epochs=passes, head_alpha=0.0, head_decay=0.0),
        generator=generator_for(config.seed, "train", "joint"),
    )
    theta_0 = backbone.theta_0
    changes = fitted.task_vector.dense(theta_0)
    return {name: theta_0[name] + change for name, change in changes.items()}, fitted.head


def described(
    backbone: Backbone,
    theta: Weights,
    datas: Sequence[ClientData],
    config: RunConfig,
    *,
    purpose: str,
    linearised: bool = False,
) -> dict[str, Mixtures]:
    """Fit mixtures to the features of every client, as each client does in a run.

    Args:
        backbone: Pre-trained weights.
        theta: Target weights under which features are taken, by name; those not named, pre-trained.
        datas: The clients' images.
        config: Settings of the mixtures, and the seed.
        purpose: ``features`` or ``realign``: in which phase of a run clients would fit them.
        linearised: Whether the weights are composed of tangents.

    Returns:
        Mixtures by client and class.
    """
    forward = feature_map(backbone, theta, tangent=linearised)
    return {
        data.name: fit_mixtures(
            extract_features(forward, data.train.images),
            data.train.labels,
            data.classes,
            components=config.head.mixture_components,
            seed=derive_seed(config.seed, purpose, data.name),
        )
        for data in datas
    }


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
