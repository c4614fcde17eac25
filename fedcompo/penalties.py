r"""What keeps a task vector near the pre-trained weights.

ITA's anchor is :math:`\tfrac{\alpha}{2}\,\tau^\top \bar F\,\tau`, with :math:`\bar F` the mean
Fisher diagonal of the *other* clients at :math:`\theta_0` (Porrello et al., arXiv 2405.16350, Eq.
11 and 12). It acts in one of three ways:

- *coupled*: it is part of the loss, and the optimiser sees its gradient;
- *explicit*: beside the optimiser, :math:`p \leftarrow p - c\,\nabla_p`, as the paper does it, with
  c the cosine schedule. It diverges as soon as :math:`c\,\alpha \max \bar F > 2`;
- *implicit*: the proximal step with the same limit for small c, which cannot diverge.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedcompo.deltas import IA3, Delta, Full, LoRA, Weights

GRADIENT_LIMIT = 100.0
"""Norm to which the paper clips the explicit step's gradient."""


def ita_penalty(tau: Weights, fisher: Weights, alpha: float) -> Tensor:
    r"""Anchor a task vector to the weights it left: :math:`\tfrac{\alpha}{2}\,\tau^\top F\,\tau`.

    Args:
        tau: Task vector, dense; each entry (out, in).
        fisher: *Mean* Fisher diagonal at theta_0; has the keys of ``tau``, same shapes.
        alpha: Strength of the anchor. 0 disables it.

    Returns:
        A scalar.
    """
    terms = [(fisher[name] * change.square()).sum() for name, change in tau.items()]
    return 0.5 * alpha * torch.stack(terms).sum()


def head_penalty(
    change: Tensor, fisher: Tensor, *, fisher_strength: float, plain_strength: float
) -> Tensor:
    r"""Anchor a head to the aligned one: :math:`a\sum F\odot\delta^2 + b\,\lVert\delta\rVert^2`.

    Args:
        change: :math:`\delta`, the head minus the aligned head; any shape.
        fisher: *Mean* Fisher diagonal of the head; same shape.
        fisher_strength: a.
        plain_strength: b.
    """
    squared = change.square()
    return fisher_strength * (fisher * squared).sum() + plain_strength * squared.sum()


def explicit_step(
    deltas: Mapping[str, Delta], fisher: Weights, alpha: float, schedule: float
) -> None:
    r"""Step down the anchor's gradient, in place: :math:`p \leftarrow p-c\,\mathrm{clip}(\nabla)`.

    Args:
        deltas: Trainable changes by weight name.
        fisher: *Mean* Fisher diagonal, by weight name.
        alpha: Strength of the anchor.
        schedule: c in (0, 1].
    """
    parameters = [p for delta in deltas.values() for p in delta.parameters()]
    tau = {name: delta() for name, delta in deltas.items()}
    gradients = torch.autograd.grad(ita_penalty(tau, fisher, alpha), parameters)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    clip = (GRADIENT_LIMIT / norm.clamp_min(1e-12)).clamp_max(1.0)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(schedule * clip * gradient)


@torch.no_grad()
def implicit_step(
    deltas: Mapping[str, Delta], fisher: Weights, alpha: float, schedule: float
) -> None:
    r"""Take the anchor's proximal step, in place: it shrinks, whatever the strength.

    .. math:: p \leftarrow \arg\min_q\ \tfrac12\lVert q - p\rVert^2
              + c\,\tfrac{\alpha}{2}\,\tau(q)^\top \bar F\,\tau(q)

    solved exactly for full and (IA)³; for a LoRA exactly in B with A fixed, then in A with B fixed.

    Args:
        deltas: Trainable changes by weight name.
        fisher: *Mean* Fisher diagonal, by weight name.
        alpha: Strength of the anchor.
        schedule: c in (0, 1]; the sum of several, to make up for as many steps at once.
    """
    strength = alpha * schedule
    if strength == 0:
        return
    for name, delta in deltas.items():
        f = fisher[name]
        if isinstance(delta, Full):
            delta.delta.div_(1 + strength * f)
        elif isinstance(delta, IA3):
            curvature = (f * delta.weight.square()).sum(1, keepdim=True)
            delta.l.sub_(1).div_(1 + strength * curvature).add_(1)
        elif isinstance(delta, LoRA):
            delta.B.copy_(_shrink_rows(delta.B, delta.A, strength * f))
            delta.A.copy_(_shrink_rows(delta.A.T, delta.B.T, strength * f.T).T)


def _shrink_rows(rows: Tensor, factor: Tensor, fisher: Tensor) -> Tensor:
    r"""Solve :math:`(I + A\,\mathrm{diag}(F_i)\,A^\top)\,b_i' = b_i` for every row i.

    Args:
        rows: b, (count, rank).
        factor: A, (rank, width).
        fisher: F, (count, width), times the strength.

    Returns:
        b', (count, rank).
    """
    rank = len(factor)
    products = (factor.unsqueeze(1) * factor).reshape(rank * rank, -1)  # (rank², width)
    system = (fisher @ products.T).reshape(-1, rank, rank)  # (count, rank, rank)
    system.diagonal(dim1=1, dim2=2).add_(1)
    solved: Tensor = torch.linalg.solve(system, rows)
    return solved
