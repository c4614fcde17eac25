r"""The Fisher diagonal at :math:`\theta_0`: how much each weight matters to what the model says.

.. math:: F = \sum_x \sum_c p_c(x) \left(\frac{\partial \log p_c(x)}{\partial\theta}\right)^2,
   \qquad p = \mathrm{softmax}(W f(x; \theta) + b)

With :math:`A(x)^\top A(x)` the softmax curvature as the features see it
(:mod:`fedcompo.curvature`), one example's Fisher is :math:`J^\top A^\top A\,J` with
:math:`J = \partial f/\partial\theta`. Any vectors :math:`v_k` with
:math:`\sum_k v_k v_k^\top = A^\top A` give its diagonal, :math:`\sum_k (J^\top v_k)^2`, by one
backward pass each, all examples of a batch at once:

- *exact*: the scaled eigenvectors of :math:`A^\top A`, at most min(classes - 1, features) of them;
- *leading*: only the first r of these. The result is never above the exact one, and what is
  missing is measured by one more pass with random signs over the eigenvectors left out;
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
from fedcompo.curvature import curvature_factors, leading_rank
from fedcompo.errors import ContributionError
from fedcompo.method.deltas import Weights
from fedcompo.method.heads import Head
from fedcompo.training.per_example import (
    evaluation_mode,
    recorded,
    require_recorded,
    squared_gradients,
)

HEAD = ("head.weight", "head.bias")
"""Names of the head's entries; their rows belong to classes."""


@dataclass(frozen=True)
class FisherDiagonal:
    """A *sum* over examples, and their count: what can be added can be taken away again.

    The head's rows are known by class name. Parties whose heads have other classes can be summed:
    the sum has a row for every class of either.
    """

    sums: Mapping[str, Tensor]
    """Sum over examples, by weight name; each of its weight's shape."""
    num_examples: int
    """Examples in the sum."""
    classes: tuple[str, ...] = ()
    """Class of each of the head's rows."""

    def __post_init__(self) -> None:
        """Refuse head rows that do not belong to one class each."""
        rows = {len(self.sums[name]) for name in HEAD if name in self.sums}
        if rows - {len(self.classes)} or len(set(self.classes)) < len(self.classes):
            raise ContributionError(
                f"The head of a Fisher diagonal has {max(rows, default=0)} rows for the classes "
                f"{self.classes}; expected one a class, each class named once."
            )

    def check(self, theta_0: Mapping[str, Tensor], *, num_features: int, owner: str) -> None:
        """Refuse sums that cannot anchor anyone.

        Args:
            theta_0: The target weights, by name; only their shapes matter.
            num_features: Width of the head's rows.
            owner: Whose sums these are, for the error message.

        Raises:
            ContributionError: If names or shapes are not those of the target weights and the head,
                a value is negative or not finite, or they sum over no example.
        """
        rows = len(self.classes)
        expected = {name: tuple(weight.shape) for name, weight in theta_0.items()}
        expected |= {"head.weight": (rows, num_features), "head.bias": (rows,)}
        for name in sorted(expected.keys() | self.sums.keys()):
            total = self.sums.get(name)
            found = None if total is None else tuple(total.shape)
            if total is None or found != expected.get(name):
                raise ContributionError(
                    f"The Fisher of {owner} has shape {found} at {name!r}, expected "
                    f"{expected.get(name)}. Use the same `target-weights` everywhere."
                )
            if not torch.isfinite(total).all() or (total < 0).any():
                raise ContributionError(
                    f"The Fisher of {owner} has values at {name!r} that are negative or not finite."
                )
        if self.num_examples < 1:
            raise ContributionError(f"The Fisher of {owner} sums over no example.")

    def for_classes(self, classes: Iterable[str]) -> FisherDiagonal:
        """Give the head the rows of these classes, in this order; zeros for one it did not have."""
        classes = tuple(classes)
        places = {name: row for row, name in enumerate(self.classes)}
        known = [row for row, name in enumerate(classes) if name in places]
        own = [places[classes[row]] for row in known]
        sums = dict(self.sums)
        for name in self.sums.keys() & set(HEAD):
            sums[name] = self.sums[name].new_zeros(len(classes), *self.sums[name].shape[1:])
            sums[name][known] = self.sums[name][own]
        return FisherDiagonal(sums, self.num_examples, classes)

    def __add__(self, other: FisherDiagonal) -> FisherDiagonal:
        """Pool two sets of examples, over the classes of either, sorted; computed in float64."""
        classes = tuple(sorted({*self.classes, *other.classes}))
        mine, theirs = self.for_classes(classes), other.for_classes(classes)
        mine._check_alike(theirs)
        sums = {name: mine.sums[name].double() + theirs.sums[name].double() for name in mine.sums}
        return FisherDiagonal(sums, self.num_examples + other.num_examples, classes)

    def __sub__(self, other: FisherDiagonal) -> FisherDiagonal:
        """Take a set of examples out; computed in float64, rounding never leaves it below zero."""
        if unknown := sorted(set(other.classes) - set(self.classes)):
            raise ContributionError(
                f"Cannot take out examples under a head with the class {unknown[0]!r}: the sum has "
                f"the classes {self.classes}."
            )
        other = other.for_classes(self.classes)
        self._check_alike(other)
        if other.num_examples > self.num_examples:
            raise ContributionError(
                f"Cannot take {other.num_examples} examples out of {self.num_examples}."
            )
        sums = {
            name: (self.sums[name].double() - other.sums[name].double()).clamp_min(0)
            for name in self.sums
        }
        return FisherDiagonal(sums, self.num_examples - other.num_examples, self.classes)

    def mean(self) -> Weights:
        """Mean over examples, float32; zeros where there are none."""
        count = max(1, self.num_examples)
        return {name: (total.double() / count).float() for name, total in self.sums.items()}

    def mean_trace(self) -> float:
        """Mean trace an example, without the head: how firmly it holds the backbone in all."""
        total = sum(float(t.double().sum()) for name, t in self.sums.items() if name not in HEAD)
        return total / max(1, self.num_examples)

    def _check_alike(self, other: FisherDiagonal) -> None:
        differing = {
            name
            for name in self.sums.keys() | other.sums.keys()
            if name not in self.sums
            or name not in other.sums
            or self.sums[name].shape != other.sums[name].shape
        }
        if differing:
            raise ContributionError(
                f"Two Fisher diagonals differ in {len(differing)} weights, among them "
                f"{min(differing)!r}; they must have the same names and shapes."
            )


@dataclass(frozen=True)
class FisherReport:
    """What an estimate cost and what it left out."""

    passes: int = 0
    """Backward passes, over all batches."""
    batches: int = 0
    trace: float = 0.0
    """Sum of all entries of the estimate."""
    discarded_mass: float = 0.0
    """Share of the softmax curvature, seen through the head, that was left out."""
    error_bound: float | None = 0.0
    """Upper limit of the trace that was left out, as a sum: three standard errors above the
    estimate of one pass with random signs. None where nothing is left out on purpose (Monte Carlo).
    """


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
        batches: Normalised images, (batch, channels, height, width), on the model's device; neither
            shuffled nor augmented, so that the same data gives the same Fisher.
        names: Weights of linear layers, as ``named_parameters`` calls them.
        kind: exact, leading or Monte Carlo.
        tolerance: leading: share of the curvature that may be left out, batch by batch.
        samples: Monte Carlo: labels drawn an example.
        generator: Source of labels and signs, on the CPU.

    Returns:
        The *sum* over examples (keys: ``names``, ``head.weight``, ``head.bias``), and a report.
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
                if names  # of the head alone, it takes no backward pass
                else ([], None, 0.0)
            )
            for cotangent in kept:
                _add_squares(sums, record, features, cotangent)
            missing = _residual(record, features, rest, generator)
            bound += 0.0 if missing is None else _upper(missing)
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
    """Return the cotangents to use, each (batch, features), those left out, and their share."""
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
    """The head is linear: its Fisher diagonal is p(1 - p) times the squared features."""
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
    """Unbiased estimate, (batch,), of each example's trace along the cotangents left out."""
    if rest is None:
        return None
    signs = torch.randint(0, 2, rest.shape[:2], generator=generator).to(rest) * 2 - 1
    cotangent = (signs.unsqueeze(-1) * rest).sum(1)
    missing = rest.new_zeros(len(rest))
    for _, part, squares in squared_gradients(record, features, cotangent):
        missing[part] += squares.sum((1, 2))
    return missing


def _upper(missing: Tensor) -> float:
    """Three standard errors above the sum; each example's estimate has variance ≤ 2·mean²."""
    return float(missing.sum() + 3 * math.sqrt(2) * missing.square().sum().sqrt())
