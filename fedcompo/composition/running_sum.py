r"""The exact sum of task vectors while they change: :math:`S = \sum_c m_c q_c`.

A client that trains inside the ensemble (IEL) needs only the weighted sum of the others,

.. math:: R_c = \frac{1}{2^{40} M} \Big(S - m_c q_c\Big), \qquad w_c = \frac{m_c}{M}

on the grid of :mod:`fedcompo.composition.fixed_point`. A client's new task vector replaces its last
one by one subtraction and one addition. Whatever came before, S is the sum of the last task
vectors, bit for bit. Memory does not depend on the number of clients: it is that of S, of its
successor while it changes, and of one weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedcompo.composition import fixed_point
from fedcompo.composition.fixed_point import Term
from fedcompo.errors import ContributionError
from fedcompo.method.deltas import Weights
from fedcompo.method.task_vector import TaskVector
from fedcompo.runtime import in_order


@dataclass
class RunningSum:
    """A sum in memory, changed in place; task vectors may stay on disk."""

    theta_0: Weights
    """The target weights at their pre-trained values, each (out, in)."""
    vectors: dict[str, TaskVector] = field(default_factory=dict)
    """Last task vector of each client."""
    times: dict[str, int] = field(default_factory=dict)
    r"""How often each client counts, :math:`m_c`."""
    total: dict[str, Tensor] = field(default_factory=dict)
    """S by weight name, int64."""

    def __post_init__(self) -> None:
        """Start at zero, unless a total is given."""
        if not self.total:
            shapes = {name: weight.shape for name, weight in self.theta_0.items()}
            self.total = {n: torch.zeros(s, dtype=torch.int64) for n, s in sorted(shapes.items())}

    @property
    def clients(self) -> tuple[str, ...]:
        """Clients whose task vectors are in it, sorted."""
        return tuple(sorted(self.vectors))

    def put(self, client: str, vector: TaskVector, *, times: int) -> None:
        """Add a client's task vector, which must stay readable, and take out its last one.

        Raises:
            ContributionError: If a value cannot be summed; the sum is then unchanged.
        """
        self.total = dict(self._changed([*self._last(client), Term(client, vector, times)]))
        self.vectors[client], self.times[client] = vector, times

    def drop(self, client: str) -> None:
        """Take a client out, as if it had never been in."""
        if client not in self.vectors:
            raise ContributionError(
                f"There is no task vector of {client!r} in the sum, which holds "
                f"{', '.join(self.clients) or 'nobody'}."
            )
        self.total = dict(self._changed(self._last(client)))
        del self.vectors[client], self.times[client]

    def rest(self, client: str, *, together: int) -> Weights:
        r"""Return the weighted sum of the others, :math:`R_c`.

        Args:
            client: Need not be in the sum yet.
            together: M, over all clients of the round, also those whose task vector is still zero.

        Returns:
            By weight name, each (out, in), float32.
        """
        last = self._last(client)
        grid = fixed_point.GRID / together
        return {n: s.double().mul_(grid).float() for n, s in self._changed(last)}

    def _last(self, client: str) -> list[Term]:
        """Return the term that takes a client's last task vector out, if it has one."""
        if client not in self.vectors:
            return []
        return [Term(client, self.vectors[client], -self.times[client])]

    def _changed(self, terms: list[Term]) -> Iterator[tuple[str, Tensor]]:
        """Yield the sum with more terms, by weight; the present sum stays as it is."""

        def changed(name: str) -> tuple[str, Tensor]:
            weight, start = self.theta_0[name].cpu(), self.total[name]
            return name, fixed_point.sum_of(terms, name, weight, start=start)

        return in_order(changed, sorted(self.theta_0))
