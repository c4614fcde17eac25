r"""Clients arrive one after the other; those who are there stay as they are.

This is the class-incremental protocol (Porrello et al., ICLR 2025, arXiv 2405.16350). Client t is
anchored by those before it (ITA), or trains inside their sum (IEL). After each arrival t, all
clients i that are there measure the composed model: :math:`a_{t,i}`. From this matrix follow

.. math:: A_t = \frac1t \sum_{i \le t} a_{t,i}, \qquad
   \bar A = \frac1T \sum_t A_t, \qquad
   F = \frac{1}{T-1} \sum_{i < T} \max_{t < T} \big(a_{t,i}\big) - a_{T,i}

the accuracy after t arrivals, the *average incremental accuracy* and the *forgetting* (Chaudhry et
al., ECCV 2018, arXiv 1801.10112). :math:`A_T` is the *final accuracy*.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedcompo.errors import ConfigError, ContributionError
from server.phases.composing import Composing
from server.strategy import Strategy

MEASURES = ("class_il_accuracy", "task_il_accuracy")


@dataclass(frozen=True)
class AccuracyMatrix:
    """Accuracies, one row for each arrival; :meth:`after` adds a row and returns a new matrix."""

    arrivals: tuple[str, ...] = ()
    """Clients in the order in which they came."""
    rows: tuple[Mapping[str, float], ...] = ()
    """Accuracy by client, in [0, 1], after each arrival; missing: it was not measured."""

    def after(self, client: str, accuracies: Mapping[str, float]) -> AccuracyMatrix:
        """Return the matrix with one row more, of all that measured the model at an arrival."""
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
        """The matrix and the measures that follow from it, as JSON values."""
        return {
            "arrivals": list(self.arrivals),
            "matrix": [[row.get(client) for client in self.arrivals] for row in self.rows],
            "course": self.course,
            "average": self.average,
            "final": self.final,
            "forgetting": self.forgetting,
        }


class Arrivals(Strategy):
    """Fits, composes and measures for one client after the other, in the order of names."""

    def run(self) -> None:
        """Let every client arrive; ``fitting`` and ``composing`` are then those of the last one."""
        self.matrices = {measure: AccuracyMatrix() for measure in MEASURES}
        self.identify()
        coming = self.roster.newcomers
        arrived = self._recall(coming)
        for client in coming:
            if client in arrived:
                continue
            with self.exchange.books.during(client):
                if folders := self._fit(client):
                    self.arrive(client, folders)
        # What a client that failed last left behind.
        shutil.rmtree(self.fitting.contributions, ignore_errors=True)
        self.exchange.require_clients("train", self.trained)

    def fit(self) -> list[Path]:
        """Not used: :meth:`run` fits the clients in turn."""
        raise NotImplementedError

    def _recall(self, coming: Iterable[str]) -> tuple[str, ...]:
        """Restore the arrivals that were over when the run was interrupted, all but the last.

        The last one is repeated, from the answers that were kept.

        Returns:
            Who need not arrive again.
        """
        if self.working.resumed and self.config.registry.replace:
            raise ConfigError(
                "`schedule = sequential` with `replace` cannot be resumed; start it anew."
            )
        there = [c for c in coming if self.working.resumed and c in self.registry.clients]
        steps = {step["client"]: step for step in self.working.steps}
        arrived = tuple(there[:-1])
        for client in arrived:
            with self.exchange.books.during(client):
                self.roster.gather((client,))
            self.figures[client] = steps[client]["figures"]
            for measure, matrix in self.matrices.items():
                self.matrices[measure] = matrix.after(client, steps[client]["rows"][measure])
        self.trained = arrived
        return arrived

    def _fit(self, client: str) -> list[Path]:
        """Let one client train; returns its contribution's folder, or none if the client failed."""
        if client not in self.exchange.clients:  # it failed when it measured as a member
            return []
        self.roster.take_turn(client, {*self.working.members, *self.trained})
        self.fitting = self.new_fitting()
        try:
            self.fitting.run()
        except ContributionError:
            if client in self.exchange.clients:
                raise
        if client not in self.exchange.clients:
            return []
        self.trained = (*self.trained, client)
        return [self.fitting.folder(client)]

    def arrive(self, client: str, folders: list[Path]) -> None:
        """Add a client's contribution to the registry, and measure the composed model."""
        self.composing = Composing(self.exchange, self.backbone, self.registry)
        self.exchange.books.timed("compose", lambda: self.compose(folders))
        self.look(decisive=False)
        rows = {
            measure: {c: figures[measure] for c, figures in self.composing.figures.items()}
            for measure in MEASURES
        }
        for measure, matrix in self.matrices.items():
            self.matrices[measure] = matrix.after(client, rows[measure])
        if client not in [step["client"] for step in self.working.steps]:
            figures = self.figures.get(client, {})
            self.working.step({"client": client, "rows": rows, "figures": figures})

    def report(self) -> dict[str, Any]:
        """Accuracy after each arrival."""
        return {"arrivals": {measure: m.as_json() for measure, m in self.matrices.items()}}
