r"""The Fisher diagonal at :math:`\theta_0`: how much each weight matters.

.. math:: F = \sum_x \mathrm{diag}(J_x^\top H_x\,J_x), \qquad J_x = \partial f(x)/\partial\theta

with x the examples, f the backbone's features and H the identity (what a change does to the
features), or the Hessian of the cross-entropy (what it does to the class probabilities).
:mod:`fedcompo.training.fisher_estimate` estimates both.

It is kept as a *sum* with the number of examples: sums of several clients add up, and one can be
taken out again. It has one of three forms. *Dense*: a number for each weight. *Kronecker*: more
than a diagonal; see :mod:`fedcompo.method.kronecker`. *Factored*: row sums r and column sums c of
each weight's matrix, (out, in), which stand for

.. math:: \hat F = \frac{r\,c^\top}{\sqrt{\sum_i r_i \sum_j c_j}}

Of all non-negative matrices of rank one, this is the one nearest to F in the generalised
Kullback-Leibler divergence :math:`\sum F \log(F/\hat F) - F + \hat F`. It has F's row sums, column
sums and total. (Under noise the two totals differ; their geometric mean stands for either.)

Beside it may stand, of the same examples, what the layers are given: the *sum* of squares of each
input of a weight's layer, over examples x and tokens t, which is the diagonal of the Gram matrix:

.. math:: \mathrm{diag}(G)_j = \sum_x \sum_t a_{xtj}^2

Sources: Porrello et al., ICLR 2025 (arXiv 2405.16350); Shazeer & Stern, *Adafactor*, ICML 2018
(arXiv 1804.04235), section 3; Lee & Seung, *Algorithms for Non-negative Matrix Factorization*,
NIPS 2000.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedcompo.config.choices import FisherForm
from fedcompo.errors import ContributionError
from fedcompo.method.deltas import Weights
from fedcompo.method.kronecker import (
    LEFT,
    RIGHT,
    Block,
    Kronecker,
    Metric,
    diagonal,
    thin_shape,
    thinned,
    whole,
)
from fedcompo.method.ranges import FISHER, check_range
from fedcompo.storage.tensorstream import Section

ROWS, COLUMNS = "/rows", "/columns"
"""Ends of the names of a factored weight's row and column sums."""
ENDS = {FisherForm.FACTORED: (ROWS, COLUMNS), FisherForm.KRONECKER: (LEFT, RIGHT)}
"""Ends of the names of a weight's two tensors, of its rows and of its columns, by form."""
INPUTS = "/inputs"
"""End of the names of the sums of squares of what weights' layers are given."""


@dataclass(frozen=True)
class FisherDiagonal:
    """A *sum* over examples, and their number."""

    sums: Mapping[str, Tensor]
    """Dense: by weight name, each (out, in). Factored: ``<weight>/rows``, each (out,), and
    ``<weight>/columns``, each (in,). None is negative. Kronecker: ``<weight>/left`` and
    ``<weight>/right``, thin, (dim, 1 + k), as a client sends them; matrices, (dim, dim), once they
    are added up."""
    num_examples: int
    """Number of examples in the sum."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """``<weight>/inputs``, each (in,): a *sum* of squares over the same examples and their tokens;
    for each weight, or empty: they are not known. A sum of several Fishers has none."""

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], num_examples: int) -> FisherDiagonal:
        """Read :attr:`tensors`; none is looked at before it is used."""
        inputs = [name for name in tensors if name.endswith(INPUTS)]
        others = tensors.keys() - set(inputs)
        sums, own = (Section(tensors, without=without) for without in (inputs, others))
        return cls(sums, num_examples, own)

    @property
    def tensors(self) -> Weights:
        """All sums, as they are stored and sent."""
        return {**self.sums, **self.inputs}

    @property
    def form(self) -> FisherForm:
        """Its form; an empty one counts as dense."""
        for form, ends in ENDS.items():
            if any(name.endswith(ends) for name in self.sums):
                return form
        return FisherForm.DENSE

    def check(self, theta_0: Mapping[str, Tensor], *, owner: str) -> None:
        """Refuse sums of an owner that do not fit the shapes of the target weights.

        Raises:
            ContributionError: If names or shapes are not those of the target weights, a value is
                negative or out of range, or they sum over no example.
        """
        expected: dict[str, tuple[int, ...]]
        expected = {name: tuple(weight.shape) for name, weight in theta_0.items()}
        thin, ends = self.form is FisherForm.KRONECKER, ENDS.get(self.form)
        if ends is not None:
            expected = {
                f"{name}{end}": thin_shape(size) if thin else (size,)
                for name, shape in expected.items()
                for end, size in zip(ends, shape, strict=True)
            }
        if self.inputs:
            expected |= {f"{name}{INPUTS}": tuple(w.shape[1:]) for name, w in theta_0.items()}
        for name in sorted(expected.keys() | self.sums.keys() | self.inputs.keys()):
            apart = name.endswith(INPUTS)
            total = (self.inputs if apart else self.sums).get(name)
            shape = None if total is None else tuple(total.shape)
            if total is None or shape != expected.get(name):
                raise ContributionError(
                    f"The Fisher of {owner} has shape {shape} at {name!r}, expected "
                    f"{expected.get(name)}. Use the same `target-weights` and fedcompo version "
                    "everywhere."
                )
            largest, least = (FISHER**0.5, None) if thin and not apart else (FISHER, 0.0)
            check_range(total, largest, f"The Fisher of {owner} at {name!r}", least=least)
        if self.num_examples < 1:
            raise ContributionError(f"The Fisher of {owner} sums over no example.")

    def reduced(self) -> FisherDiagonal:
        """Return the factored form, in the same dtype; a factored one is returned as it is."""
        if self.form is FisherForm.FACTORED:
            return self
        if self.form is FisherForm.KRONECKER:
            renamed = {
                name.replace(LEFT, ROWS).replace(RIGHT, COLUMNS): diagonal(total)
                for name, total in self.sums.items()
            }
            return replace(self, sums=renamed)
        parts: Weights = {}
        for name, total in self.sums.items():
            for axis, end in ((1, ROWS), (0, COLUMNS)):
                parts[f"{name}{end}"] = total.double().sum(axis).to(total.dtype)
        return replace(self, sums=parts)

    def thinned(self) -> FisherDiagonal:
        """Return Kronecker factors as they are sent and stored, float64; else the sums as is."""
        if self.form is not FisherForm.KRONECKER:
            return self
        return replace(self, sums={name: thinned(total) for name, total in self.sums.items()})

    def __add__(self, other: FisherDiagonal) -> FisherDiagonal:
        """Add two sums over different examples, in float64; factored if the forms differ."""
        mine, theirs = self._alike(other)
        sums = {name: total.double() + theirs[name].double() for name, total in mine.items()}
        return FisherDiagonal(sums, self.num_examples + other.num_examples)

    def __sub__(self, other: FisherDiagonal) -> FisherDiagonal:
        """Take examples out, in float64; rounding never makes an entry negative."""
        mine, theirs = self._alike(other)
        if other.num_examples > self.num_examples:
            raise ContributionError(
                f"Cannot take {other.num_examples} examples out of {self.num_examples}."
            )
        sums = {name: total.double() - theirs[name].double() for name, total in mine.items()}
        if {self.form, other.form} != {FisherForm.KRONECKER}:  # entries of matrices may be negative
            sums = {name: total.clamp_min(0) for name, total in sums.items()}
        return FisherDiagonal(sums, self.num_examples - other.num_examples)

    def capped(self, most: int) -> FisherDiagonal:
        """Let it count as a sum over so many examples at most; the mean stays."""
        if self.num_examples <= most:
            return self
        ratio = most / self.num_examples
        power = 0.5 if self.form is FisherForm.KRONECKER else 1.0  # see :meth:`mean`
        sums = {name: total.double() * ratio**power for name, total in self.thinned().sums.items()}
        return FisherDiagonal(sums, most)

    def mean(self) -> Weights:
        """Return the mean over examples in the same form, float32; zeros if there are none.

        Kronecker factors are thin: roots, so they are divided by the root of the count.
        """
        count = max(1, self.num_examples) ** (0.5 if self.form is FisherForm.KRONECKER else 1)
        sums = self.thinned().sums
        return {name: (total.double() / count).float() for name, total in sums.items()}

    def diagonal_of(self, name: str) -> Tensor:
        """Return the *mean* Fisher of each entry of one weight, float64, (out, in).

        Dense: as it was summed. Factored: the matrix of rank one above. Kronecker: the same, of the
        diagonals of its thin factors. Every machine computes the same bits.
        """
        count = max(1, self.num_examples)
        if (form := self.form) is FisherForm.DENSE:
            return self.sums[name].double() / count
        r, c = (self.sums[name + end].double() for end in ENDS[form])
        if form is FisherForm.KRONECKER:
            r, c = (functools.reduce(torch.add, t.square().unbind(1)) for t in (r, c))
        root = math.sqrt(math.fsum(r.tolist()) * math.fsum(c.tolist()))
        return torch.outer(r / (root * count or 1.0), c)

    def inputs_of(self, name: str) -> Tensor:
        """Return the *mean* over examples of the squares of a layer's inputs, float64, (in,)."""
        return self.inputs[name + INPUTS].double() / max(1, self.num_examples)

    def mean_trace(self) -> float:
        """Return the trace of the mean."""
        sums = self.sums if self.form is FisherForm.DENSE else self.reduced().sums
        counted = (t for name, t in sums.items() if not name.endswith(COLUMNS))
        return sum(float(total.double().sum()) for total in counted) / max(1, self.num_examples)

    def _alike(self, other: FisherDiagonal) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """The sums of both in one form; refuses those of other weights."""
        mine, theirs = self.sums, other.sums
        if self.form is not other.form:
            mine, theirs = self.reduced().sums, other.reduced().sums
        elif self.form is FisherForm.KRONECKER:
            mine, theirs = ({n: whole(t) for n, t in sums.items()} for sums in (mine, theirs))
        own, others = ({(n, tuple(t.shape)) for n, t in sums.items()} for sums in (mine, theirs))
        if differing := {name for name, _ in own ^ others}:
            raise ContributionError(
                f"Two Fisher diagonals differ in {len(differing)} weights, among them "
                f"{min(differing)!r}; they must have the same names and shapes."
            )
        return mine, theirs


def outer(rows: Tensor, columns: Tensor) -> Tensor:
    r"""Expand margins: :math:`r c^\top / \sqrt{\sum r \sum c}`.

    Args:
        rows: r, (out,), not negative.
        columns: c, (in,), not negative.

    Returns:
        (out, in), float32; zeros where either sums to zero.
    """
    r, c = rows.double(), columns.double()
    total = (r.sum() * c.sum()).sqrt()
    if total == 0:
        return torch.zeros(len(r), len(c), device=r.device)
    return torch.outer(r / total, c).float()


def expanded(parts: Mapping[str, Tensor], theta_0: Mapping[str, Tensor]) -> Metric:
    """Make a Fisher of any form one that can be applied to a change of these weights.

    Its parts are a sum or a mean; see :attr:`FisherDiagonal.sums`. Kronecker factors are thin.

    Returns:
        By weight name: a diagonal, (out, in), float32, or a Kronecker product.
    """
    metric: dict[str, Block] = {}
    for name in theta_0:
        if name in parts:
            metric[name] = parts[name].float()
        elif f"{name}{LEFT}" in parts:
            metric[name] = Kronecker.of(parts[f"{name}{LEFT}"], parts[f"{name}{RIGHT}"])
        else:
            metric[name] = outer(parts[f"{name}{ROWS}"], parts[f"{name}{COLUMNS}"])
    return metric
