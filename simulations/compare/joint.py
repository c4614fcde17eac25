"""Joint training: all clients' images in one place, the upper bound that no federation may reach.

It exists in simulations alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch

from fedcompo.backbone.backbone import Backbone
from fedcompo.config.choices import Kind
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData, Split
from fedcompo.method.deltas import Weights
from fedcompo.method.heads import Head, zero_head
from fedcompo.method.images import joined
from fedcompo.seeds import generator_for
from fedcompo.training.fit import fit_task_vector
from fedcompo.training.pace import pace


def train_joint(
    backbone: Backbone,
    datas: Sequence[ClientData],
    config: RunConfig,
    kind: Kind,
) -> tuple[Weights, Head]:
    """Train one model on the images of all clients, by cross-entropy over all classes.

    Every image is seen as often as in the clients' own training, on average. The head starts at
    zero, and nothing holds the model to where it starts.

    Returns:
        Target weights by name, each (out, in), and the head of all classes.
    """
    start = zero_head(sorted({c for data in datas for c in data.classes}), backbone.num_features)
    labels = [start.indices(data.classes)[data.train.labels] for data in datas]
    together = Split(joined(*(data.train.images for data in datas)), torch.cat(labels))
    fitted = fit_task_vector(
        backbone,
        kind,
        together,
        start,
        replace(config.train, local_epochs=passes_of(datas, config), local_steps=0),
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
