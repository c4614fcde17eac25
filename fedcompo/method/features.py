"""Features of images; and, for the published protocol, mixtures of Gaussians that describe them.

With ``statistics = mixtures`` a client sends a mixture for each class instead of images. The server
draws features from the mixtures of all clients and fits the joint head to them. The default are
sums; see :mod:`fedcompo.method.statistics`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedcompo.errors import ContributionError, DataError
from fedcompo.method.images import Images, batches
from fedcompo.method.ranges import FEATURE, MOST_IMAGES, check_range
from fedcompo.report.progress import each

EXAMPLES_PER_COMPONENT = 8
"""Fewest images for each Gaussian."""
VARIANCE_FLOOR = 1e-3
"""Smallest variance of a component, as a share of the client's mean variance."""

BATCH = 128
"""Images that run through a backbone at a time."""
SLACK = 1e-3
"""How far the shares of a mixture may be from a sum of one."""
TINY = float(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class FeatureMixture:
    """A mixture of k diagonal Gaussians over features, of one class."""

    weights: Tensor
    """Share of each component, (k,); they sum to one."""
    means: Tensor
    """(k, features)."""
    variances: Tensor
    """(k, features), positive."""
    num_examples: int
    """Number of images that the mixture was fitted to."""

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw features, (count, features), float32."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator)
        return self.means[component] + self.variances[component].sqrt() * noise

    def check(self, num_features: int, owner: str) -> None:
        """Refuse a mixture that cannot be drawn from in float32; raises ``ContributionError``."""
        k, tensors = self.weights.numel(), (self.weights, self.means, self.variances)
        shapes = [tuple(t.shape) for t in tensors]
        expected = [(k,), (k, num_features), (k, num_features)]
        if k < 1 or shapes != expected:
            raise ContributionError(
                f"A mixture of {owner} has shapes {shapes}, expected {expected}."
            )
        check_range(self.weights, 1 + SLACK, f"The shares of a mixture of {owner}", least=0)
        check_range(self.means, FEATURE, f"The means of a mixture of {owner}")
        check_range(
            self.variances, FEATURE**2, f"The variances of a mixture of {owner}", least=TINY
        )
        count = self.num_examples  # JSON can hold any value
        counted = type(count) is int and 1 <= count <= MOST_IMAGES
        if not counted or abs(float(self.weights.sum()) - 1) > SLACK:
            raise ContributionError(
                f"A mixture of {owner} has {count!r:.80} examples and shares summing to "
                f"{float(self.weights.sum()):.4f}, expected at least 1 example, at most "
                f"{MOST_IMAGES}, and a sum of 1."
            )


Mixtures = Mapping[str, FeatureMixture]
"""The mixtures of one client, by class name."""


def fit_mixtures(
    features: Tensor, labels: Tensor, classes: Iterable[str], *, components: int, seed: int
) -> dict[str, FeatureMixture]:
    """Fit one mixture for each class.

    Args:
        features: (count, features).
        labels: (count,), index into ``classes``.
        classes: Names of the classes.
        components: Most Gaussians for a class; a class with few images gets fewer.
        seed: Seed of the fit's start.

    Returns:
        Mixtures by class name, float32.

    Raises:
        DataError: If a class has no image.
    """
    values = features.double().cpu().numpy()
    owners = labels.cpu().numpy()
    pooled = np.mean([values[owners == c].var(0) for c in np.unique(owners)], axis=0)
    floor = max(1e-8, float(VARIANCE_FLOOR * pooled.mean()))
    return {
        name: _fit(name, values[owners == index], pooled, floor, components, seed)
        for index, name in enumerate(classes)
    }


def _fit(
    name: str,
    values: np.ndarray[tuple[int, int], np.dtype[np.float64]],
    pooled: np.ndarray[tuple[int], np.dtype[np.float64]],
    floor: float,
    components: int,
    seed: int,
) -> FeatureMixture:
    count = len(values)
    if count == 0:
        raise DataError(f"Class {name!r} has no training image; remove it or add images.")
    k = max(1, min(components, count // EXAMPLES_PER_COMPONENT))
    if count < EXAMPLES_PER_COMPONENT:  # too few for a variance: use that of all classes
        shares, means = np.ones(1), values.mean(0, keepdims=True)
        variances = np.maximum(pooled, floor)[None]
    else:
        # Imported here because it takes seconds, and each phase of a client is a process.
        from sklearn.mixture import GaussianMixture

        fitted = GaussianMixture(k, covariance_type="diag", reg_covar=floor, random_state=seed)
        fitted.fit(values)
        shares, means, variances = fitted.weights_, fitted.means_, fitted.covariances_
    return FeatureMixture(
        torch.tensor(shares, dtype=torch.float32),
        torch.tensor(means, dtype=torch.float32),
        torch.tensor(variances, dtype=torch.float32),
        count,
    )


@torch.no_grad()
def extract_features(forward: Callable[[Tensor], Tensor], images: Images) -> Tensor:
    """Run images, (count, channels, size, size), uint8, through a backbone in batches.

    Returns:
        (count, features), float32, on the CPU.
    """
    parts = batches(images, BATCH)
    counted = each(parts, "images", "features", total=len(images), units=len)
    return torch.cat([forward(part).float().cpu() for part in counted])


def draw(
    mixtures: Mapping[str, list[FeatureMixture]],
    classes: Iterable[str],
    *,
    samples: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw features of every class; clients that share a class share its samples.

    Args:
        mixtures: By class name, one mixture for each client that has the class.
        classes: Names in the order of the joint head.
        samples: Features for each class, in proportion to the clients' images of it.
        generator: Source of the draws, on the CPU.

    Returns:
        Features (count, features) and labels (count,).
    """
    features, labels = [], []
    for index, name in enumerate(classes):
        owners = mixtures[name]
        total = sum(mixture.num_examples for mixture in owners)
        for mixture in owners:
            count = max(1, round(samples * mixture.num_examples / total))
            features.append(mixture.sample(count, generator))
            labels.append(torch.full((count,), index))
    return torch.cat(features), torch.cat(labels)
