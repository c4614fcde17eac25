"""Singular vectors of changes, up to the rank that the grid can tell from rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcompo.composition.fixed_point import GRID

WIDTH = 64
"""Directions that are tried first; twice as many next."""
EPS = torch.finfo(torch.float64).eps


def numerical_svd(change: Tensor, times: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    r"""Decompose a change into its singular vectors, without those that are rounding alone.

    A LoRA of rank r is a matrix of rank r whose entries were rounded to the grid. That adds all
    other singular vectors, with singular values below

    .. math:: \lVert E \rVert_F \le 2^{-40}\,M\,\sqrt{\mathrm{out} \cdot \mathrm{in}}

    A change of small rank is first projected to few random directions that hold all of it but for
    less than this (Halko et al., SIAM Review 2011, arXiv 0909.4061), which is checked; the
    decomposition is then as exact, and many times faster.

    Args:
        change: (out, in), float64, on the grid.
        times: M, how many rounded members were added up.

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
    least = max(noise, EPS * max(change.shape) * float(values[0])) if len(values) else 0.0
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
    return u[:, :rank] @ vh[:rank]
