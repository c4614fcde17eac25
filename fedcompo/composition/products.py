r"""Sums of rounded task vectors, fast: the same bits as those of :func:`fixed_point.rounded`.

*Rounding by adding.* Between :math:`2^{12}` and :math:`2^{13}` the values of float64 lie
:math:`2^{-40}` apart. To add :math:`\tau` to :math:`C = 1.5 \cdot 2^{12}` is to round it to the
grid, ties to even; the bits of the result, less those of C, are q as a whole number.

*Products.* By definition a LoRA's :math:`\tau` is summed over its ranks in their order. A library's
matrix product t adds in another order, but neither is further than
:math:`n\,2^{-53} \sum_k |b_{ik} a_{kj}|` from the exact value, n ranks, because products of two
float32 are exact. So

.. math:: |\tau - t| < e = (2n + 8)\,2^{-53} \max_i \lVert b_i \rVert \max_j \lVert a_j \rVert

where eight are for the roundings of t + e, of t - e and of e itself. If both round alike, so does
:math:`\tau`, which lies between. Sums of t + e and of t - e over some members, each rounded as it
is added, are equal just where every member's did. The other entries, about one in a thousand, are
summed again in order. Source: Ziv, *Fast evaluation of elementary mathematical functions with
correctly rounded last bit*, ACM TOMS 17 (1991); here to a grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Whole = NDArray[np.int64]
BITS = 40
GRID = 2.0**-BITS
"""Distance between two neighbouring values."""
CENTRE = 1.5 * 2.0**12
"""C: a sum that stays within 2^11 of it is rounded to the grid at every addition."""
OFFSET = int(np.float64(CENTRE).view(np.int64))
"""The bits of C, as a whole number."""
UNSURE = GRID / 64
"""Largest e: beyond it, more than one entry in 32 would be summed again for each member."""
TOGETHER = 4
"""Members that are added up at a time."""
PIECE = 1 << 17
"""Elements taken at a time, so that intermediate values stay in the processor's cache."""


@dataclass(frozen=True)
class Factors:
    """A LoRA of one weight, whose product is known up to an error."""

    b: Tensor
    """(out, rank), float64, on the CPU; the values are of float32."""
    a: Tensor
    """(rank, in), as b."""
    peak: float
    """No entry of the product is larger; not finite if a factor is not."""

    @classmethod
    def of(cls, b: Tensor, a: Tensor) -> Factors:
        """Take them as float32; entries are bounded by the lengths of rows and columns."""
        b, a = b.float().double(), a.float().double()
        lengths = b.norm(dim=1), a.norm(dim=0)
        peak = float(lengths[0].max() * lengths[1].max()) if b.numel() and a.numel() else 0.0
        return cls(b, a, peak)

    @property
    def error(self) -> float:
        """E."""
        return (2 * len(self.a) + 8) * 2.0**-53 * self.peak

    def ordered(self, rows: Whole, columns: Whole) -> Whole:
        """Return some entries, summed over the ranks in their order, rounded to the grid; int64."""
        terms = self.b.numpy()[rows].T * self.a.numpy()[:, columns]  # (rank, entries), exact
        sums: NDArray[np.float64] = np.add.accumulate(terms, axis=0)[-1]  # numpy states its order
        return np.rint(sums * 2.0**BITS).astype(np.int64)


@dataclass(frozen=True)
class Dense:
    """A change of one weight, as it is."""

    values: Tensor
    """(out, in), of any dtype, on the CPU."""
    peak: float
    """Its largest absolute value, below 2^11."""


def pieces(weight: Tensor) -> Iterator[slice]:
    """Split a weight into slices of rows, each of about :data:`PIECE` elements."""
    if weight.numel():
        step = max(1, PIECE * len(weight) // weight.numel())
        yield from (slice(start, start + step) for start in range(0, len(weight), step))


def add_rounded(total: Tensor, changes: Sequence[Factors | Dense], times: int) -> None:
    """Add changes, rounded, to a sum in place, each so many times; modulo 2^64.

    Args:
        total: S, (out, in), int64, contiguous.
        changes: Each of (out, in); factors with an error up to :data:`UNSURE`.
        times: The same for all.
    """
    factors = [own for own in changes if isinstance(own, Factors)]
    dense = [own.values for own in changes if isinstance(own, Dense)]
    if factors:
        _add_products(total, factors, times)
    if dense:
        _add_dense(total, dense, times)


def _add_dense(total: Tensor, changes: Sequence[Tensor], times: int) -> None:
    rounded, added = _buffers(total, 2)
    for rows in pieces(total):
        size = len(total[rows])
        values, found = rounded[:size], added[:size].view(np.int64)
        found.fill(0)
        for change in changes:
            torch.from_numpy(values).copy_(change[rows])
            values += CENTRE
            found += values.view(np.int64)
        _add(total[rows], found, len(changes) * OFFSET, times)


def _add_products(total: Tensor, factors: Sequence[Factors], times: int) -> None:
    width, unsure, sums = total.shape[1], [], []
    one = total.new_ones(1, width, dtype=torch.float64)
    above = [  # t + e is a product too
        (torch.cat([f.b, f.b.new_full((len(f.b), 1), f.error)], 1), torch.cat([f.a, one]))
        for f in factors
    ]
    buffers = _buffers(total, 3)
    for rows in pieces(total):
        values, high, low = (buffer[: len(total[rows])] for buffer in buffers)
        high.fill(CENTRE)
        low.fill(CENTRE)
        for own, (b, a) in zip(factors, above, strict=True):
            torch.mm(b[rows], a, out=torch.from_numpy(values))
            high += values
            values -= 2 * own.error
            low += values
        found = high.view(np.int64)
        places = np.flatnonzero(high != low)
        unsure.append(places + rows.start * width)
        sums.append(found.ravel()[places] - OFFSET)
        _add(total[rows], found, OFFSET, times)
    places = np.concatenate([np.empty(0, int), *unsure])
    exact = sum(own.ordered(*np.divmod(places, width)) for own in factors)
    total.numpy().reshape(-1)[places] += times * (exact - np.concatenate([places[:0], *sums]))


def _buffers(total: Tensor, count: int) -> list[NDArray[np.float64]]:
    """Memory for pieces of a weight, used again for each: new pages cost as much as a product."""
    rows = max((piece.stop - piece.start for piece in pieces(total)), default=0)
    return [np.empty((min(rows, len(total)), *total.shape[1:])) for _ in range(count)]


def _add(total: Tensor, values: Whole, offset: int, times: int) -> None:
    """Add ``times * (values - offset)`` in place, modulo 2^64; the values are lost."""
    values -= np.uint64(offset % 2**64).view(np.int64)
    if times != 1:
        values *= np.int64(times)
    own = total.numpy()
    own += values
