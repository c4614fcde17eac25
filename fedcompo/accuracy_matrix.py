r"""What is remembered as clients arrive one after the other.

After arrival t each client i that is there is measured: :math:`a_{t,i}`. From this matrix

.. math:: A_t = \frac1t \sum_{i \le t} a_{t,i}, \qquad
   \bar A = \frac1T \sum_t A_t, \qquad
   F = \frac{1}{T-1} \sum_{i < T} \max_{t < T} \big(a_{t,i}\big) - a_{T,i}

are the accuracy after t arrivals, the *average incremental accuracy* and the *forgetting*
(Chaudhry et al., ECCV 2018, arXiv 1801.10112). :math:`A_T` is the *final accuracy*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class AccuracyMatrix:
    """One row an arrival; a value grows by :meth:`after`."""

    arrivals: tuple[str, ...] = ()
    """Clients in the order in which they came."""
    rows: tuple[Mapping[str, float], ...] = ()
    """Accuracy by client, in [0, 1], after each arrival; who could not be measured is missing."""

    def after(self, client: str, accuracies: Mapping[str, float]) -> AccuracyMatrix:
        """The matrix with one row more.

        Args:
            client: Who came.
            accuracies: Of those who are there then.
        """
        return AccuracyMatrix((*self.arrivals, client), (*self.rows, dict(accuracies)))

    @property
    def course(self) -> list[float | None]:
        """Mean accuracy after each arrival; None where nobody was measured."""
        return [fmean(row.values()) if row else None for row in self.rows]

    @property
    def average(self) -> float | None:
        """Average incremental accuracy: the mean of :attr:`course`."""
        known = [value for value in self.course if value is not None]
        return fmean(known) if known else None

    @property
    def final(self) -> float | None:
        """Mean accuracy after the last arrival."""
        return self.course[-1] if self.rows else None

    @property
    def forgetting(self) -> float | None:
        """Mean loss of accuracy from a client's best; None until two clients were measured."""
        lost = [
            max(earlier) - self.rows[-1][client]
            for client in self.arrivals[:-1]
            if (earlier := [row[client] for row in self.rows[:-1] if client in row])
            and client in self.rows[-1]
        ]
        return fmean(lost) if lost else None

    def as_json(self) -> dict[str, object]:
        """All of it, as JSON values."""
        return {
            "arrivals": list(self.arrivals),
            "matrix": [[row.get(client) for client in self.arrivals] for row in self.rows],
            "course": self.course,
            "average": self.average,
            "final": self.final,
            "forgetting": self.forgetting,
        }
