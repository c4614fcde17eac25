r"""The Fisher diagonal at :math:`\theta_0`: how much each weight matters to the predictions.

.. math:: F = \sum_x \sum_c p_c(x) \left(\frac{\partial \log p_c(x)}{\partial\theta}\right)^2,
   \qquad p = \mathrm{softmax}(W f(x; \theta) + b)

with x the examples, c the classes of the head (W, b) and f the backbone's features. It is kept as a
*sum* with the number of examples: sums of several clients add up, and one can be taken out again.
:mod:`fedcompo.training.fisher_estimate` estimates it.

Source: Porrello et al., ICLR 2025 (arXiv 2405.16350).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcompo.errors import ContributionError
from fedcompo.method.deltas import Weights

HEAD = ("head.weight", "head.bias")
"""Names of the head's weight (classes, features) and bias (classes,); a row belongs to a class."""


@dataclass(frozen=True)
class FisherDiagonal:
    """A *sum* over examples, and their number.

    Clients' heads differ in their classes. A row of the head belongs to a class by name, and a sum
    of two diagonals has a row for every class of either.
    """

    sums: Mapping[str, Tensor]
    """Sum over examples, by weight name, each (out, in); and the head's two, see :data:`HEAD`."""
    num_examples: int
    """Number of examples in the sum."""
    classes: tuple[str, ...] = ()
    """Class of each row of the head."""

    def __post_init__(self) -> None:
        """Refuse a head whose rows do not belong to one class each."""
        rows = {len(self.sums[name]) for name in HEAD if name in self.sums}
        if rows - {len(self.classes)} or len(set(self.classes)) < len(self.classes):
            raise ContributionError(
                f"The head of a Fisher diagonal has {max(rows, default=0)} rows for the classes "
                f"{self.classes}; expected one a class, each class named once."
            )

    def check(self, theta_0: Mapping[str, Tensor], *, num_features: int, owner: str) -> None:
        """Refuse sums that do not fit the backbone.

        Args:
            theta_0: The target weights, by name; only their shapes are used.
            num_features: Width of the head's rows.
            owner: Whose sums these are, for the error message.

        Raises:
            ContributionError: If names or shapes are not those of the target weights and the head,
                a value is negative or not finite in float32, or they sum over no example.
        """
        rows = len(self.classes)
        expected = {name: tuple(weight.shape) for name, weight in theta_0.items()}
        expected |= dict(zip(HEAD, ((rows, num_features), (rows,)), strict=True))
        for name in sorted(expected.keys() | self.sums.keys()):
            total = self.sums.get(name)
            shape = None if total is None else tuple(total.shape)
            if total is None or shape != expected.get(name):
                raise ContributionError(
                    f"The Fisher of {owner} has shape {shape} at {name!r}, expected "
                    f"{expected.get(name)}. Use the same `target-weights` everywhere."
                )
            if not torch.isfinite(total.float()).all() or (total < 0).any():
                raise ContributionError(
                    f"The Fisher of {owner} has values at {name!r} that are negative or not finite."
                )
        if self.num_examples < 1:
            raise ContributionError(f"The Fisher of {owner} sums over no example.")

    def for_classes(self, classes: Iterable[str]) -> FisherDiagonal:
        """Return it with head rows of these classes, in this order; zeros for an unknown class."""
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
        """Add two sums over different examples, in float64; classes of either, sorted."""
        classes = tuple(sorted({*self.classes, *other.classes}))
        mine, theirs = self.for_classes(classes), other.for_classes(classes)
        mine._check_alike(theirs)
        sums = {name: mine.sums[name].double() + theirs.sums[name].double() for name in mine.sums}
        return FisherDiagonal(sums, self.num_examples + other.num_examples, classes)

    def __sub__(self, other: FisherDiagonal) -> FisherDiagonal:
        """Take examples out, in float64; rounding never makes an entry negative."""
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
        """Return the mean over examples, float32; zeros if there are none."""
        count = max(1, self.num_examples)
        return {name: (total.double() / count).float() for name, total in self.sums.items()}

    def mean_trace(self) -> float:
        """Return the trace of the mean, without the head's entries."""
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
