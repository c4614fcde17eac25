r"""What a composition looks like from the inside: norms, overlaps, and the gap of Theorem 1.

With the second-order proxy :math:`\hat\ell` of the loss at :math:`\theta_0` (Porrello et al., arXiv
2405.16350, Theorem 1)

.. math:: \hat\ell(\theta_P) = \sum_t w_t \hat\ell(\theta_t) - \Omega, \qquad
   \Omega = \tfrac12 \sum_t \sum_{t'<t} w_t w_{t'} (\tau_t - \tau_{t'})^\top H (\tau_t - \tau_{t'})

so composing never does worse than the weighted mean of its members, *on the proxy*. Here H is the
mean Fisher diagonal of all clients.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcompo.deltas import Weights
from fedcompo.pool import Pool

OUTLIER_RATIO = 3.0
"""A task vector this many times longer or shorter than the median of its kind stands out."""
OPPOSED = -0.5
"""So does one whose mean cosine with the others, in the Fisher metric, is below this."""


@dataclass(frozen=True)
class Diagnostics:
    """Figures of one composition."""

    clients: tuple[str, ...]
    gram: Tensor
    r""":math:`\tau_a^\top \bar F \tau_b`, (clients, clients), float64."""
    norms: Tensor
    r""":math:`\lVert\tau_c\rVert_2`, (clients,), float64."""
    gap: float
    r""":math:`\Omega` at the coefficients of the composition."""
    outliers: tuple[str, ...]
    """Clients whose task vector stands out; see :data:`OUTLIER_RATIO` and :data:`OPPOSED`."""


def diagnose(
    pool: Pool, theta_0: Weights, fisher: Weights, coefficients: Mapping[str, float]
) -> Diagnostics:
    """Measure the task vectors of a pool against each other, one weight at a time.

    Args:
        pool: At least one contribution.
        theta_0: Target weights by name, each (out, in).
        fisher: *Mean* Fisher diagonal by weight name.
        coefficients: By client.
    """
    count = len(pool)
    gram = torch.zeros(count, count, dtype=torch.float64)
    squared = torch.zeros(count, dtype=torch.float64)
    for name, weight in theta_0.items():
        tau = torch.stack([c.task_vector.delta(name, weight).flatten().double() for c in pool])
        gram += ((tau * fisher[name].to(tau).flatten()) @ tau.T).cpu()
        squared += tau.square().sum(1).cpu()
    norms = squared.sqrt()
    w = torch.tensor([coefficients[client] for client in pool.clients], dtype=torch.float64)
    return Diagnostics(
        pool.clients, gram, norms, composition_gap(gram, w), _outliers(pool, gram, norms)
    )


def composition_gap(gram: Tensor, coefficients: Tensor) -> float:
    r"""Compute :math:`\Omega` from the Gram matrix of the task vectors in H.

    Args:
        gram: :math:`\tau_a^\top H \tau_b`, (clients, clients).
        coefficients: w, (clients,), summing to one.
    """
    diagonal = gram.diagonal()
    distance = diagonal.unsqueeze(0) + diagonal.unsqueeze(1) - gram - gram.T
    return float(0.25 * (coefficients.unsqueeze(1) * coefficients * distance).sum())


def _outliers(pool: Pool, gram: Tensor, norms: Tensor) -> tuple[str, ...]:
    """Clients that are far longer or shorter than others of their kind, or oppose the others."""
    values = norms.tolist()
    kinds = [contribution.task_vector.kind for contribution in pool]
    lengths = gram.diagonal().clamp_min(1e-300).sqrt()
    cosines = gram / (lengths.unsqueeze(1) * lengths)
    found = []
    for index, client in enumerate(pool.clients):
        alike = [v for i, v in enumerate(values) if i != index and kinds[i] == kinds[index]]
        if len(alike) >= 2:
            median = statistics.median(alike)
            odd = not median / OUTLIER_RATIO <= values[index] <= median * OUTLIER_RATIO
        else:
            odd = False
        others = len(pool) - 1
        opposed = others >= 2 and float(cosines[index].sum() - 1) / others < OPPOSED
        if odd or opposed:
            found.append(client)
    return tuple(found)
