r"""A Fisher sum under noise: what one image adds is clipped, in the form in which it leaves.

The noise has to hide every number that is sent. Of a dense Fisher these are millions, and their
noise drowns a few hundred images; of its row and column sums, thousands; of the head's rows,
hundreds: the fewer numbers leave (:mod:`fedcompo.privacy.factored`), the less noise is in them.

Only what one image's own pass yields may enter: the exact Fisher, of all images. The leading
estimator chooses its rank by the whole batch, and a drawn subset changes with every image.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fedcompo.config.choices import FisherForm
from fedcompo.method.deltas import Weights
from fedcompo.method.fisher import HEAD
from fedcompo.method.heads import Head
from fedcompo.privacy.factored import COLUMNS, ROWS
from fedcompo.privacy.noise import Entropy, clip_factors, noised
from fedcompo.training.fisher_estimate import curvature_factors
from fedcompo.training.per_example import (
    evaluation_mode,
    recorded,
    require_recorded,
    squared_gradients,
)

PARTS = 2
"""What one image adds: to the count, and to the Fisher, all its weights together."""
MEMORY = 256 * 2**20
"""Bytes for the Fishers of single images that are held at a time."""


def images_at_a_time(theta_0: Weights, form: FisherForm, most: int) -> int:
    """How many images' own Fishers fit the memory; at least one, at most ``most``."""
    if form is not FisherForm.DENSE:
        return most
    one = sum(4 * weight.numel() for weight in theta_0.values())
    return max(1, min(most, MEMORY // max(1, one)))


def per_example_fishers(
    model: nn.Module, head: Head, images: Tensor, names: Iterable[str], form: FisherForm
) -> Weights:
    """The exact Fisher of each image by itself, in the form in which it leaves.

    Args:
        model: Maps images to features; in evaluation mode.
        head: Turns features into logits.
        images: (batch, channels, height, width), normalised, on the model's device.
        names: Weights of linear layers.
        form: dense, factored or head.

    Returns:
        By the names of :func:`fedcompo.privacy.factored.reduced`, each (batch, ...).
    """
    names = [] if form is FisherForm.HEAD else sorted(names)
    found: Weights = {}
    with evaluation_mode(model), recorded(model, names) as record:
        features = model(images)
        require_recorded(record, names)
        logits = head(features.detach())
        weight = head.weight.to(features)
        cotangents = curvature_factors(logits, weight)[0].unbind(1) if names else ()
        for cotangent in cotangents:
            for name, part, squares in squared_gradients(record, features, cotangent):
                for key, values in _taken(name, squares, form):
                    total = found.setdefault(key, values.new_zeros(len(images), *values.shape[1:]))
                    total[part] += values
    p = logits.double().softmax(-1)
    variance = p * (1 - p)  # (batch, classes)
    squared = features.detach().double().square()
    weight_fisher = variance.unsqueeze(2) * squared.unsqueeze(1)  # (batch, classes, features)
    return {**found, HEAD[0]: weight_fisher, HEAD[1]: variance}


def _taken(name: str, squares: Tensor, form: FisherForm) -> list[tuple[str, Tensor]]:
    """What is kept of one weight's squares, (examples, out, in)."""
    if form is FisherForm.DENSE:
        return [(name, squares)]
    return [(f"{name}{ROWS}", squares.sum(2)), (f"{name}{COLUMNS}", squares.sum(1))]


def clipped_sum(fishers: Weights, clip: float) -> Weights:
    """Sum images' Fishers, each clipped to a norm over all its numbers together; float64.

    Args:
        fishers: By name, each (batch, ...).
        clip: The largest norm that one image may add.
    """
    flat = {name: values.double().flatten(1) for name, values in fishers.items()}
    norms = torch.stack([values.square().sum(1) for values in flat.values()]).sum(0).sqrt()
    factors = clip_factors(norms, clip)  # (batch,)
    return {
        name: (factors @ values).reshape(fishers[name].shape[1:]) for name, values in flat.items()
    }


def private_fisher(
    model: nn.Module,
    head: Head,
    batches: Iterable[Tensor],
    names: Iterable[str],
    *,
    form: FisherForm,
    clip: float,
    noise: float,
    entropy: Entropy = os.urandom,
) -> tuple[Weights, int]:
    """Estimate a Fisher sum that hides each image's part in it.

    Args:
        model: Maps images to features.
        head: Turns features into logits; must not be fitted to these images but through noise.
        batches: Normalised images, all there are, neither shuffled nor augmented.
        names: Weights of linear layers.
        form: What leaves of it.
        clip: Largest Fisher, as a norm, that one image may add.
        noise: In sensitivities.
        entropy: See :func:`fedcompo.privacy.noise.normal`.

    Returns:
        What leaves, as :func:`fedcompo.privacy.factored.reduced` would, float32; noise may not
        leave a number below zero. And the noised number of images, at least one.
    """
    sums: Weights = {}
    count, names = 0, tuple(names)
    for images in batches:
        added = clipped_sum(per_example_fishers(model, head, images, names, form), clip)
        for name, part in added.items():
            sums[name] = sums[name] + part if name in sums else part
        count += len(images)
    sums["count"] = torch.tensor(float(count))
    limits = dict.fromkeys(sums, clip) | {"count": 1.0}
    found = noised(sums, limits, parts=PARTS, noise=noise, entropy=entropy)
    examples = max(1, round(float(found.pop("count"))))
    return {name: total.clamp_min(0).float() for name, total in found.items()}, examples
