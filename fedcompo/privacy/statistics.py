r"""Feature statistics under noise: counts, sums by class and second moment.

An image with features x, clipped to length C, adds three parts: one to the count of its class, x to
the sum of its class, and the upper triangle of :math:`x x^\top`, whose length is at most
:math:`C^2`, to the second moment of all classes.

The noise on d (d + 1)/2 numbers of the second moment can be far larger than the covariance of a few
hundred images. It is taken out as far as that is possible without looking at the images again: the
eigenvalues of the noise alone, s on each entry, end at :math:`2 s\sqrt d` (Wigner 1958), so each
eigenvalue of the noised scatter within classes is reduced by that much. What is left of the trace,
which the noise hardly changes, is spread over all directions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcompo.method.features import VARIANCE_FLOOR
from fedcompo.method.statistics import FeatureSums, packed, unpacked
from fedcompo.privacy.noise import Entropy, clip_factors, noised

PARTS = 3
"""Parts that one image adds: to a count, to a sum of features, to the second moment."""


def clipped_sums(
    features: Tensor, labels: Tensor, *, num_classes: int, clip: float
) -> tuple[dict[str, Tensor], dict[str, float]]:
    r"""Clip what an image adds, and sum over images.

    Args:
        features: x, (count, d).
        labels: (count,), below ``num_classes``.
        num_classes: k.
        clip: C.

    Returns:
        ``counts`` (classes,), ``features`` (classes, d), ``second`` (d (d + 1)/2,), float64, and
        the limit of each.
    """
    x = features.double()
    x = x * clip_factors(x.norm(dim=1), clip).unsqueeze(1)
    onehot = F.one_hot(labels, num_classes).double()  # (count, classes)
    sums = {"counts": onehot.sum(0), "features": onehot.T @ x, "second": packed(x.T @ x)}
    return sums, {"counts": 1.0, "features": clip, "second": clip**2}


def private_sums(
    features: Tensor,
    labels: Tensor,
    classes: Iterable[str],
    *,
    clip: float,
    noise: float,
    entropy: Entropy = os.urandom,
) -> FeatureSums:
    """Sum the statistics of labelled images under noise that hides what each adds.

    Args:
        features: (count, d).
        labels: (count,), index into ``classes``.
        classes: Sorted names; they are sent without noise.
        clip: Largest norm of the features of one image.
        noise: In sensitivities.
        entropy: See :func:`fedcompo.privacy.noise.normal`.

    Returns:
        Sums of which a joint head can be made: at least one image a class, no mean longer than the
        clip, no negative variance.
    """
    classes = tuple(classes)
    sums, limits = clipped_sums(features.cpu(), labels.cpu(), num_classes=len(classes), clip=clip)
    released = noised(sums, limits, parts=PARTS, noise=noise, entropy=entropy)
    counts = released["counts"].round().clamp_min(1)
    means = released["features"] / counts.unsqueeze(1)  # (classes, d)
    spread = {name: noise * math.sqrt(PARTS) * limit for name, limit in limits.items()}
    blur = (spread["features"] ** 2 / counts).sum()  # of n μμᵀ in each direction, by noise alone
    within = unpacked(released["second"]) - (means * counts.unsqueeze(1)).T @ means
    within.diagonal().add_(blur)
    floor = VARIANCE_FLOOR * clip**2 * float(counts.sum())
    within = _denoised(within, spread["second"], floor=floor)
    means = means * clip_factors(means.norm(dim=1), clip).unsqueeze(1)  # no mean can be longer
    weighted = means * counts.unsqueeze(1)
    return FeatureSums.read(classes, counts, weighted, packed(within + weighted.T @ means))


def _denoised(scatter: Tensor, spread: float, *, floor: float) -> Tensor:
    """Reduce the eigenvalues by those of noise alone, and keep the trace.

    Args:
        scatter: (d, d), symmetric.
        spread: Standard deviation of the noise on each entry.
        floor: The least trace.

    Returns:
        (d, d), without negative eigenvalues.
    """
    size = len(scatter)
    values, vectors = torch.linalg.eigh(scatter)
    kept = (values - 2 * spread * math.sqrt(size)).clamp_min(0)
    trace = max(float(scatter.trace()), floor)
    level = max(trace - float(kept.sum()), 0) / size
    clean: Tensor = (vectors * (kept + level)) @ vectors.T
    return clean
