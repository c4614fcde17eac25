r"""Task vectors as whole numbers: a term can be subtracted from their sum exactly.

A floating-point sum depends on the order of its terms, and a subtraction does not undo an addition.
Here each :math:`\tau` is rounded once to a grid,

.. math:: q = \mathrm{round}(2^{40}\,\tau), \qquad S = \sum_c m_c\,q_c, \qquad
   \theta_P = \theta_0 + \frac{\lambda'}{2^{40}} S

with whole :math:`m_c` (1, or the client's number of examples), and S is summed in int64: adding and
subtracting are exact, in any order, at a cost that does not grow with the number of clients.
:math:`2^{-40} \approx 10^{-12}` is far below float32's resolution of a weight.

The rounding is the same on every machine. The product of two float32 factors is exact in float64.
A LoRA's sum over its ranks, taken in their order, therefore rounds once for each rank, whether or
not the processor fuses multiplication and addition. That is :func:`reproducible_delta`; the same
bits are found several times faster by :mod:`fedcompo.composition.products`, except for values so
large that they are looked at one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedcompo.composition.products import BITS as BITS
from fedcompo.composition.products import GRID as GRID
from fedcompo.composition.products import TOGETHER, UNSURE, Dense, Factors, add_rounded, pieces
from fedcompo.config.choices import Kind
from fedcompo.errors import ContributionError, blaming
from fedcompo.method.task_vector import TaskVector

if TYPE_CHECKING:
    from fedcompo.composition.lengths import Rounding

LARGEST = 2.0**10
"""Values of a task vector beyond this are refused; weights of a trained network are of order 1."""
DENSE = Kind.FULL, Kind.TANGENT
"""Kinds that store the change itself."""
CEILING = 2**62
"""Sums stay below this: half of the range of int64."""


@dataclass(frozen=True)
class Term:
    """One client's part of a sum."""

    client: str
    vector: TaskVector
    times: int
    """How often it counts: m_c; negative to take the client out."""
    is_new: bool = False
    """Whether its length is checked."""


def sum_of(
    terms: Sequence[Term],
    name: str,
    weight: Tensor,
    *,
    start: Tensor | None = None,
    roundings: Sequence[Rounding] = (),
) -> Tensor:
    """Add the terms of one weight to a sum, exactly.

    Args:
        terms: Clients to add or to take out.
        name: Name of the weight.
        weight: Its pre-trained value, (out, in).
        start: The sum so far, (out, in), int64; None: zero.
        roundings: One for each term, updated with its rounded form; or none.

    Returns:
        S, (out, in), int64.

    Raises:
        ContributionError: If a value is not finite, too large, or leaves the range of the sum.
    """
    total = torch.zeros(weight.shape, dtype=torch.int64) if start is None else start
    for term, rounding in zip(terms, roundings, strict=False):
        with blaming(term.client):
            values = rounded(term.vector, name, weight, owner=f"client {term.client!r}")
            rounding.update(name, values, weight)
        total = add(total, values, term.times)
    if roundings:
        return total
    total = total if start is None else start.clone()
    reach = largest(total)  # no value of the sum is beyond it
    for times, batch in _batches(terms):
        changes = []
        for term in batch:
            with blaming(term.client):
                changes.append(change_of(term.vector, name, weight, f"client {term.client!r}"))
        reach += abs(times) * sum(int(change.peak / GRID) + 1 for change in changes)
        if reach < CEILING:
            add_rounded(total, changes, times)
            continue
        for change in changes:
            total = add(total, alone(change, weight), times)
        reach = largest(total)
    return total


def _batches(terms: Iterable[Term]) -> Iterator[tuple[int, list[Term]]]:
    """Terms that count alike, up to :data:`TOGETHER` at a time, with how often they count."""
    for times, alike in groupby(terms, key=lambda term: term.times):
        while batch := list(islice(alike, TOGETHER)):
            yield times, batch


def reproducible_delta(vector: TaskVector, name: str, weight: Tensor) -> Tensor:
    r"""Return the change of one weight in float64, the same bits on every machine.

    Args:
        vector: A task vector of any kind; the factors of a LoRA are taken as float32.
        name: Name of the weight.
        weight: Its pre-trained value, (out, in).

    Returns:
        :math:`\tau` of this weight, (out, in), float64, on the CPU; a new tensor.
    """
    if vector.kind in DENSE:
        return vector.tensors[f"{name}/delta"].to(torch.float64, copy=True)
    if vector.kind is Kind.IA3:
        return weight.double() * (vector.tensors[f"{name}/l"].double() - 1)
    a = vector.tensors[f"{name}/A"].float().double()
    b = vector.tensors[f"{name}/B"].float().double()
    total = torch.zeros(weight.shape, dtype=torch.float64)
    for column, row in zip(b.T.unsqueeze(2), a, strict=True):  # (out, 1), (in,)
        total.addcmul_(column, row)
    return total


def rounded(vector: TaskVector, name: str, weight: Tensor, *, owner: str) -> Tensor:
    """Round the change of one weight to the grid.

    Args:
        vector: Task vector.
        name: Name of the weight.
        weight: Its pre-trained value, (out, in).
        owner: Whose task vector it is, for the error message.

    Returns:
        q, (out, in), int64.

    Raises:
        ContributionError: If a value is not finite, or beyond :data:`LARGEST`.
    """
    return alone(change_of(vector, name, weight, owner), weight)


def change_of(vector: TaskVector, name: str, weight: Tensor, owner: str) -> Factors | Dense:
    """Read the change of one weight; raises as :func:`rounded` does."""
    if vector.kind is Kind.LORA:
        factors = Factors.of(vector.tensors[f"{name}/B"], vector.tensors[f"{name}/A"])
        if factors.error <= UNSURE:
            return factors
    if vector.kind in DENSE:  # in whatever dtype
        values = vector.tensors[f"{name}/delta"]
    else:
        values = reproducible_delta(vector, name, weight)
    if not (peak := largest(values)) <= LARGEST:  # also if it is not a number
        raise ContributionError(
            f"The task vector of {owner} changes {name!r} by {peak:g}, expected at most "
            f"{LARGEST:g}. Its training diverged: train it again with a lower `learning-rate`."
        )
    return Dense(values, peak)


def alone(change: Factors | Dense, weight: Tensor) -> Tensor:
    """Round one change, (out, in), int64."""
    values = torch.zeros(weight.shape, dtype=torch.int64)
    add_rounded(values, [change], 1)
    return values


def largest(values: Tensor) -> float | int:
    """Return the largest absolute value; NaN if a value is NaN."""
    if not values.numel():
        return 0
    low, high = (bound.item() for bound in values.aminmax())
    return max(-low, high)


def add(total: Tensor, term: Tensor, times: int) -> Tensor:
    """Return ``total + times * term``, exactly; a negative ``times`` takes the term out.

    Whoever wants to leave can: where terms cancelled out, a sum may grow by taking one out. It is
    exact modulo 2^64, so also after that every sum within the range is the right one.

    Raises:
        ContributionError: If a sum that is added to would leave the range of int64.
    """
    peak = largest(term)
    if max(peak, 1) * abs(times) >= CEILING:
        raise ContributionError(
            f"A value of {peak * GRID:g} counted {abs(times)} times leaves the range of the "
            "running sum. Compose with `coefficients = uniform`."
        )
    result = torch.add(total, term, alpha=times)
    if times > 0 and largest(result) >= CEILING:
        raise ContributionError(
            "The running sum leaves the range of int64: there are too many clients with too large "
            "changes. Compose with `coefficients = uniform`, or split the registry."
        )
    return result


def compose(weight: Tensor, total: Tensor, *, factor: float) -> Tensor:
    r"""Turn a sum into a composed weight: :math:`\theta_0 + \lambda' S / 2^{40}`.

    Args:
        weight: Pre-trained value, (out, in).
        total: S, (out, in), int64.
        factor: :math:`\lambda'`; see :mod:`fedcompo.composition.scale`.

    Returns:
        (out, in), in the dtype of ``weight``; the same bits on every machine.
    """
    result = torch.empty_like(weight)
    for rows in pieces(weight):
        change = total[rows].double().mul_(factor * GRID)
        result[rows] = change.add_(weight[rows].double())
    return result
