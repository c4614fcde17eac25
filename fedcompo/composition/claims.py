r"""Counts are claims: how much a client can weigh by the number of images that it says it has.

Of a class that n images of a client show, min(n, C) count, and no more. With sums s and means
:math:`\mu = s/n` by class, and a second moment M over all its K classes,

.. math:: n'_k = \min(n_k, C), \qquad s'_k = n'_k\,\mu_k, \qquad
   M' = \rho\,\Big(M - \sum_k n_k\,\mu_k\mu_k^\top\Big) + \sum_k n'_k\,\mu_k\mu_k^\top, \qquad
   \rho = \frac{\sum_k n'_k - K}{\sum_k n_k - K}

Means and covariance are those that the client stated; only their weight beside others' shrinks.
What it becomes depends on the client and on C alone, so that sums stay exact: whoever leaves is
subtracted as it was added. C is chosen once, see :meth:`CompositionSettings.with_caps`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import ceil
from statistics import median_low

import torch
from torch import Tensor

from fedcompo.method.contribution import AnyStatistics
from fedcompo.method.statistics import FeatureSums, off_grid


def usual(counts: Iterable[int]) -> int:
    """Return the median; of an even number, the lower one: of two, the larger may be the lie."""
    return median_low(counts)


def most_of(counts: Iterable[int], ratio: float) -> int:
    """Return so many times the usual count, rounded up, for those who are there; 0: no limit."""
    return ceil(ratio * usual(counts))


def capped(statistics: AnyStatistics, most: int) -> AnyStatistics:
    """Let a client weigh no more than so many images of each class; 0: as many as it states.

    Raises:
        ContributionError: If its sums cannot be those of the images that it counts.
    """
    if isinstance(statistics, FeatureSums):
        return _capped_sums(statistics, most) if most else statistics
    return {
        name: replace(mixture, num_examples=min(mixture.num_examples, most or mixture.num_examples))
        for name, mixture in statistics.items()
    }


def _capped_sums(stated: FeatureSums, most: int) -> FeatureSums:
    """Return the same bits on every machine: products of float32 are exact in float64."""
    counts = stated.counts.clamp_max(most)
    if torch.equal(counts, stated.counts):
        return stated
    classes = len(counts)
    ratio = int(counts.sum() - classes) / int(stated.counts.sum() - classes)
    means = off_grid(stated.sums) / stated.counts.double().unsqueeze(1)  # (classes, features)
    second = off_grid(stated.second) * ratio
    rows, columns = torch.triu_indices(stated.num_features, stated.num_features)
    for mean, own, all_ in zip(means, counts.tolist(), stated.counts.tolist(), strict=True):
        share = own - ratio * all_
        root: Tensor = (mean * abs(share) ** 0.5).float().double()
        second.addcmul_(root[rows], root[columns], value=1.0 if share > 0 else -1.0)
    return FeatureSums.read(stated.classes, counts, means * counts.double().unsqueeze(1), second)
