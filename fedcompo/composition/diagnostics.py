r"""Figures of a composition: norms of the task vectors, their overlaps, the gap of Theorem 1.

With the second-order proxy :math:`\hat\ell` of the loss at :math:`\theta_0` (Porrello et al., arXiv
2405.16350, Theorem 1)

.. math:: \hat\ell(\theta_P) = \sum_t w_t \hat\ell(\theta_t) - \Omega, \qquad
   \Omega = \tfrac12 \sum_t \sum_{t'<t} w_t w_{t'} (\tau_t - \tau_{t'})^\top H (\tau_t - \tau_{t'})

so *on the proxy* the composition is never worse than the weighted mean of its members. Here H is
the mean Fisher of all clients.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcompo.method.deltas import Weights
from fedcompo.method.kronecker import Block, Kronecker, Metric, applied
from fedcompo.method.pool import Pool
from fedcompo.report.progress import each

OUTLIER_RATIO = 3.0
"""A task vector is an outlier if it is this many times longer or shorter than its kind's median."""
OPPOSED = -0.5
"""Or if its mean cosine with the others, in the Fisher metric, is below this."""
CHUNK = 1 << 16
"""Entries of a weight that are in memory for all clients, in float64, at a time."""
COMPARED = 64
"""Most clients that are compared in pairs; memory and time grow with the square of their number."""


@dataclass(frozen=True)
class Diagnostics:
    """Figures of one composition."""

    clients: tuple[str, ...]
    gram: Tensor | None
    r""":math:`\tau_a^\top \bar F \tau_b`, (clients, clients), float64; None among more clients
    than :data:`COMPARED`."""
    norms: Tensor
    r""":math:`\lVert\tau_c\rVert_2`, (clients,), float64."""
    gap: float
    r""":math:`\Omega` at the coefficients of the composition."""
    outliers: tuple[str, ...]
    """Clients whose task vector is an outlier; see :data:`OUTLIER_RATIO` and :data:`OPPOSED`."""


def diagnose(
    pool: Pool, theta_0: Weights, fisher: Metric, coefficients: Mapping[str, float]
) -> Diagnostics:
    """Compare the task vectors of a pool that is not empty, one weight (out, in) at a time.

    The Fisher is a *mean*, by weight name; the coefficients are by client.
    """
    count = len(pool)
    w = torch.tensor([coefficients[client] for client in pool.clients], dtype=torch.float64)
    squared = torch.zeros(count, dtype=torch.float64)
    gram = torch.zeros(count, count, dtype=torch.float64) if count <= COMPARED else None
    gap = 0.0
    weights = each(theta_0.items(), "weights", "comparing", total=len(theta_0))
    for name, weight in weights:
        block = fisher[name].to(weight.device)
        if gram is None:
            lengths, part = _streamed(pool, name, weight, block, w)
            squared, gap = squared + lengths, gap + part
        else:
            tau = torch.stack([c.task_vector.delta(name, weight) for c in pool])
            if isinstance(block, Kronecker):
                moved, metric = block.applied(tau), torch.ones_like(weight)
            else:
                moved, metric = tau, block
            flat = tau.flatten(1), moved.flatten(1), metric.flatten()
            for own, seen, f in zip(*(torch.split(t, CHUNK, dim=-1) for t in flat), strict=True):
                piece = own.double()
                gram += ((seen * f.double()) @ piece.T).cpu()
                squared += piece.square().sum(1).cpu()
    norms = squared.sqrt()
    if gram is not None:
        gap = composition_gap(gram, w)
    return Diagnostics(pool.clients, gram, norms, gap, _outliers(pool, gram, norms))


def _streamed(
    pool: Pool, name: str, weight: Tensor, fisher: Block, w: Tensor
) -> tuple[Tensor, float]:
    r"""Return squared lengths, (clients,), and one weight's part of the gap; one client at a time.

    .. math:: \Omega = \tfrac12\Big(\sum_t w_t\,\tau_t^\top H\,\tau_t
              - \bar\tau^\top H\,\bar\tau\Big), \qquad \bar\tau = \sum_t w_t \tau_t
    """
    mean, energy, squared = torch.zeros_like(weight, dtype=torch.float64), 0.0, []
    for share, contribution in zip(w.tolist(), pool, strict=True):
        tau = contribution.task_vector.delta(name, weight).double()
        squared.append(float(tau.square().sum()))
        energy += share * float((applied(fisher, tau) * tau).sum())
        mean += share * tau
    part = 0.5 * (energy - float((applied(fisher, mean) * mean).sum()))
    return torch.tensor(squared, dtype=torch.float64), part


def composition_gap(gram: Tensor, coefficients: Tensor) -> float:
    r"""Compute :math:`\Omega` from the Gram matrix of the task vectors in H.

    Args:
        gram: :math:`\tau_a^\top H \tau_b`, (clients, clients).
        coefficients: w, (clients,), summing to one.
    """
    diagonal = gram.diagonal()
    distance = diagonal.unsqueeze(0) + diagonal.unsqueeze(1) - gram - gram.T
    return float(0.25 * (coefficients.unsqueeze(1) * coefficients * distance).sum())


def _outliers(pool: Pool, gram: Tensor | None, norms: Tensor) -> tuple[str, ...]:
    """Return the clients whose task vectors are far longer or shorter, or oppose the others.

    Without a Gram matrix only lengths count.
    """
    values = norms.tolist()
    kinds = [contribution.task_vector.kind for contribution in pool]
    others = len(pool) - 1
    means = torch.zeros(len(pool))
    if gram is not None and others >= 2:
        lengths = gram.diagonal().clamp_min(1e-300).sqrt()
        means = ((gram / (lengths.unsqueeze(1) * lengths)).sum(1) - 1) / others
    outliers = []
    for index, client in enumerate(pool.clients):
        alike = [v for i, v in enumerate(values) if i != index and kinds[i] == kinds[index]]
        if len(alike) >= 2:
            median = statistics.median(alike)
            odd = not median / OUTLIER_RATIO <= values[index] <= median * OUTLIER_RATIO
        else:
            odd = False
        if odd or float(means[index]) < OPPOSED:
            outliers.append(client)
    return tuple(outliers)
