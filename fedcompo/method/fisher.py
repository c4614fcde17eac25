r"""The Fisher diagonal at :math:`\theta_0`: how much each weight matters to what the model says.

.. math:: F = \sum_x \sum_c p_c(x) \left(\frac{\partial \log p_c(x)}{\partial\theta}\right)^2,
   \qquad p = \mathrm{softmax}(W f(x; \theta) + b)

With :math:`A(x)^\top A(x)` the softmax curvature as the features see it
(:mod:`fedcompo.training.fisher_estimate`), one example's Fisher is :math:`J^\top A^\top A\,J` with
:math:`J = \partial f/\partial\theta`. Any vectors :math:`v_k` with
:math:`\sum_k v_k v_k^\top = A^\top A` give its diagonal, :math:`\sum_k (J^\top v_k)^2`, by one
backward pass each, all examples of a batch at once:

- *exact*: the scaled eigenvectors of :math:`A^\top A`, at most min(classes - 1, features) of them;
- *leading*: only the first r of these. The result is never above the exact one, and what is
  missing is measured by one more pass with random signs over the eigenvectors left out;
- *Monte Carlo*: ``samples`` labels drawn from p.

Source: Porrello et al., ICLR 2025 (arXiv 2405.16350); Martens, *New Insights and Perspectives on
the Natural Gradient Method*, JMLR 2020, for the factorisation.

A Fisher sum on disk: whose it is, at which weights, and which class each head row belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedcompo.errors import BackboneMismatch, ContributionError, FileFormatError
from fedcompo.method.deltas import Weights
from fedcompo.storage import tensorfile
from fedcompo.storage.tensorstream import StreamedTensors

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


def save_fisher(path: Path, fisher: FisherDiagonal, *, client: str, base: str) -> str:
    """Write a Fisher sum (float32) to one file.

    Args:
        path: Where to.
        fisher: The sum.
        client: Whose examples it sums over.
        base: Fingerprint of the pre-trained weights it was estimated at.

    Returns:
        SHA-256 of its tensors.
    """
    sums = {name: total.float() for name, total in fisher.sums.items()}
    manifest = {
        "content": "fisher",
        "client": client,
        "base": base,
        "classes": list(fisher.classes),
        "num_examples": fisher.num_examples,
    }
    tensorfile.save(path, sums, manifest)
    return tensorfile.tensor_digest(sums)


def load_fisher(
    path: Path, *, client: str, base: str, guard: Callable[[], None] | None = None
) -> FisherDiagonal:
    """Read what :func:`save_fisher` wrote.

    Args:
        path: The file.
        client: Whose it must be.
        base: Fingerprint of the pre-trained weights it must belong to.
        guard: None: every byte is read now and held against its digest. Otherwise tensors are read
            when asked for, after a call of this, which raises if the file is not to be trusted.

    Raises:
        FileFormatError: If it is truncated, altered, incomplete, or not this client's.
        BackboneMismatch: If it was estimated at other pre-trained weights.
    """
    sums = StreamedTensors(path, guard=guard or (lambda: None))
    manifest = sums.manifest
    if manifest.get("content") != "fisher":
        raise FileFormatError(f"{path} holds a {manifest.get('content')!r}, expected a 'fisher'.")
    if missing := sorted({"client", "base", "classes", "num_examples"} - manifest.keys()):
        raise FileFormatError(
            f"The manifest of {path} has no {missing[0]!r}. It was written by another version of "
            "fedcompo; estimate this Fisher again."
        )
    if manifest["client"] != client:
        raise FileFormatError(
            f"{path} belongs to client {manifest['client']!r}, expected {client!r}."
        )
    if manifest["base"] != base:
        raise BackboneMismatch(
            f"{path} was estimated at the backbone {manifest['base']}, expected {base}. "
            "Use the same `backbone` and `checkpoint`, or estimate it again."
        )
    if guard is None:
        sums.check()
    values = dict(sums) if guard is None else sums
    try:
        return FisherDiagonal(values, int(manifest["num_examples"]), tuple(manifest["classes"]))
    except (ContributionError, ValueError, TypeError) as error:
        raise FileFormatError(f"The manifest of {path} cannot be used: {error}") from error
