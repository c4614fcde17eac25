r"""A Fisher sum under noise: clip what each image adds, sum, add noise.

Images are clipped in the form in which the sum is sent (:mod:`fedcompo.method.fisher`). The noise
must hide every number that is sent, so fewer numbers need less noise: a dense Fisher has millions,
and their noise drowns a few hundred images; row and column sums are thousands.

An image's part may depend on that image alone. Hence all images, and of class probabilities the
exact Fisher. Of features, the random direction of each image comes from the same entropy as the
noise: if the server could draw it from the run's seed, it would know which image came when.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fedcompo.method.deltas import Weights
from fedcompo.method.fisher import COLUMNS, ROWS, FisherDiagonal
from fedcompo.method.heads import Head
from fedcompo.privacy.noise import Entropy, clip_factors, noised, normal
from fedcompo.training.fisher_estimate import curvature_factors
from fedcompo.training.per_example import (
    evaluation_mode,
    recorded,
    require_own_rows,
    require_recorded,
    squared_gradients,
)

PARTS = 2
"""Parts that one image adds: to the count, and to the Fisher of all weights together."""
MEMORY = 256 * 2**20
"""Bytes of the Fishers of single images that are in memory at a time."""


def images_at_a_time(theta_0: Mapping[str, Tensor], *, factored: bool, most: int) -> int:
    """Return how many images' own Fishers fit the memory; at least one, at most ``most``."""
    if factored:
        return most
    one = sum(4 * weight.numel() for weight in theta_0.values())
    return max(1, min(most, MEMORY // max(1, one)))


def per_example_fishers(
    model: nn.Module,
    images: Tensor,
    names: Iterable[str],
    *,
    head: Head | None,
    factored: bool,
    entropy: Entropy = os.urandom,
) -> Weights:
    """Compute the Fisher of each image by itself, in the form in which it is sent.

    Args:
        model: Maps images to features.
        images: (batch, channels, height, width), normalised, on the model's device.
        names: Weights of linear layers.
        head: Turns features into logits, for the exact Fisher of class probabilities; None: the
            Fisher of features, along one random direction for each image.
        factored: Whether it is sent as row and column sums.
        entropy: Source of the directions; see :func:`fedcompo.privacy.noise.normal`.

    Returns:
        By the names of :attr:`FisherDiagonal.sums`, each (batch, ...).
    """
    names = sorted(names)
    fishers: Weights = {}
    with evaluation_mode(model), recorded(model, names) as record:
        features = model(images)
        require_recorded(record, names)
        cotangents: Iterable[Tensor]
        if head is None:
            cotangents = [normal(features.shape, entropy).to(features)]
        else:
            logits = head(features.detach())
            cotangents = curvature_factors(logits, head.weight.to(features))[0].unbind(1)
        for cotangent in cotangents:
            for name, part, squares in squared_gradients(record, features, cotangent):
                pieces = {name: squares}
                if factored:
                    pieces = {f"{name}{ROWS}": squares.sum(2), f"{name}{COLUMNS}": squares.sum(1)}
                for key, values in pieces.items():
                    empty = values.new_zeros(len(images), *values.shape[1:])
                    fishers.setdefault(key, empty)[part] += values
    return fishers


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
    batches: Iterable[Tensor],
    names: Iterable[str],
    *,
    head: Head | None = None,
    factored: bool,
    clip: float,
    noise: float,
    entropy: Entropy = os.urandom,
) -> FisherDiagonal:
    """Compute a Fisher sum under noise that hides what each image adds.

    Args:
        model: Maps images to features.
        batches: All normalised images, neither shuffled nor augmented.
        names: Weights of linear layers.
        head: Turns features into logits, for the exact Fisher of class probabilities; must not be
            fitted to these images without noise. None: the Fisher of features.
        factored: Whether it is sent as row and column sums.
        clip: Largest Fisher, as a norm, that one image may add.
        noise: In sensitivities.
        entropy: See :func:`fedcompo.privacy.noise.normal`.

    Returns:
        The sum under noise, float32, negative numbers set to zero; its number of images is under
        noise too, at least one.

    Raises:
        BackboneError: If images cannot be told apart at a layer.
    """
    sums: Weights = {}
    count, names = 0, tuple(names)
    for images in batches:
        if not count:
            with evaluation_mode(model), recorded(model, names) as record:
                require_own_rows(model, images, names, record)
        fishers = per_example_fishers(
            model, images, names, head=head, factored=factored, entropy=entropy
        )
        for name, part in clipped_sum(fishers, clip).items():
            sums[name] = sums[name] + part if name in sums else part
        count += len(images)
    sums["count"] = torch.tensor(float(count))
    limits = dict.fromkeys(sums, clip) | {"count": 1.0}
    released = noised(sums, limits, parts=PARTS, noise=noise, entropy=entropy)
    examples = max(1, round(float(released.pop("count"))))
    return FisherDiagonal({n: t.clamp_min(0).float() for n, t in released.items()}, examples)
