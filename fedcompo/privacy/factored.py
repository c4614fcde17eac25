r"""A Fisher diagonal in fewer numbers: row and column sums of each weight's Fisher.

For one weight's Fisher F, (out, in), with row sums r and column sums c,

.. math:: \hat F = \frac{r\,c^\top}{\sqrt{\sum_i r_i \sum_j c_j}}

is, of all non-negative matrices of rank one, the one nearest to F in the generalised
Kullback-Leibler divergence :math:`\sum F \log(F/\hat F) - F + \hat F`. It has F's row sums, column
sums and total, and is F itself where F has rank one. (Of a Fisher both totals are the same; under
noise they differ, and their geometric mean stands for either.) Source: Shazeer & Stern,
*Adafactor*, ICML 2018 (arXiv 1804.04235), section 3; Lee & Seung, *Algorithms for Non-negative
Matrix Factorization*, NIPS 2000.

A sum of matrices of rank one has a higher rank. So each client's sums are expanded before they are
added up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedcompo.config.choices import FisherForm
from fedcompo.errors import ContributionError
from fedcompo.method.deltas import Weights
from fedcompo.method.fisher import HEAD

ROWS, COLUMNS = "/rows", "/columns"


def margins(total: Tensor) -> tuple[Tensor, Tensor]:
    """Return row sums, (out,), and column sums, (in,), of a matrix, (out, in); in float64."""
    total = total.double()
    return total.sum(1), total.sum(0)


def outer(rows: Tensor, columns: Tensor) -> Tensor:
    r"""Expand margins: :math:`r c^\top / \sqrt{\sum r \sum c}`.

    Args:
        rows: r, (out,), not negative.
        columns: c, (in,), not negative.

    Returns:
        (out, in), float32; zeros where either sums to zero.
    """
    r, c = rows.double(), columns.double()
    total = (r.sum() * c.sum()).sqrt()
    if total == 0:
        return torch.zeros(len(r), len(c), device=r.device)
    return torch.outer(r / total, c).float()


def reduced(sums: Mapping[str, Tensor], form: FisherForm) -> Weights:
    """Reduce a Fisher sum to the form in which it leaves a client.

    Args:
        sums: By weight name, each (out, in). The head's are small and always sent whole.
        form: dense: all; factored: margins of each weight's; head: the head's alone.

    Returns:
        Tensors by name; ``<weight>/rows`` and ``<weight>/columns`` for margins, float32.
    """
    if form is FisherForm.DENSE:
        return dict(sums)
    parts = {name: sums[name] for name in HEAD if name in sums}
    if form is FisherForm.FACTORED:
        for name in sorted(sums.keys() - set(HEAD)):
            rows, columns = margins(sums[name])
            parts |= {f"{name}{ROWS}": rows.float(), f"{name}{COLUMNS}": columns.float()}
    return parts


def restored(
    parts: Mapping[str, Tensor], form: FisherForm, theta_0: Weights, *, owner: str
) -> Weights:
    """Expand the result of :func:`reduced`; parts that were not sent count as zero.

    Args:
        parts: Tensors as received.
        form: Form in which they were sent.
        theta_0: The target weights; only names and shapes are used.
        owner: Client who sent them, for error messages.

    Returns:
        Sums by weight name, not checked yet.

    Raises:
        ContributionError: If margins are missing, negative, or do not fit their weight.
    """
    if form is FisherForm.DENSE:
        return dict(parts)
    sums = {name: parts[name] for name in HEAD if name in parts}
    expected = set(sums)
    for name, weight in theta_0.items():
        if form is FisherForm.HEAD:
            sums[name] = torch.zeros(weight.shape)
            continue
        rows, columns = (
            _margin(parts.get(f"{name}{end}"), f"{name}{end}", length, owner)
            for end, length in zip((ROWS, COLUMNS), weight.shape, strict=True)
        )
        sums[name] = outer(rows, columns)
        expected |= {f"{name}{ROWS}", f"{name}{COLUMNS}"}
    if unknown := sorted(parts.keys() - expected):
        raise ContributionError(
            f"The Fisher of {owner} came {form}, with {unknown[0]!r} that does not belong there. "
            "Use the same `target-weights` and fedcompo version everywhere."
        )
    return sums


def _margin(margin: Tensor | None, name: str, length: int, owner: str) -> Tensor:
    """Check a received margin before it is expanded: its shape and signs."""
    shape = None if margin is None else tuple(margin.shape)
    if margin is None or shape != (length,) or not bool((margin >= 0).all()):
        raise ContributionError(
            f"The factored Fisher of {owner} has shape {shape} at {name!r}, expected ({length},), "
            "no value below zero. Use the same `target-weights` and fedcompo version everywhere."
        )
    return margin
