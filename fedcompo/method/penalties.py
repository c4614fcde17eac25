r"""Penalties that keep a task vector near the pre-trained weights, or near the others.

ITA's anchor is :math:`\tfrac{\alpha}{2}\,\tau^\top \bar F\,\tau`, with :math:`\bar F` the mean
Fisher of the *other* clients at :math:`\theta_0` (Porrello et al., arXiv 2405.16350, Eq.
11 and 12); IEL's penalty (Eq. 18 and 19) has a second term, linear in :math:`\tau`. Both are

.. math:: \tfrac a2\,\tau^\top \bar F\,\tau - \langle \bar F\,\tau, p\rangle

with a *pull* p, which is zero in ITA. A penalty acts in one of three ways:

- *coupled*: as a part of the loss, through the optimiser;
- *explicit*: beside the optimiser, by a gradient step :math:`q \leftarrow q - c\,\nabla_q` on the
  parameters q, with c the cosine schedule, as in the paper. It diverges if
  :math:`c\,a \max \bar F > 2`;
- *implicit*: beside the optimiser, by a proximal step, which cannot diverge. For small c the two
  steps agree.

Beside it, a *trust region* bounds :math:`\tfrac12\,\tau^\top \bar F\,\tau`. It does nothing to a
client that stays near, however long it trains, and brings back one that goes too far.

Every step changes ``deltas``, trainable changes by weight name, in place, and returns how far it
moved the task vector: a length, a scalar. ``fisher`` is the *mean* Fisher by weight name, each of
an (out, in); ``strength`` is a, α in ITA; ``schedule`` c, in (0, 1]; ``pull`` p, by weight name,
each (out, in), None: zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedcompo.method.deltas import IA3, Delta, Full, LoRA, Weights
from fedcompo.method.kronecker import Kronecker, Metric, applied, trace_of

GRADIENT_LIMIT = 100.0
"""Largest norm of the explicit step's gradient, as in the paper; a longer one is clipped to it."""

LEAST_CURVATURE = 2.0**-80
"""A smaller mean curvature holds no weight."""


def ita_penalty(tau: Weights, fisher: Metric, alpha: float) -> Tensor:
    r"""Anchor a task vector to theta_0: :math:`\tfrac{\alpha}{2}\,\tau^\top F\,\tau`.

    Args:
        tau: Task vector, dense; each entry (out, in).
        fisher: *Mean* Fisher at theta_0; has the keys of ``tau``.
        alpha: Strength of the anchor; 0 disables it.

    Returns:
        A scalar.
    """
    terms = [(applied(fisher[name], change) * change).sum() for name, change in tau.items()]
    return 0.5 * alpha * torch.stack(terms).sum()


def iel_penalty(
    tau: Weights, fisher: Metric, rest: Weights, *, share: float, beta: float
) -> Tensor:
    r"""Pull a task vector towards those that it is added up with (IEL).

    .. math:: \beta\left[\tfrac12 (1 - w)\,\tau^\top F\,\tau
              - \langle F\,\tau, R\rangle\right], \qquad R = \sum_{s \ne c} w_s \tau_s

    Up to a term without :math:`\tau` this is :math:`\beta\,\Omega / w`, with the gap :math:`\Omega`
    of Theorem 1 in the metric F. The division by w is the authors' scaling: T for equal shares.
    Only the sum over the others is needed, so the cost does not grow with their number.

    Args:
        tau: This client's task vector, dense; each entry (out, in).
        fisher: *Mean* Fisher at theta_0; has the keys of ``tau``.
        rest: R, same keys and shapes.
        share: w, the client's own coefficient. A client alone has 1: as in the paper, 1 - w is
            then replaced by 1/2, which is an anchor to theta_0.
        beta: Strength.

    Returns:
        A scalar.
    """
    strength, terms = own_strength(share), []
    for name, change in tau.items():
        towards = 0.5 * strength * change - rest[name]
        terms.append((applied(fisher[name], change) * towards).sum())
    return beta * torch.stack(terms).sum()


def own_strength(share: float) -> float:
    """Return the factor of the quadratic term of IEL's penalty: 1 - w, or 1/2 for w = 1."""
    return 1 - share if share < 1 else 0.5


def explicit_step(
    deltas: Mapping[str, Delta],
    fisher: Metric,
    strength: float,
    schedule: float,
    pull: Weights | None = None,
) -> Tensor:
    r"""Take a gradient step: :math:`q \leftarrow q-c\,\mathrm{clip}(\nabla_q)`."""
    parameters = [p for delta in deltas.values() for p in delta.parameters()]
    tau = {name: 1.0 * delta() for name, delta in deltas.items()}  # not the parameter itself
    penalty = ita_penalty(tau, fisher, strength)
    if pull is not None:
        linear = [
            (applied(fisher[name], change) * pull[name]).sum() for name, change in tau.items()
        ]
        penalty = penalty - torch.stack(linear).sum()
    gradients = torch.autograd.grad(penalty, parameters)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    clip = (GRADIENT_LIMIT / norm.clamp_min(1e-12)).clamp_max(1.0)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(schedule * clip * gradient)
        moves = [(delta() - tau[name]).norm() for name, delta in deltas.items()]
    length: Tensor = torch.stack(moves).norm()
    return length


@torch.no_grad()
def implicit_step(
    deltas: Mapping[str, Delta],
    fisher: Metric,
    strength: float,
    schedule: float,
    pull: Weights | None = None,
) -> Tensor:
    r"""Take a proximal step; without a pull it shrinks the change.

    .. math:: q \leftarrow \arg\min_{q'}\ \tfrac12\lVert q' - q\rVert^2 + c\left[
              \tfrac a2\,\tau(q')^\top \bar F\,\tau(q') - \langle\bar F\,\tau(q'), p\rangle\right]

    solved exactly for full and (IA)³; for a LoRA exactly in B with A fixed, then in A with B fixed.
    The schedule may be the sum of several, for one step in place of as many.
    """
    if strength == 0 and pull is None:
        return torch.zeros(())
    moves: list[Tensor] = []
    for name, delta in deltas.items():
        before, block = 1.0 * delta(), fisher[name]  # not the parameter itself
        g = applied(block, schedule * pull[name]) if pull is not None else None
        if isinstance(block, Kronecker):
            block.shrink(delta, schedule * strength, g)
        else:
            _shrink(delta, schedule * strength * block, g)
        moves.append((delta() - before).norm())
    length: Tensor = torch.stack(moves).norm()
    return length


@torch.no_grad()
def bounding_step(deltas: Mapping[str, Delta], fisher: Metric, limit: float) -> Tensor:
    r"""Shorten the change until :math:`\tfrac12\,\tau^\top \bar F\,\tau \le L`.

    A trust region: inside it nothing happens. Outside, :math:`\tau` becomes
    :math:`\tau\sqrt{L / \tfrac12\tau^\top\bar F\tau}`, in the metric :math:`\bar F` the nearest
    point of the region. The limit L is above 0.
    """
    tau = {name: 1.0 * delta() for name, delta in deltas.items()}
    energy = float(ita_penalty(tau, fisher, 1.0))
    if energy <= limit:
        return torch.zeros(())
    share = (0.999 * limit / energy) ** 0.5  # inside, whatever is rounded
    for delta in deltas.values():
        if isinstance(delta, Full):
            delta.delta.mul_(share)
        elif isinstance(delta, IA3):
            delta.l.sub_(1).mul_(share).add_(1)
        elif isinstance(delta, LoRA):
            delta.B.mul_(share)
    length = torch.stack([change.norm() for change in tau.values()]).norm().cpu()
    moved: Tensor = (1 - share) * length
    return moved


def one_folding(fisher: Metric) -> float:
    """Return the strength at which one step shrinks a weight of mean curvature by a half.

    0 for a Fisher that is zero everywhere, or so small that the strength would leave float32.
    """
    entries = sum(block.numel() for block in fisher.values())
    mean = sum(map(trace_of, fisher.values())) / entries
    return 1 / mean if mean > LEAST_CURVATURE else 0.0


def _shrink(delta: Delta, fisher: Tensor, pull: Tensor | None) -> None:
    """Take the proximal step of one weight; F is times strength and schedule, g is F p times it."""
    if isinstance(delta, Full):
        if pull is not None:
            delta.delta.add_(pull)
        delta.delta.div_(1 + fisher)
    elif isinstance(delta, IA3):
        curvature = (fisher * delta.weight.square()).sum(1, keepdim=True)
        delta.l.sub_(1)
        if pull is not None:
            delta.l.add_((pull * delta.weight).sum(1, keepdim=True))
        delta.l.div_(1 + curvature).add_(1)
    elif isinstance(delta, LoRA):
        delta.B.copy_(_shrink_rows(delta.B, delta.A, fisher, pull))
        columns = pull.T if pull is not None else None
        delta.A.copy_(_shrink_rows(delta.A.T, delta.B.T, fisher.T, columns).T)


def _shrink_rows(rows: Tensor, factor: Tensor, fisher: Tensor, pull: Tensor | None) -> Tensor:
    r"""Solve :math:`(I + A\,\mathrm{diag}(F_i)\,A^\top)\,b_i' = b_i + A\,g_i` for every row i.

    Args:
        rows: b, (count, rank).
        factor: A, (rank, width).
        fisher: F, (count, width), times strength and schedule.
        pull: g, (count, width); None: zero.

    Returns:
        b', (count, rank).
    """
    rank = len(factor)
    products = (factor.unsqueeze(1) * factor).reshape(rank * rank, -1)  # (rank², width)
    system = (fisher @ products.T).reshape(-1, rank, rank)  # (count, rank, rank)
    system.diagonal(dim1=1, dim2=2).add_(1)
    if pull is not None:
        rows = rows + pull @ factor.T
    solved: Tensor = torch.linalg.solve(system, rows)
    return solved
