r"""Estimates a client's Fisher diagonal: exact, by its leading directions, or by Monte Carlo.

With :math:`p = \mathrm{softmax}(W f + b)`, let :math:`A` be the matrix (classes, features) with the
rows :math:`\sqrt{p_c}\,(W_c - \sum_k p_k W_k)`. The Hessian of the cross-entropy in the features f
is :math:`A^\top A`, whatever the label. With :math:`J = \partial f/\partial\theta`, one example's
Fisher is :math:`J^\top A^\top A\,J`. Any vectors :math:`v_k` with
:math:`\sum_k v_k v_k^\top = A^\top A` (the *cotangents*) give its diagonal,
:math:`\sum_k (J^\top v_k)^2`, by one backward pass each, for all examples of a batch at once:

- *exact*: the scaled eigenvectors of :math:`A^\top A`; at most min(classes - 1, features) of them
  are not zero;
- *leading*: only the first r of these. The result is never above the exact one. One more pass, with
  random signs over the eigenvectors left out, measures what is missing;
- *Monte Carlo*: ``samples`` labels drawn from p.

Source: Porrello et al., ICLR 2025 (arXiv 2405.16350); Martens, *New Insights and Perspectives on
the Natural Gradient Method*, JMLR 2020, for the factorisation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedcompo.config.choices import FisherKind
from fedcompo.method.deltas import Weights
from fedcompo.method.fisher import HEAD, FisherDiagonal
from fedcompo.method.heads import Head
from fedcompo.training.per_example import (
    evaluation_mode,
    recorded,
    require_recorded,
    squared_gradients,
)


@dataclass(frozen=True)
class FisherReport:
    """Cost of an estimate, and what it left out."""

    passes: int = 0
    """Backward passes, over all batches."""
    batches: int = 0
    trace: float = 0.0
    """Sum of all entries of the estimate."""
    discarded_mass: float = 0.0
    """Share of the curvature that was left out, a mean over the examples."""
    error_bound: float | None = 0.0
    """Upper limit of the trace that was left out, as a sum: the estimate of one pass with random
    signs, plus three standard errors. None for Monte Carlo, which leaves no direction out."""


def estimate_fisher(
    model: nn.Module,
    head: Head,
    batches: Iterable[Tensor],
    names: Iterable[str],
    *,
    kind: FisherKind = FisherKind.LEADING,
    tolerance: float = 0.01,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[FisherDiagonal, FisherReport]:
    """Estimate the Fisher diagonal of some weights of a model, and of its head.

    Args:
        model: Maps images to features, (batch, features); used in evaluation mode.
        head: Turns features into logits.
        batches: Normalised images, (batch, channels, height, width), on the model's device, not
            shuffled and not augmented: the same data then gives the same Fisher.
        names: Weights of linear layers, as ``named_parameters`` calls them.
        kind: exact, leading or Monte Carlo.
        tolerance: For leading: share of the curvature that may be left out of each batch.
        samples: For Monte Carlo: number of labels drawn for each example.
        generator: Source of labels and signs, on the CPU.

    Returns:
        The *sum* over examples, and a report. Its keys: ``names``, and the head's two (``HEAD``).
    """
    names = sorted(names)
    generator = generator or torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    sums = {n: torch.zeros_like(parameters[n], dtype=torch.float64) for n in names}
    weight = head.weight.to(next(model.parameters()).device)
    head_sums = (
        torch.zeros_like(weight, dtype=torch.float64),
        torch.zeros_like(weight[:, 0], dtype=torch.float64),
    )
    count, bound, report = 0, 0.0, FisherReport()
    with evaluation_mode(model), recorded(model, names) as record:
        for images in batches:
            features = model(images)
            require_recorded(record, names)
            logits = head(features.detach())
            _add_head_fisher(head_sums, features.detach(), logits)
            kept, rest, share = (
                _cotangents(logits, weight, kind, tolerance, samples, generator)
                if names  # the head alone needs no backward pass
                else ([], None, 0.0)
            )
            for cotangent in kept:
                _add_squares(sums, record, features, cotangent)
            missing = _residual(record, features, rest, generator)
            bound += 0.0 if missing is None else _upper_limit(missing)
            report = replace(
                report,
                passes=report.passes + len(kept) + (missing is not None),
                batches=report.batches + 1,
                discarded_mass=report.discarded_mass + share * len(images),
            )
            count += len(images)
            record.clear()
    trace = float(sum(total.sum() for total in sums.values()))
    report = replace(
        report,
        trace=trace,
        discarded_mass=report.discarded_mass / max(1, count),
        error_bound=None if kind is FisherKind.MONTE_CARLO else bound,
    )
    everything = {**sums, **dict(zip(HEAD, head_sums, strict=True))}
    return FisherDiagonal(everything, count, head.classes), report


def _cotangents(
    logits: Tensor,
    head_weight: Tensor,
    kind: FisherKind,
    tolerance: float,
    samples: int,
    generator: torch.Generator,
) -> tuple[list[Tensor], Tensor | None, float]:
    """Return the cotangents to use, each (batch, features); those left out; their share."""
    if kind is FisherKind.MONTE_CARLO:
        p = logits.double().softmax(-1)
        drawn = torch.multinomial(p.cpu(), samples, replacement=True, generator=generator)
        onehot = nn.functional.one_hot(drawn.T, p.shape[-1]).to(p)  # (samples, batch, classes)
        return list((onehot - p) @ head_weight.double() / math.sqrt(samples)), None, 0.0
    cotangents, mass = curvature_factors(logits, head_weight)
    rank = leading_rank(mass, tolerance if kind is FisherKind.LEADING else 0.0)
    total = float(mass.sum())
    share = float(mass[:, rank:].sum()) / total if total > 0 else 0.0
    rest = cotangents[:, rank:] if kind is FisherKind.LEADING and share > 1e-12 else None
    return list(cotangents[:, :rank].unbind(1)), rest, share


def _add_head_fisher(head_sums: tuple[Tensor, Tensor], features: Tensor, logits: Tensor) -> None:
    """Add the head's Fisher diagonal: as it is linear, p(1 - p) times the squared features."""
    p = logits.double().softmax(-1)
    variance = p * (1 - p)
    head_sums[0].add_(variance.T @ features.double().square())
    head_sums[1].add_(variance.sum(0))


def _add_squares(
    sums: Weights, record: Mapping[str, tuple[Tensor, Tensor]], features: Tensor, cotangent: Tensor
) -> None:
    for name, _, squares in squared_gradients(record, features, cotangent):
        sums[name].add_(squares.sum(0))


def _residual(
    record: Mapping[str, tuple[Tensor, Tensor]],
    features: Tensor,
    rest: Tensor | None,
    generator: torch.Generator,
) -> Tensor | None:
    """Estimate each example's trace along the cotangents left out, (batch,), without bias."""
    if rest is None:
        return None
    signs = torch.randint(0, 2, rest.shape[:2], generator=generator).to(rest) * 2 - 1
    cotangent = (signs.unsqueeze(-1) * rest).sum(1)
    missing = rest.new_zeros(len(rest))
    for _, part, squares in squared_gradients(record, features, cotangent):
        missing[part] += squares.sum((1, 2))
    return missing


def _upper_limit(missing: Tensor) -> float:
    """Add three standard errors to the sum; an example's estimate has variance ≤ 2·mean²."""
    return float(missing.sum() + 3 * math.sqrt(2) * missing.square().sum().sqrt())


@torch.no_grad()
def curvature_factors(logits: Tensor, head_weight: Tensor) -> tuple[Tensor, Tensor]:
    r"""Factor each example's Hessian in the features, :math:`A^\top A`.

    Args:
        logits: (batch, classes).
        head_weight: W, (classes, features).

    Returns:
        Cotangents :math:`v_k`, (batch, k, features), the longest first, and their squared norms,
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
    """Return the smallest r that leaves out at most a share of a batch's curvature.

    Args:
        mass: Squared norms of the cotangents, (batch, k), the largest first.
        tolerance: That share, in [0, 1); 0 leaves out only zeros.
    """
    per_rank = mass.sum(0)
    total = float(per_rank.sum())
    if total <= 0:
        return 0
    left_out = total - per_rank.cumsum(0)
    threshold = max(tolerance, 1e-12) * total
    return int((left_out > threshold).sum()) + 1
