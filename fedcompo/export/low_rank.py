r"""The composed change of one weight as two thin factors, :math:`BA`.

The change :math:`\sum_c k_c B_c A_c` of LoRA clients is a product as it stands,

.. math:: B = [k_1 B_1, \dots, k_T B_T], \qquad A = [A_1; \dots; A_T],

of rank :math:`\sum_c r_c`. Cut to a smaller rank R, it keeps its R largest singular values: no
matrix of that rank is nearer in Frobenius' norm. What the cut leaves out is known from the others.
Each singular value is shared equally: its root goes into either factor.
Source: Eckart and Young, *The Approximation of One Matrix by Another of Lower Rank*, Psychometrika
1936.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Product:
    """A change of one weight as a product, and how far it is from the change that was asked for."""

    b: Tensor
    """(out, rank), float64."""
    a: Tensor
    """(rank, in), float64."""
    squared_norm: float
    """Of the change that was asked for; Frobenius."""
    squared_error: float = 0.0
    """Of the difference; Frobenius."""


def joined(terms: Sequence[tuple[float, Tensor, Tensor]], rank: int) -> Product:
    r"""Join the factors of several clients, and cut the product where its rank is to be smaller.

    The dense change is never made: QR decompositions of the joined factors leave a matrix of
    :math:`\sum_c r_c` rows and columns at most.

    Args:
        terms: By client :math:`k_c`, :math:`B_c` (out, r_c) and :math:`A_c` (r_c, in).
        rank: Largest rank; at most min(out, in).

    Returns:
        The product; its rank is :math:`\min(R, \sum_c r_c)`.
    """
    b = torch.cat([k * own.double() for k, own, _ in terms], 1)
    a = torch.cat([own.double() for _, _, own in terms])
    if len(a) <= rank:
        return Product(b, a, float(((b.T @ b) * (a @ a.T)).sum()))
    left, upper = torch.linalg.qr(b)  # (out, s), (s, sum of ranks)
    right, lower = torch.linalg.qr(a.T)
    core = cut(upper @ lower.T, rank)
    return replace(core, b=left @ core.b, a=core.a @ right.T)


def cut(change: Tensor, rank: int) -> Product:
    """Return the nearest product of a rank to a dense change, (out, in), float64."""
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    kept, lost = values[:rank], values[rank:]
    return Product(
        b=left[:, :rank] * kept.sqrt(),
        a=kept.sqrt().unsqueeze(1) * right[:rank],
        squared_norm=float(values.square().sum()),
        squared_error=float(lost.square().sum()),
    )
