r"""Counts are claims: a client weighs by no more images than others usually have.

Of n images of a class, min(n, C) count. With sums s and means :math:`\mu = s/n` by class, and a
second moment M over all K classes of a client,

.. math:: n'_k = \min(n_k, C), \qquad s'_k = n'_k\,\mu_k, \qquad
   M' = \rho\,\Big(M - \sum_k n_k\,\mu_k\mu_k^\top\Big) + \sum_k n'_k\,\mu_k\mu_k^\top, \qquad
   \rho = \frac{\sum_k n'_k - K}{\sum_k n_k - K}

Means and covariance stay as stated; only their weight beside others' shrinks. It follows from the
client's own counts and a C that never changes, so sums stay exact: whoever leaves is subtracted as
it was added. The first members choose C, see :meth:`CompositionSettings.with_caps`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fedcompo.method.contribution import AnyStatistics
from fedcompo.method.statistics import FeatureSums, off_grid


def capped(statistics: AnyStatistics, most: int) -> AnyStatistics:
    """Let a client weigh by no more than so many images of each class.

    Raises:
        ContributionError: If its sums cannot be those of the images that it counts.
    """
    if isinstance(statistics, FeatureSums):
        return _capped_sums(statistics, most)
    return {
        name: replace(mixture, num_examples=min(mixture.num_examples, most))
        for name, mixture in statistics.items()
    }


def _capped_sums(stated: FeatureSums, most: int) -> FeatureSums:
    """Return the same bits on every machine: products of float32 are exact in float64."""
    counts, size = stated.counts.clamp_max(most), len(stated.counts)
    if torch.equal(counts, stated.counts):
        return stated
    ratio = int(counts.sum() - size) / int(stated.counts.sum() - size)
    means = off_grid(stated.sums) / stated.counts.double().unsqueeze(1)  # (classes, features)
    second = off_grid(stated.second) * ratio
    rows, columns = torch.triu_indices(stated.num_features, stated.num_features)
    for mean, own, all_ in zip(means, counts.tolist(), stated.counts.tolist(), strict=True):
        share = own - ratio * all_
        root = (mean * abs(share) ** 0.5).float().double()
        second.addcmul_(root[rows], root[columns], value=1.0 if share > 0 else -1.0)
    return FeatureSums.read(stated.classes, counts, means * counts.double().unsqueeze(1), second)
