"""Singular vectors of changes, up to the rank that can be told from rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcompo.composition.fixed_point import GRID

WIDTH = 64
"""Directions that are tried first; twice as many next."""
EPS = torch.finfo(torch.float64).eps


def numerical_svd(
    change: Tensor, weight: Tensor, times: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Decompose a change into its singular vectors, without those that nobody could see.

    Left out are singular values below the larger of

    .. math:: 2^{-40}\,M\,\sqrt{\mathrm{out} \cdot \mathrm{in}}, \qquad
       2^{-24}\,M\,\lVert\theta_0\rVert_F

    The first is what rounding to the grid adds to a LoRA's sum, whose rank is small; the second
    what rounding a fine-tuned model to float32 adds to the change that is read from it. A rule
    that enlarges small directions would enlarge these.

    A change of small rank is first projected to a few random directions that hold all of it but
    for less than the first bound (Halko et al., SIAM Review 2011, arXiv 0909.4061), which is
    checked; that is many times faster.

    Args:
        change: (out, in), float64, on the grid.
        weight: :math:`\theta_0`, of as many values.
        times: M, how often the members that were added up count.

    Returns:
        U (out, rank), the singular values (rank,) in descending order, and Vᵀ (rank, in).
    """
    noise = GRID * times * change.numel() ** 0.5
    width, basis, small = WIDTH, None, change
    while 2 * width <= min(change.shape):
        draws = torch.Generator().manual_seed(width)
        directions = torch.randn(change.shape[1], width, generator=draws, dtype=torch.float64)
        tried = torch.linalg.qr(change @ directions).Q  # (out, width)
        inside = tried.T @ change  # (width, in)
        if torch.addmm(change, tried, inside, alpha=-1).norm() <= noise:
            basis, small = tried, inside
            break
        width *= 2
    u, values, vh = torch.linalg.svd(small, full_matrices=False)
    seen = 2.0**-24 * times * float(weight.double().norm())
    least = max(noise, seen, EPS * max(change.shape) * float(values[0]))
    rank = int((values > least).sum())
    u = u[:, :rank] if basis is None else basis @ u[:, :rank]
    return u, values[:rank], vh[:rank]


def nearest_isometry(vectors: Tensor) -> Tensor:
    r"""Make vectors orthonormal, moving them least: :math:`X (X^\top X)^{+1/2}`.

    The solution of the orthogonal Procrustes problem (Schönemann, Psychometrika 1966). Vectors that
    depend on each other share their direction.

    Args:
        vectors: X, (length, count).
    """
    if not vectors.numel():
        return vectors
    u, values, vh = torch.linalg.svd(vectors, full_matrices=False)
    rank = int((values > EPS * max(vectors.shape) * values[0]).sum())
    nearest: Tensor = u[:, :rank] @ vh[:rank]
    return nearest
