r"""Statistics of a client's features, as sums that add up over clients and can be taken out again.

Over the images of a client, with features f and labels k:

.. math:: n_k, \qquad s_k = \sum_{x \in k} f(x), \qquad M = \sum_x f(x)\,f(x)^\top

A client sends these kilobytes instead of images; the joint head follows from their sums
(:func:`fedcompo.method.heads.discriminant`). Every number is a whole multiple of a grid, kept in
int64: sums over clients are exact, whatever the order, and whoever leaves is subtracted from them
without a trace, at a cost that does not grow with the number of clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from fedcompo.errors import ContributionError, DataError
from fedcompo.method.ranges import MOST_IMAGES, check_floats

BITS = 24
"""A sum is a whole multiple of 2^-24. A float32 above one is such a multiple itself."""
CEILING = 2**62
"""Sums stay below this: half of the range of int64."""
AT_A_TIME = 4096
"""Images whose features are in memory in float64."""
ROUNDING = 2.0**-20
"""Bound on what float32 and the grid do to a scatter, relative to its second moment."""
LIMIT = CEILING // 16
"""And those of one client below this, so that no client alone leaves no room for the others."""


@dataclass(frozen=True)
class FeatureSums:
    """Counts, sums by class and second moment of features, *sums* over the images of clients."""

    classes: tuple[str, ...]
    """Sorted, each once."""
    counts: Tensor
    """Images of each class, (classes,), int64."""
    sums: Tensor
    """Features summed by class, (classes, features), int64, in units of 2^-24."""
    second: Tensor
    """Upper triangle of the sum of f fᵀ, row by row, int64, in units of 2^-24;
    (features · (features + 1) / 2,)."""

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, classes: Iterable[str]) -> FeatureSums:
        """Sum the features of labelled images.

        Args:
            features: (count, features).
            labels: (count,), index into ``classes``.
            classes: Sorted names.

        Raises:
            DataError: If a class has no image.
        """
        classes = tuple(classes)
        owners = labels.cpu()
        counts = torch.bincount(owners, minlength=len(classes))
        if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
            raise DataError(f"Class {empty[0]!r} has no image; remove it or add images.")
        width = features.shape[1]
        sums, second = (torch.zeros(n, width, dtype=torch.float64) for n in (len(classes), width))
        for part, own in zip(
            torch.split(features, AT_A_TIME), torch.split(owners, AT_A_TIME), strict=True
        ):
            values = part.double().cpu()
            sums.index_add_(0, own, values)
            second.addmm_(values.T, values)
        return cls.read(classes, counts, sums, packed(second))

    @classmethod
    def read(
        cls, classes: tuple[str, ...], counts: Tensor, sums: Tensor, second: Tensor
    ) -> FeatureSums:
        """Round numbers to the grid, by way of float32, in which they travel without loss.

        Args:
            classes: Sorted names.
            counts: (classes,), integers.
            sums: (classes, features), floating point.
            second: (features · (features + 1) / 2,), floating point.

        Raises:
            ContributionError: If a number is not finite, too large to be summed, or no float.
        """
        return cls(classes, counts.to(torch.int64), to_grid(sums), to_grid(second))

    @property
    def num_examples(self) -> int:
        """Number of images in all."""
        return int(self.counts.sum())

    @property
    def num_features(self) -> int:
        """Width of the features."""
        return self.sums.shape[1]

    @property
    def variance(self) -> float:
        r"""Total variance of the features, :math:`\mathrm{tr}\,\mathrm{Cov}(f)`."""
        mean = off_grid(self.sums).sum(0) / self.num_examples
        return self.mean_square - float(mean.square().sum())

    @property
    def mean_square(self) -> float:
        """Mean squared length of the features: the trace of their mean second moment."""
        return float(unpacked(off_grid(self.second)).trace()) / self.num_examples

    @property
    def scatter(self) -> Tensor:
        r"""Scatter in classes, :math:`M - \sum_k n_k\,\mu_k\mu_k^\top`, (features, features)."""
        counts = self.counts.double().unsqueeze(1)  # (classes, 1)
        means = off_grid(self.sums) / counts
        return unpacked(off_grid(self.second)) - (means * counts).T @ means

    def tensors(self) -> dict[str, Tensor]:
        """Name the tensors as they travel and are stored: float32; see :meth:`from_tensors`."""
        return {
            "statistics/counts": self.counts,
            "statistics/sums": off_grid(self.sums).float(),
            "statistics/second": off_grid(self.second).float(),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], classes: Iterable[str]) -> FeatureSums:
        """Rebuild what :meth:`tensors` named; raises as :meth:`read` does."""
        counts, *parts = (tensors[f"statistics/{part}"] for part in ("counts", "sums", "second"))
        if counts.is_floating_point() or counts.is_complex():
            raise ContributionError(f"Images are counted in {counts.dtype}, expected integers.")
        return cls.read(tuple(classes), counts, *parts)

    def check(
        self, classes: tuple[str, ...], num_features: int, owner: str, *, clients: int = 1
    ) -> None:
        """Refuse sums of other classes or another width, or that no images can have.

        They are an owner's, summed over so many clients; raises ``ContributionError``.
        """
        shapes = [tuple(t.shape) for t in (self.counts, self.sums, self.second)]
        size = num_features * (num_features + 1) // 2
        expected = [(len(classes),), (len(classes), num_features), (size,)]
        if self.classes != classes or shapes != expected:
            raise ContributionError(
                f"The statistics of {owner} are of the classes {self.classes} with shapes {shapes},"
                f" expected {classes} and {expected}."
            )
        if any(not 1 <= count <= clients * MOST_IMAGES for count in self.counts.tolist()):
            raise ContributionError(
                f"The statistics of {owner} count {self.counts.tolist()[:5]} … images by class, "
                f"expected at least one each, and at most {MOST_IMAGES} of a client."
            )
        self.check_scatter(owner)

    def check_scatter(self, owner: str) -> None:
        """Refuse sums that no images can have: their features would have a negative variance.

        Sums under noise have none; see :func:`fedcompo.privacy.statistics.private_sums`.

        Raises:
            ContributionError: If the scatter within classes has a negative eigenvalue, beyond what
                rounding leaves of zero.
        """
        scatter, size = self.scatter, len(self.classes) * self.num_features
        moment = float(unpacked(off_grid(self.second)).trace())
        scatter.diagonal().add_(ROUNDING * (max(moment, 0.0) + size))
        if not is_positive(scatter):
            raise ContributionError(
                f"The statistics of {owner} are of no images: within classes, some direction of "
                "the features has a negative variance. Use the same fedcompo version everywhere."
            )

    def __add__(self, other: FeatureSums) -> FeatureSums:
        """Add two sums over different images, exactly; classes of either, sorted."""
        return self._with(other, 1)

    def __sub__(self, other: FeatureSums) -> FeatureSums:
        """Take images out, exactly; a class without images is left out."""
        if unknown := sorted(set(other.classes) - set(self.classes)):
            raise ContributionError(
                f"Cannot take images of {unknown[0]!r} out of a sum over {self.classes}."
            )
        left = self._with(other, -1)
        if bool((left.counts < 0).any()):
            raise ContributionError("Cannot take more images of a class out than were summed.")
        return left._rows(tuple(c for c, n in zip(left.classes, left.counts, strict=True) if n))

    def _with(self, other: FeatureSums, sign: int) -> FeatureSums:
        if self.num_features != other.num_features:
            raise ContributionError(
                f"Features of widths {self.num_features} and {other.num_features} cannot be summed."
            )
        classes = tuple(sorted({*self.classes, *other.classes}))
        mine, theirs = self._rows(classes), other._rows(classes)
        total = FeatureSums(
            classes,
            mine.counts + sign * theirs.counts,
            mine.sums + sign * theirs.sums,
            mine.second + sign * theirs.second,
        )
        for values in (total.sums, total.second) if sign > 0 else ():  # whoever wants to may leave
            if values.numel() and max(map(abs, values.aminmax())) >= CEILING:
                raise ContributionError(
                    "The sum of the statistics leaves the range of int64: features are too large."
                )
        return total

    def _rows(self, classes: tuple[str, ...]) -> FeatureSums:
        """Return it with these classes, in this order; zeros for an unknown class."""
        if classes == self.classes:
            return self
        places = {name: row for row, name in enumerate(self.classes)}
        known = [row for row, name in enumerate(classes) if name in places]
        own = [places[classes[row]] for row in known]
        counts = self.counts.new_zeros(len(classes))
        sums = self.sums.new_zeros(len(classes), self.num_features)
        counts[known], sums[known] = self.counts[own], self.sums[own]
        return FeatureSums(classes, counts, sums, self.second)


def total_of(parts: Iterable[FeatureSums]) -> FeatureSums:
    """Add the sums of several clients, at least one; their order changes no bit."""
    return reduce(add, parts)


def is_positive(matrix: Tensor) -> bool:
    """Whether a symmetric matrix, (size, size), is positive definite."""
    return not int(torch.linalg.cholesky_ex(matrix).info)


def packed(matrix: Tensor) -> Tensor:
    """Return the upper triangle of a square matrix, row by row."""
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns]


def unpacked(triangle: Tensor) -> Tensor:
    """Rebuild the symmetric matrix that :func:`packed` took the upper triangle of."""
    size = int((8 * triangle.numel() + 1) ** 0.5 - 1) // 2
    rows, columns = torch.triu_indices(size, size)
    matrix = triangle.new_zeros(size, size)
    matrix[rows, columns] = triangle
    matrix[columns, rows] = triangle
    return matrix


def off_grid(values: Tensor) -> Tensor:
    """Return whole multiples of 2^-24 as numbers, float64."""
    return values.double() * 2.0**-BITS


def to_grid(values: Tensor) -> Tensor:
    """Round what one client sends to whole multiples of 2^-24, by way of float32; int64.

    Raises:
        ContributionError: If a number is not finite or too large to be summed, or no float.
    """
    check_floats(values, "A sum of features of a client")
    scaled = values.float().double() * 2.0**BITS
    if values.numel() and not float(scaled.abs().max()) < LIMIT:  # also if it is not a number
        raise ContributionError(
            f"Sums of a client reach {float(values.double().abs().max()):g}, expected numbers "
            f"below {LIMIT * 2.0**-BITS:g}."
        )
    return scaled.round().to(torch.int64)
