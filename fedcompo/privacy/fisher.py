r"""A Fisher sum under noise: clip what each image adds, sum, add noise.

Images are clipped in the form in which the sum is sent (:mod:`fedcompo.privacy.factored`). The
noise must hide every number that is sent, so fewer numbers need less noise: a dense Fisher has
millions, and their noise drowns a few hundred images; row and column sums are thousands; the
head's Fisher is hundreds.

An image's part may depend on that image alone. Hence the exact Fisher of all images: the leading
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
"""Parts that one image adds: to the count, and to the Fisher of all weights together."""
MEMORY = 256 * 2**20
"""Bytes of the Fishers of single images that are in memory at a time."""


def images_at_a_time(theta_0: Weights, form: FisherForm, most: int) -> int:
    """Return how many images' own Fishers fit the memory; at least one, at most ``most``."""
    if form is not FisherForm.DENSE:
        return most
    one = sum(4 * weight.numel() for weight in theta_0.values())
    return max(1, min(most, MEMORY // max(1, one)))


def per_example_fishers(
    model: nn.Module, head: Head, images: Tensor, names: Iterable[str], form: FisherForm
) -> Weights:
    """Compute the exact Fisher of each image by itself, in the form in which it is sent.

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
    fishers: Weights = {}
    with evaluation_mode(model), recorded(model, names) as record:
        features = model(images)
        require_recorded(record, names)
        logits = head(features.detach())
        weight = head.weight.to(features)
        cotangents = curvature_factors(logits, weight)[0].unbind(1) if names else ()
        for cotangent in cotangents:
            for name, part, squares in squared_gradients(record, features, cotangent):
                for key, values in _in_form(name, squares, form):
                    total = fishers.setdefault(
                        key, values.new_zeros(len(images), *values.shape[1:])
                    )
                    total[part] += values
    p = logits.double().softmax(-1)
    variance = p * (1 - p)  # (batch, classes)
    squared = features.detach().double().square()
    weight_fisher = variance.unsqueeze(2) * squared.unsqueeze(1)  # (batch, classes, features)
    return {**fishers, HEAD[0]: weight_fisher, HEAD[1]: variance}


def _in_form(name: str, squares: Tensor, form: FisherForm) -> list[tuple[str, Tensor]]:
    """Reduce one weight's squares, (examples, out, in), to a form."""
    if form is FisherForm.DENSE:
        return [(name, squares)]
    return [(f"{name}{ROWS}", squares.sum(2)), (f"{name}{COLUMNS}", squares.sum(1))]


def clipped_sum(fishers: Weights, clip: float) -> Weights:
    """Clip the Fisher of each image by its norm over all weights together, and sum; float64.

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
    """Compute a Fisher sum under noise that hides what each image adds.

    Args:
        model: Maps images to features.
        head: Turns features into logits; must not be fitted to these images without noise.
        batches: All normalised images, neither shuffled nor augmented.
        names: Weights of linear layers.
        form: Form in which it is sent.
        clip: Largest Fisher, as a norm, that one image may add.
        noise: In sensitivities.
        entropy: See :func:`fedcompo.privacy.noise.normal`.

    Returns:
        The sum under noise by the names of :func:`fedcompo.privacy.factored.reduced`, float32,
        negative numbers set to zero; and the number of images under noise, at least one.
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
    released = noised(sums, limits, parts=PARTS, noise=noise, entropy=entropy)
    examples = max(1, round(float(released.pop("count"))))
    return {name: total.clamp_min(0).float() for name, total in released.items()}, examples
