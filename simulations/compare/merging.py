r"""Other ways to merge the same task vectors into one model, without training.

Each takes a pool and the pre-trained weights, and returns the merged weights by name::

    theta_p = MERGES["ties"](registry.pool(with_fisher=True), backbone.theta_0)

One weight at a time is dense, of all clients, in float64; :func:`ties` looks at each client's whole
task vector before, one client after the other, to see which of its entries are small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedcompo.config.choices import Kind
from fedcompo.errors import ContributionError
from fedcompo.method.contribution import Contribution
from fedcompo.method.deltas import Weights
from fedcompo.method.fisher import COLUMNS, ROWS, outer
from fedcompo.method.pool import Pool

Merge = Callable[[Pool, Weights], Weights]
"""Merges a pool into θ₀; returns target weights by name, each (out, in) and like θ₀'s."""


def average_factors(pool: Pool, theta_0: Weights) -> Weights:
    r"""Average the factors separately, :math:`\theta_0 + \bar B\bar A`: a common mistake.

    The mean of the task vectors is :math:`\tfrac1T\sum_c B_c A_c`. Here each B meets every A,
    though each client drew its own.

    Raises:
        ContributionError: If a task vector is no LoRA, or its ranks are not those of the others.
    """
    pool.check_composable(None)
    first = pool.contributions[0].task_vector.tensors
    shapes = {name: tuple(first[name].shape) for name in first}
    for member in pool:
        vector = member.task_vector
        found = {name: tuple(vector.tensors[name].shape) for name in vector.tensors}
        if vector.kind is not Kind.LORA or found != shapes:
            raise ContributionError(
                f"Factors are averaged of LoRAs of one rank; client {member.client!r} has a task "
                f"vector of kind {vector.kind}, or of other ranks than the first."
            )
    theta_p = dict(theta_0)
    for name in pool.contributions[0].task_vector.names:
        weight = theta_0[name]
        a, b = (
            torch.stack([c.task_vector.tensors[f"{name}/{factor}"].double() for c in pool]).mean(0)
            for factor in "AB"
        )
        theta_p[name] = (weight.double() + (b @ a).to(weight.device)).to(weight.dtype)
    return theta_p


def ties(pool: Pool, theta_0: Weights, *, density: float = 0.2) -> Weights:
    r"""Trim, elect a sign for each entry, and average the clients that have it.

    Of each client's task vector only the share ``density`` that is largest in magnitude, over all
    of its weights, is kept: :math:`\hat\tau_c`. Each entry then has the sign
    :math:`\gamma = \operatorname{sgn}\sum_c \hat\tau_c`, and

    .. math:: \theta_P = \theta_0 + \operatorname{mean}\{\hat\tau_c :
       \operatorname{sgn}\hat\tau_c = \gamma \ne 0\}

    Where nobody is left, or the sum is exactly zero, the weight stays pre-trained.

    Source: Yadav et al., *TIES-Merging*, NeurIPS 2023 (arXiv 2306.01708), algorithm 1; the defaults
    are theirs for want of held-out data.

    Args:
        pool: Contributions of any kinds.
        theta_0: Target weights by name, each (out, in).
        density: Share that is kept, in (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"`density` must be in (0, 1], got {density}.")
    least = {c.client: _least_kept(c, theta_0, density) for c in pool}

    def combine(name: str, taus: Tensor) -> Tensor:
        limits = torch.stack([least[client] for client in pool.clients]).to(taus)
        kept = torch.where(taus.abs() >= limits[:, None, None], taus, 0.0)
        agreeing = kept.sign() == kept.sum(0).sign()
        total = torch.where(agreeing, kept, 0.0).sum(0)
        return total / agreeing.sum(0).clamp_min(1)

    return _merged(pool, theta_0, combine)


def fisher_weighted(pool: Pool, theta_0: Weights) -> Weights:
    r"""Weigh each client by its Fisher: :math:`\sum_c F_c\theta_c/\sum_c F_c`.

    With :math:`\theta_c = \theta_0 + \tau_c`, element by element, and F the *mean* Fisher diagonal
    over a client's examples; where all are zero, the plain mean.

    Source: Matena & Raffel, *Merging Models with Fisher-Weighted Averaging*, NeurIPS 2022 (arXiv
    2111.09832). They take F at :math:`\theta_c`; this is the one at :math:`\theta_0` that clients
    send.

    Raises:
        ContributionError: If a contribution has no Fisher.
    """
    if without := [c.client for c in pool if c.fisher is None]:
        raise ContributionError(
            f"There is no Fisher of {', '.join(without)}. Run with `keep-fisher = true`, and open "
            "the pool with its Fishers."
        )

    def combine(name: str, taus: Tensor) -> Tensor:
        shares = torch.stack([_mean_fisher(c, name) for c in pool]).to(taus)  # (clients, out, in)
        total = shares.sum(0)
        weighted = (shares * taus).sum(0) / torch.where(total > 0, total, 1.0)
        return torch.where(total > 0, weighted, taus.mean(0))

    return _merged(pool, theta_0, combine)


MERGES: Mapping[str, Merge] = {
    "average_factors": average_factors,
    "ties": ties,
    "fisher_weighted": fisher_weighted,
}
"""By name."""


def _merged(pool: Pool, theta_0: Weights, combine: Callable[[str, Tensor], Tensor]) -> Weights:
    """Merge all clients' changes of each weight, (clients, out, in), and add the result to it."""
    pool.check_composable(None)
    theta_p = dict(theta_0)
    for name in sorted({name for c in pool for name in c.task_vector.names}):
        weight = theta_0[name]
        taus = torch.stack([_tau(c, name, weight) for c in pool])
        theta_p[name] = (weight.double() + combine(name, taus)).to(weight.dtype)
    return theta_p


def _tau(contribution: Contribution, name: str, weight: Tensor) -> Tensor:
    """Return a client's change of one weight, (out, in), float64; zeros if it has none."""
    if name not in contribution.task_vector.names:
        return torch.zeros_like(weight, dtype=torch.float64)
    return contribution.task_vector.delta(name, weight).double()


def _least_kept(contribution: Contribution, theta_0: Weights, density: float) -> Tensor:
    """Magnitude of the smallest entry that trimming leaves of a task vector; a scalar."""
    vector = contribution.task_vector
    entries = [vector.delta(name, theta_0[name]).abs().flatten() for name in vector.names]
    magnitudes = torch.cat(entries)
    kept = max(1, round(density * len(magnitudes)))
    return magnitudes.kthvalue(len(magnitudes) - kept + 1).values


def _mean_fisher(contribution: Contribution, name: str) -> Tensor:
    """(out, in), float64."""
    fisher = contribution.fisher
    assert fisher is not None
    if name not in fisher.sums:  # factored, or Kronecker: its diagonal
        fisher = fisher.reduced()
        total = outer(fisher.sums[f"{name}{ROWS}"], fisher.sums[f"{name}{COLUMNS}"])
    else:
        total = fisher.sums[name]
    return total.double() / fisher.num_examples
