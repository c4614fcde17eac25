r"""Statistics that stand for images which nobody has: made of a classifier's rows.

A joint head is a linear discriminant. Of means :math:`\mu_k` and a covariance S it has the rows
:math:`S^{-1}\mu_k` and biases :math:`-\tfrac12\,\mu_k^\top S^{-1}\mu_k`. Here it is solved the
other way round. Given a classifier's rows :math:`W_k, b_k`, seek means

.. math:: \mu_k = S\,(a\,W_k + v)

whose discriminant decides as the classifier does. One vector v and one factor a > 0 for all classes
change no decision, if only the biases agree up to a constant c:

.. math:: W_k^\top S\,v + c = -b_k - \tfrac{a}{2}\,W_k^\top S\,W_k \quad\text{for every } k

These are K linear equations in v and c. Of all solutions, the one is taken whose means lie nearest,
in the metric of :math:`S^{-1}`, to the mean of all features. If even these lie farther from it than
the classes lie from each other, they would outdo the others' classes on the others' images: then
the equations hold only as well as they can at that distance (a ridge), and the decisions are nearly
the classifier's. With more classes than features there is no solution in general; towards that
number, v grows without bounds; hence :data:`SHARE`.

S is the covariance of the clients who are there, so that their own rows of the joint head stay as
they are; a makes the classes as far apart as theirs. Where nobody is there, S and the mean are
those of a layer normalisation's output, and a is 1.

The classifier was trained on the features of its own fine-tuned model. That they are those of the
pre-trained one is an assumption, as is S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedcompo.errors import ContributionError
from fedcompo.method.heads import Head, covariance
from fedcompo.method.statistics import FeatureSums, off_grid, packed

SHARE = 0.5
"""Most classes, as a share of the features. Of 192 features, ImageNet's first classifier as DeiT
has it: means are 1.5 times as long as real ones with 100 classes, 11 times with 190."""


@dataclass(frozen=True)
class Assumed:
    """What is assumed of the features."""

    mean: Tensor
    """Of all features, (features,), float64."""
    within: Tensor
    """Covariance in classes, positive definite, (features, features), float64."""
    apart: float | None
    """Mean squared distance of a class to the mean, in the metric of S⁻¹; None: not known."""

    @classmethod
    def of(cls, total: FeatureSums, *, shrinkage: float) -> Assumed:
        """Of those who are there; each class counts alike."""
        means = off_grid(total.sums) / total.counts.double().unsqueeze(1)
        mean = means.mean(0)
        shared = covariance(total, shrinkage=shrinkage)
        around = means - mean
        apart = float((around.T * torch.linalg.solve(shared, around.T)).sum(0).mean())
        known = apart if len(means) > 1 and apart > 0 else None
        return cls(mean, covariance(total, shrinkage=0.0), known)

    @classmethod
    def of_norm(cls, model: nn.Module, num_features: int) -> Assumed:
        """Of the output of a model's last layer normalisation, γ ⊙ z + β with z of unit variance.

        Without such a layer: of unit variance, and mean 0.
        """
        layers = (getattr(model, name, None) for name in ("fc_norm", "norm"))
        last = next((own for own in layers if isinstance(own, nn.LayerNorm)), None)
        scale = torch.ones(num_features) if last is None or last.weight is None else last.weight
        shift = torch.zeros(num_features) if last is None or last.bias is None else last.bias
        variance = scale.detach().double().cpu().square().clamp_min(1e-6)
        return cls(shift.detach().double().cpu(), torch.diag(variance), None)


def stand_in(head: Head, assumed: Assumed, *, shrinkage: float, images: int) -> FeatureSums:
    """Make sums whose discriminant decides as a classifier does.

    Args:
        head: The classifier; classes sorted.
        assumed: What is assumed of the features.
        shrinkage: Of the joint head that will be made of the sums.
        images: Images that each class counts as, at least 2.

    Returns:
        Sums with the assumed covariance in classes.

    Raises:
        ContributionError: If there are too many classes.
    """
    most = int(SHARE * head.weight.shape[1])
    if len(head.classes) > most:
        raise ContributionError(
            f"The classifier has {len(head.classes)} classes, and of {head.weight.shape[1]} "
            f"features the statistics of at most {most} can be made of its rows alone. Name a "
            "folder of images in `--data`."
        )
    weight, bias = head.weight.double(), head.bias.double()
    level = float(assumed.within.trace()) / len(assumed.within)
    shared = (1 - shrinkage) * assumed.within
    shared.diagonal().add_(shrinkage * level)
    spread = weight - weight.mean(0)  # (classes, features)
    gram = spread @ shared @ spread.T
    own = float(gram.diagonal().mean())
    a = (assumed.apart / own) ** 0.5 if assumed.apart and own > 0 else 1.0
    first = torch.linalg.solve(shared, assumed.mean) - a * weight.mean(0)
    wanted = -bias - 0.5 * a * ((weight @ shared) * weight).sum(1) - weight @ shared @ first
    nearest = _nearest(gram, wanted - wanted.mean(), a**2 * own)
    means = (a * weight + first + spread.T @ nearest) @ shared
    count, size = images * len(means), len(head.classes)
    second = (count - size) * assumed.within + images * means.T @ means
    counts = torch.full((size,), images)
    return FeatureSums.read(head.classes, counts, images * means, packed(second))


def _nearest(gram: Tensor, wanted: Tensor, longest: float) -> Tensor:
    """Solve G x = w with the least ridge under which xᵀGx, the squared shift, is below a limit."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 1e-10 * values.max()
    values, vectors = values[kept], vectors[:, kept]
    target = vectors.T @ wanted

    def shift(ridge: float) -> float:
        return float((values * (target / (values + ridge)).square()).sum())

    low, high = 0.0, 0.0
    if shift(0.0) > longest:
        high = float(values.max()) if len(values) else 1.0
        while shift(high) > longest > 0:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if shift(middle) > longest else (low, middle)
    solved: Tensor = vectors @ (target / (values + high))
    return solved
