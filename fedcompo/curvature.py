r"""The softmax curvature as the features see it, in directions that can be taken one by one.

With :math:`p = \mathrm{softmax}(W f + b)` and :math:`A` the classes × features matrix of rows
:math:`\sqrt{p_c}\,(W_c - \sum_k p_k W_k)`, the Hessian of the cross-entropy in the features f is
:math:`A^\top A`, for every label. Its scaled eigenvectors :math:`v_k` are the *cotangents*:
:math:`\sum_k v_k v_k^\top = A^\top A`, at most min(classes - 1, features) of them not zero.

Source: Martens, *New Insights and Perspectives on the Natural Gradient Method*, JMLR 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def curvature_factors(logits: Tensor, head_weight: Tensor) -> tuple[Tensor, Tensor]:
    r"""Factor each example's softmax Hessian as the features see it: :math:`A^\top A`.

    Args:
        logits: (batch, classes).
        head_weight: W, (classes, features).

    Returns:
        Cotangents :math:`v_k`, (batch, k, features), by falling norm, and their squared norms,
        (batch, k), with k = min(classes, features).
    """
    p = logits.double().softmax(-1)
    weight = head_weight.double()
    centred = weight - (p @ weight).unsqueeze(1)  # (batch, classes, features)
    a = p.sqrt().unsqueeze(-1) * centred
    if a.shape[1] <= a.shape[2]:
        mass, u = torch.linalg.eigh(a @ a.mT)
        cotangents = u.mT @ a
    else:
        mass, v = torch.linalg.eigh(a.mT @ a)
        cotangents = mass.clamp_min(0).sqrt().unsqueeze(-1) * v.mT
    return cotangents.flip(1), mass.flip(1).clamp_min(0)


def leading_rank(mass: Tensor, tolerance: float) -> int:
    """Smallest r that leaves out at most ``tolerance`` of a batch's curvature.

    Args:
        mass: Squared norms of the cotangents, (batch, k), falling.
        tolerance: Share in [0, 1); 0 keeps all that is not zero.
    """
    per_rank = mass.sum(0)
    total = float(per_rank.sum())
    if total <= 0:
        return 0
    left_out = total - per_rank.cumsum(0)
    threshold = max(tolerance, 1e-12) * total
    return int((left_out > threshold).sum()) + 1
