r"""The classifiers: one for each client, and the joint head with the classes of all clients.

The changes of the backbone's weights are added up, the heads are not. In class-incremental use
(class-IL) the arg max runs over the rows of all classes, in task-incremental use (task-IL) over the
rows of one client's classes.

The joint head is the linear discriminant of the clients' statistics, in closed form. A probe, or a
joint head made of mixtures, is fitted by minimising cross-entropy plus
:math:`\lambda\lVert W - W_{start}\rVert^2` on features divided by their root mean square. The
problem is convex; L-BFGS solves it. Neither depends on the order of clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcompo.errors import ContributionError
from fedcompo.method.features import FeatureMixture, draw
from fedcompo.method.ranges import HEAD, check_range
from fedcompo.method.statistics import FeatureSums, is_positive, off_grid, unpacked

ITERATIONS = 200
"""Most iterations of L-BFGS."""
LEAST_SHRINKAGE = 1e-6
"""Smallest shrinkage of a covariance: it may have fewer images than features."""


@dataclass(frozen=True)
class Head:
    """A linear classifier; row i belongs to ``classes[i]``."""

    classes: tuple[str, ...]
    weight: Tensor
    """(classes, features)."""
    bias: Tensor
    """(classes,)."""

    def __call__(self, features: Tensor) -> Tensor:
        """Return logits, (batch, classes), of features (batch, features)."""
        return features @ self.weight.to(features).T + self.bias.to(features)

    def as_classifier(self, name: str) -> dict[str, Tensor]:
        """Return the weights of a model's classifier of this name, such as ``head``."""
        return {f"{name}.weight": self.weight, f"{name}.bias": self.bias}

    def rows(self, classes: Iterable[str]) -> Head:
        """Return the head of some of the classes, in the order given."""
        classes = tuple(classes)
        index = self.indices(classes)
        return Head(classes, self.weight[index], self.bias[index])

    def indices(self, classes: Iterable[str]) -> Tensor:
        """Return the row numbers of some classes, (count,); raises ``ContributionError``."""
        classes = tuple(classes)
        if unknown := sorted(set(classes) - set(self.classes)):
            raise ContributionError(
                f"The head knows no class {', '.join(unknown)}; it has {', '.join(self.classes)}."
            )
        return torch.tensor([self.classes.index(name) for name in classes])

    def check(self, classes: tuple[str, ...], num_features: int, owner: str) -> None:
        """Raise ``ContributionError`` on other classes or shapes, or values out of range."""
        expected = (len(classes), num_features), (len(classes),)
        shapes = tuple(self.weight.shape), tuple(self.bias.shape)
        if self.classes != classes or shapes != expected:
            raise ContributionError(
                f"The head of {owner} has classes {self.classes} and shapes {shapes}, expected "
                f"{classes} and {expected}."
            )
        for tensor in (self.weight, self.bias):
            check_range(tensor, HEAD, f"The head of {owner}")


def zero_head(classes: Iterable[str], num_features: int) -> Head:
    """Return a head of zeros: its logits are zero for every class."""
    classes = tuple(classes)
    return Head(classes, torch.zeros(len(classes), num_features), torch.zeros(len(classes)))


def discriminant(total: FeatureSums, *, shrinkage: float) -> Head:
    r"""Compute the joint head in closed form: the linear discriminant with a shared covariance.

    .. math:: W_k = S^{-1}\mu_k, \qquad b_k = -\tfrac12\,\mu_k^\top S^{-1}\mu_k, \qquad
       S = (1 - \gamma)\,\hat S + \gamma\,\frac{\mathrm{tr}\,\hat S}{d}\,I, \qquad
       \hat S = \frac{M - \sum_k n_k\,\mu_k\mu_k^\top}{n - C}

    No seed, no draw, no iteration; every class counts alike, whatever its number of images. Source:
    Fisher 1936; Friedman, *Regularized Discriminant Analysis*, JASA 1989.

    Args:
        total: Sums over the images of all clients.
        shrinkage: :math:`\gamma` in [0, 1].

    Returns:
        The head of all its classes, float32.
    """
    means = off_grid(total.sums) / total.counts.double().unsqueeze(1)
    shared = covariance(total, shrinkage=shrinkage)
    weight = torch.linalg.solve(shared, means.T).T
    bias = -0.5 * (weight * means).sum(1)
    return Head(total.classes, weight.float(), bias.float())


def covariance(total: FeatureSums, *, shrinkage: float) -> Tensor:
    """Estimate the covariance in classes, S of :func:`discriminant`, (features, features).

    Noise, or a client's false sums, can leave its estimate with negative eigenvalues. They are
    raised to zero, if they are beyond half of what shrinkage adds.
    """
    moment, size = unpacked(off_grid(total.second)), total.num_features
    within = total.scatter / max(1, total.num_examples - len(total.classes))
    level = float(within.trace()) / size
    square = float(moment.trace()) / size / max(1, total.num_examples)
    if not level > LEAST_SHRINKAGE * square:  # one image a class: what is left is rounding
        within, level = torch.eye(size, dtype=torch.float64), 1.0
    added = max(shrinkage, LEAST_SHRINKAGE)
    if not is_positive(within + 0.5 * added * level * torch.eye(size, dtype=torch.float64)):
        values, vectors = torch.linalg.eigh(within)
        within = (vectors * values.clamp_min(0)) @ vectors.T  # the nearest one without
        level = float(within.trace()) / size
    shared = (1 - shrinkage) * within
    shared.diagonal().add_(added * level)
    return shared


def fit_head(features: Tensor, labels: Tensor, start: Head, *, ridge: float) -> Head:
    """Fit a head to features, with a ridge towards the head it starts from.

    Args:
        features: (count, features).
        labels: (count,), index into ``start.classes``.
        start: Where the fit begins, and where the ridge pulls to.
        ridge: λ, on the scale of features divided by their root mean square.

    Returns:
        The fitted head, float32, on the CPU.
    """
    features, labels = features.double().cpu(), labels.cpu()
    scale = features.square().mean().sqrt().clamp_min(1e-12)
    inputs = torch.cat([features / scale, torch.ones(len(features), 1).double()], 1)
    first = torch.cat([start.weight.double() * scale, start.bias.double().unsqueeze(1)], 1)
    weight = first.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [weight], max_iter=ITERATIONS, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(inputs @ weight.T, labels)
        value = value + ridge * (weight - first).square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    fitted = weight.detach()
    return Head(start.classes, (fitted[:, :-1] / scale).float(), fitted[:, -1].float())


def align(
    mixtures: Mapping[str, list[FeatureMixture]],
    classes: Iterable[str],
    *,
    samples: int,
    ridge: float,
    seed: int,
) -> Head:
    """Fit the joint head, from zeros, to features drawn from the mixtures of all clients.

    See :func:`~fedcompo.method.features.draw`, and for the ridge :func:`fit_head`.
    """
    classes = tuple(classes)
    generator = torch.Generator().manual_seed(seed)
    features, labels = draw(mixtures, classes, samples=samples, generator=generator)
    return fit_head(features, labels, zero_head(classes, features.shape[1]), ridge=ridge)


def head_tensors(head: Head) -> dict[str, Tensor]:
    """Name the tensors of a head in a file or message; its classes stand in the manifest."""
    return {"head/weight": head.weight, "head/bias": head.bias}


def head_from(tensors: Mapping[str, Tensor], classes: Iterable[str]) -> Head:
    """Rebuild a head from the tensors that :func:`head_tensors` named, and its classes."""
    return Head(tuple(classes), tensors["head/weight"], tensors["head/bias"])
