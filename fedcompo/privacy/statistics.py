r"""Feature statistics under noise: one Gaussian a class, from noised sums.

A mixture fitted by expectation-maximisation is no sum, so its sensitivity is unknown. Instead, each
class gives a count and a sum of features, and all classes together a sum of squared features,

.. math:: n_k = \sum_{y=k} 1, \qquad S_k = \sum_{y=k} x, \qquad Q = \sum x^{\odot 2},

with x clipped to length C and :math:`x^{\odot 2}` to :math:`2C^2/\sqrt d` (for normal features it
has :math:`\sqrt 3\,C^2/\sqrt d`). Means are :math:`S_k/n_k`; all classes share the variances
:math:`(Q - \sum_k n_k \mu_k^2)/n`, less what the means' own noise adds to them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcompo.method.features import VARIANCE_FLOOR, FeatureMixture
from fedcompo.privacy.noise import Entropy, clip_factors, noised

PARTS = 3
"""Parts that one image adds: to a count, to a sum of features, to the sum of squares."""


def clipped_sums(
    features: Tensor, labels: Tensor, *, num_classes: int, clip: float
) -> tuple[dict[str, Tensor], dict[str, float]]:
    r"""Clip each part of what an image adds, and sum over images.

    Args:
        features: x, (count, features).
        labels: (count,), below ``num_classes``.
        num_classes: k.
        clip: C.

    Returns:
        ``counts`` (classes,), ``features`` (classes, features), ``squares`` (features,), float64,
        and the limit of each.
    """
    x = features.double()
    x = x * clip_factors(x.norm(dim=1), clip).unsqueeze(1)
    limits = {"counts": 1.0, "features": clip, "squares": 2 * clip**2 / math.sqrt(x.shape[1])}
    squares = x.square()
    squares = squares * clip_factors(squares.norm(dim=1), limits["squares"]).unsqueeze(1)
    onehot = F.one_hot(labels, num_classes).double()  # (count, classes)
    sums = {"counts": onehot.sum(0), "features": onehot.T @ x, "squares": squares.sum(0)}
    return sums, limits


def private_mixtures(
    features: Tensor,
    labels: Tensor,
    classes: Iterable[str],
    *,
    clip: float,
    noise: float,
    entropy: Entropy = os.urandom,
) -> dict[str, FeatureMixture]:
    """Describe each class by one Gaussian, from noised sums alone.

    Args:
        features: (count, features).
        labels: (count,), index into ``classes``.
        classes: Names of the classes; they are sent without noise.
        clip: Largest norm of the features of one image.
        noise: In sensitivities.
        entropy: See :func:`fedcompo.privacy.noise.normal`.

    Returns:
        Mixtures by class name; their numbers of examples are under noise, too.
    """
    classes = tuple(classes)
    sums, limits = clipped_sums(features, labels, num_classes=len(classes), clip=clip)
    released = noised(sums, limits, parts=PARTS, noise=noise, entropy=entropy)
    counts = released["counts"].round().clamp_min(1)
    means = released["features"] / counts.unsqueeze(1)  # (classes, features)
    blur = (noise * math.sqrt(PARTS) * clip / counts).square()  # of a mean, by noise alone
    between = (counts.unsqueeze(1) * (means.square() - blur.unsqueeze(1))).sum(0)
    variances = ((released["squares"] - between) / counts.sum()).clamp_min(
        VARIANCE_FLOOR * clip**2 / features.shape[1]
    )
    means = means * clip_factors(means.norm(dim=1), clip).unsqueeze(1)  # no mean can be longer
    return {
        name: FeatureMixture(
            torch.ones(1),
            means[k].float().unsqueeze(0),
            variances.float().unsqueeze(0),
            int(counts[k]),
        )
        for k, name in enumerate(classes)
    }
