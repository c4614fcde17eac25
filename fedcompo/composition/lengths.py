r"""Lengths of task vectors: on the grid of the running sum, or near it without rounding them.

Whoever is rounded anyway has its length at once. Elsewhere it is not rounded for it: of a LoRA

.. math:: \lVert BA \rVert^2 = \langle B^\top B,\; A A^\top \rangle

needs nothing as large as the weight.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from fedcompo.composition.fixed_point import alone, change_of
from fedcompo.composition.products import CENTRE, GRID, Factors, pieces
from fedcompo.composition.scale import significant
from fedcompo.errors import ContributionError
from fedcompo.method.task_vector import TaskVector

LONGEST = 10.0
"""Largest norm of a newcomer's change to a weight, relative to the norm of that weight."""
NORM_DIGITS = 6
"""Significant digits of a task vector's squared length."""
NEAR = 1e-6
"""Share by which :func:`squared_near` may be off."""
_CANCELLED = 1e-3
"""Share of the largest sum that terms could make, below which their sum has lost digits."""
_SMALL = 2.0**20 * GRID
"""Root mean square of changes below which their rounding shows in the length."""


class Rounding:
    """Length of a task vector on the grid, fed one weight at a time, in their order; and digest."""

    def __init__(self, newcomer: str = "", *, hashed: bool = False) -> None:
        """Start with nothing; a newcomer, named here, is refused if it changes a weight too far.

        Its digest takes a second for each GB of the dense change, and weights one after the other.
        """
        self._digest = hashlib.sha256() if hashed else None
        self.squared, self._newcomer = 0.0, newcomer

    def update(self, name: str, values: Tensor, weight: Tensor) -> None:
        """Take in the rounded change of one weight, (out, in), int64.

        Raises:
            ContributionError: If a newcomer's is longer than :data:`LONGEST` times the weight.
        """
        if self._digest is not None:
            hash_rounded(self._digest, name, values)
        self.lengthen(name, squared_length(values), weight)

    def lengthen(self, name: str, squared: float, weight: Tensor) -> None:
        """Take in the squared length of one weight's change; raises as :meth:`update` does."""
        self.squared += squared
        if not self._newcomer:
            return
        if not (length := math.sqrt(squared)) <= LONGEST * float(weight.norm()):
            raise ContributionError(  # also if the weight's norm is not a number
                f"The task vector of client {self._newcomer!r} has norm {length:.3g} at {name!r}, "
                f"more than {LONGEST:g} times that of the weight itself. Its training diverged: "
                "lower `learning-rate`, or use `penalty = implicit`."
            )

    def part(self) -> Rounding:
        """Return one to be fed a weight of its own, in any thread; itself, if it is hashed."""
        return Rounding(self._newcomer) if self._digest is None else self

    def take(self, part: Rounding) -> None:
        """Take in a :meth:`part` that was fed."""
        if part is not self:
            self.squared += part.squared

    @property
    def sha256(self) -> str:
        """SHA-256 so far, hexadecimal; empty if it is not hashed."""
        return "" if self._digest is None else self._digest.hexdigest()

    @property
    def squared_norm(self) -> float:
        r""":math:`\lVert\tau\rVert^2`, to six significant digits: no machine's last bit counts."""
        return significant(self.squared, NORM_DIGITS)


def hash_rounded(digest: Any, name: str, values: Tensor) -> None:
    """Update a hash with the rounded change of one weight."""
    digest.update(f"{name}|{tuple(values.shape)}|".encode())
    digest.update(values.contiguous().numpy().data)


def squared_length(values: Tensor) -> float:
    """Return the squared length of values on the grid, (out, in), in units of task vectors."""
    flat = (values[rows].double().view(-1) for rows in pieces(values))
    return math.fsum(float(piece.dot(piece)) for piece in flat) * GRID * GRID


def squared_near(vector: TaskVector, name: str, weight: Tensor, *, owner: str) -> float:
    r"""Return the squared length of one weight's change, but for :data:`NEAR` of it on the grid.

    It is 0 just where all of the change rounds to 0. Arguments and errors are those of
    :func:`~fedcompo.composition.fixed_point.rounded`.
    """
    change = change_of(vector, name, weight, owner)
    if isinstance(change, Factors):
        of_b, of_a = change.b.T @ change.b, change.a @ change.a.T
        squared, most = float((of_b * of_a).sum()), float(of_b.trace() * of_a.trace())
        if squared > max(_CANCELLED * most, weight.numel() * _SMALL**2):
            return squared
        return squared_length(alone(change, weight))
    return math.fsum(_squared_on_grid(change.values[rows]) for rows in pieces(change.values))


def _squared_on_grid(values: Tensor) -> float:
    """Squared length of values below 2^11, each rounded by adding."""
    rounded = values.to(torch.float64, copy=True).reshape(-1).add_(CENTRE).sub_(CENTRE)
    return float(rounded.dot(rounded))
