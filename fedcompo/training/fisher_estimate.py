r"""Estimates a client's Fisher diagonal: of the features, or of the class probabilities.

With :math:`J = \partial f/\partial\theta` the Jacobian of one example's features, its Fisher is the
diagonal of :math:`J^\top H\,J`. Any vectors :math:`v_k` with :math:`\sum_k v_k v_k^\top = H` (the
*cotangents*), or :math:`\mathbb E[v v^\top] = H`, give it as :math:`\sum_k (J^\top v_k)^2`, by one
backward pass each, for all examples of a batch at once:

- *features*: H is the identity, and v = z is drawn from :math:`\mathcal N(0, I)`: one pass,
  whatever the number of classes. It needs no label and no head;
- *exact*: H is the Hessian of the cross-entropy in the features, under a head (W, b). With
  :math:`p = \mathrm{softmax}(W f + b)` it is :math:`A^\top A`, where A (classes, features) has the
  rows :math:`\sqrt{p_c}\,(W_c - \sum_k p_k W_k)`; the :math:`v_k` are its scaled eigenvectors, of
  which at most min(classes - 1, features) are not zero;
- *Monte Carlo*: the same H, by ``samples`` labels drawn from p.

Sources: Porrello et al., ICLR 2025 (arXiv 2405.16350); Martens, *New Insights and Perspectives on
the Natural Gradient Method*, JMLR 2020, for the factorisation; Hutchinson 1990 for random
directions.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor, nn

from fedcompo.config.choices import Curvature, FisherForm
from fedcompo.method.deltas import Weights
from fedcompo.method.fisher import ENDS, INPUTS, FisherDiagonal, outer
from fedcompo.method.heads import Head
from fedcompo.training.per_example import (
    evaluation_mode,
    gradient_products,
    recorded,
    require_own_rows,
    require_recorded,
    squared_gradients,
    squared_margins,
)


@dataclass(frozen=True)
class FisherReport:
    """Cost and size of an estimate."""

    passes: int
    """Backward passes, over all batches."""
    batches: int
    trace: float
    """Sum of all entries of the estimate."""
    form_error: float = 0.0
    """Factored: how far the dense form of the batches that were compared is from theirs, in lengths
    of it."""


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Tensor],
    names: Iterable[str],
    *,
    head: Head | None = None,
    curvature: Curvature = Curvature.FEATURES,
    samples: int = 1,
    generator: torch.Generator | None = None,
    form: FisherForm = FisherForm.DENSE,
    compare: int = 1,
    seen: list[Tensor] | None = None,
) -> tuple[FisherDiagonal, FisherReport]:
    """Estimate the Fisher of some weights of a model.

    Args:
        model: Maps images to features, (batch, features); used in evaluation mode.
        batches: Normalised images, (batch, channels, height, width), on the model's device, not
            shuffled and not augmented: the same data then gives the same Fisher.
        names: Weights of linear layers, as ``named_parameters`` calls them.
        head: Turns features into logits; needed unless it is the Fisher of the features.
        curvature: Of what.
        samples: For Monte Carlo: number of labels drawn for each example.
        generator: Source of directions and labels, on the CPU.
        form: Dense, factored or Kronecker.
        compare: Factored: every so many batches the dense form is computed too, to compare.
        seen: Gets the features of each batch, on the CPU.

    Returns:
        The *sum* over examples, float64, Kronecker factors as matrices, with the squares of the
        layers' inputs; and a report.

    Raises:
        BackboneError: If examples cannot be told apart at a layer.
    """
    names = sorted(names)
    generator = generator or torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    sums: Weights = {}
    device = next(iter(parameters.values())).device
    zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
    inputs = {name + INPUTS: zeros(parameters[name].shape[1]) for name in names}
    dense = {} if form is FisherForm.KRONECKER else {n: zeros(parameters[n].shape) for n in names}
    for name, (axis, end) in itertools.product(names, enumerate(ENDS.get(form, ()))):
        size = parameters[name].shape[axis]
        sums[name + end] = zeros((size, size) if form is FisherForm.KRONECKER else size)
    count = passes = done = 0
    with evaluation_mode(model), recorded(model, names) as record:
        for images in batches:
            if not done:
                require_own_rows(model, images, names, record)
            features = model(images)
            if seen is not None:
                seen.append(features.detach().float().cpu())
            require_recorded(record, names)
            for name, (given, _) in record.items():
                squares = given.square().reshape(len(images), -1, given.shape[-1])
                inputs[name + INPUTS].add_(squares.sum(1).sum(0, dtype=torch.float64))
            if curvature is Curvature.FEATURES:
                cotangents = [directions(features, generator)]
            else:
                cotangents = softmax_cotangents(features, head, curvature, samples, generator)
            for cotangent in cotangents:
                if form is FisherForm.KRONECKER or (sums and done % compare):
                    both = gradient_products if form is FisherForm.KRONECKER else squared_margins
                    for name, *found in both(record, features, cotangent):
                        for end, part in zip(ENDS[form], found, strict=True):
                            sums[name + end].add_(part)
                    continue
                squared = squared_gradients(record, features, cotangent)
                for name, parts in itertools.groupby(squared, itemgetter(0)):
                    dense[name].add_(sum(squares.sum(0) for _, _, squares in parts))
            passes, done, count = passes + len(cotangents), done + 1, count + len(images)
            record.clear()
    off = length = 0.0
    if form is FisherForm.FACTORED:
        for name, total in dense.items():
            own = total.sum(1), total.sum(0)
            off += float((total - outer(*own)).square().sum())
            length += float(total.square().sum())
            for end, part in zip(ENDS[form], own, strict=True):
                sums[name + end].add_(part)
    fisher = FisherDiagonal(sums or dense, count, inputs)
    error = math.sqrt(off / length) if length else 0.0
    return fisher, FisherReport(passes, done, fisher.mean_trace() * count, error)


def directions(features: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one random direction for each example, standard normal; as features, (batch, d)."""
    drawn = torch.randn(features.shape, generator=generator, dtype=torch.float64)
    return drawn.to(features)


@torch.no_grad()
def softmax_cotangents(
    features: Tensor,
    head: Head | None,
    curvature: Curvature,
    samples: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """Return the cotangents for class probabilities, each (batch, d), without those of zeros.

    Args:
        features: (batch, d).
        head: Turns features into logits.
        curvature: Exact or Monte Carlo.
        samples: For Monte Carlo.
        generator: For Monte Carlo.

    Raises:
        ValueError: If there is no head.
    """
    if head is None:
        raise ValueError(f"The Fisher of `curvature = {curvature}` needs a head, got none.")
    logits, weight = head(features), head.weight.to(features)
    if curvature is Curvature.MONTE_CARLO:
        p = logits.double().softmax(-1)
        drawn = torch.multinomial(p.cpu(), samples, replacement=True, generator=generator)
        onehot = nn.functional.one_hot(drawn.T, p.shape[-1]).to(p)  # (samples, batch, classes)
        return list((onehot - p) @ weight.double() / math.sqrt(samples))
    cotangents, mass = curvature_factors(logits, weight)
    by_rank = mass.sum(0)
    return list(cotangents[:, by_rank > 1e-12 * by_rank.sum()].unbind(1))


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
