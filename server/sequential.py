r"""Clients arrive one after the other; those who are there stay as they are.

This is the class-incremental protocol (Porrello et al., ICLR 2025, arXiv 2405.16350). Client t is
anchored by those before it (ITA), or trains inside their sum (IEL). Where clients share tasks
(:mod:`fedcompo.data.tasks`), all members of a task arrive together: the federated class-incremental
protocol (Salami et al., ICLR 2025, arXiv 2410.17961). They train at the same time, each anchored by
the others and by those before; inside the sum there are only those before.

After each arrival t, all that are there measure the composed model: :math:`a_{t,i}` is the share of
the test images of arrival i that it classifies correctly, among all classes so far. From this
matrix follow

.. math:: A_t = \frac1t \sum_{i \le t} a_{t,i}, \qquad
   \bar A = \frac1T \sum_t A_t, \qquad
   F = \frac{1}{T-1} \sum_{i < T} \max_{t < T} \big(a_{t,i}\big) - a_{T,i}

the accuracy after t arrivals, the *average incremental accuracy* and the *forgetting* (Chaudhry et
al., ECCV 2018, arXiv 1801.10112). :math:`A_T` is the *final accuracy*.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedcompo.data.tasks import arrivals_of
from fedcompo.errors import ConfigError, ContributionError
from server.phases.composing import Composing
from server.strategy import Strategy

MEASURES = ("class_il_accuracy", "task_il_accuracy")


@dataclass(frozen=True)
class AccuracyMatrix:
    """Accuracies, one row for each arrival; :meth:`after` adds a row and returns a new matrix."""

    arrivals: tuple[str, ...] = ()
    """Clients, or tasks, in the order in which they came."""
    rows: tuple[Mapping[str, float], ...] = ()
    """Accuracy by client or task, in [0, 1], after each arrival; missing: it was not measured."""

    def after(self, arrival: str, accuracies: Mapping[str, float]) -> AccuracyMatrix:
        """Return the matrix with one row more, of all that measured the model at an arrival."""
        return AccuracyMatrix((*self.arrivals, arrival), (*self.rows, dict(accuracies)))

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
        """Mean loss of accuracy from an arrival's best; None until two were measured."""
        lost = [
            max(earlier) - self.rows[-1][arrival]
            for arrival in self.arrivals[:-1]
            if (earlier := [row[arrival] for row in self.rows[:-1] if arrival in row])
            and arrival in self.rows[-1]
        ]
        return fmean(lost) if lost else None

    def as_json(self) -> dict[str, object]:
        """The matrix and the measures that follow from it, as JSON values."""
        return {
            "arrivals": list(self.arrivals),
            "matrix": [[row.get(arrival) for arrival in self.arrivals] for row in self.rows],
            "course": self.course,
            "average": self.average,
            "final": self.final,
            "forgetting": self.forgetting,
        }


class Arrivals(Strategy):
    """Fits, composes and measures for one arrival after the other."""

    def run(self) -> None:
        """Let everyone arrive; ``fitting`` and ``composing`` are then those of the last arrival."""
        self.matrices = {measure: AccuracyMatrix() for measure in MEASURES}
        self.identify()
        self.coming = arrivals_of(self.roster.newcomers)
        arrived = self._recall()
        for arrival, members in self.coming.items():
            if arrival in arrived:
                continue
            with self.exchange.books.during(arrival):
                if folders := self._fit(members):
                    self.arrive(arrival, folders)
        # What a client that failed last left behind.
        shutil.rmtree(self.fitting.contributions, ignore_errors=True)
        self.exchange.require_clients("train", self.trained)

    def fit(self) -> list[Path]:
        """Not used: :meth:`run` fits the clients in turn."""
        raise NotImplementedError

    def _recall(self) -> tuple[str, ...]:
        """Restore the arrivals that were over when the run was interrupted, all but the last.

        The last one is repeated, from the answers that were kept.

        Returns:
            Which need not be repeated.
        """
        if not self.working.resumed:
            return ()
        if self.config.registry.replace:
            raise ConfigError(
                "`schedule = sequential` with `replace` cannot be resumed; start it anew."
            )
        there = [a for a, members in self.coming.items() if {*members} & {*self.registry.clients}]
        steps = {step["arrival"]: step for step in self.working.steps}
        for arrival in there[:-1]:
            members = tuple(c for c in self.coming[arrival] if c in self.registry.clients)
            with self.exchange.books.during(arrival):
                self.roster.gather(members)
            self.figures |= steps[arrival]["figures"]
            for measure, matrix in self.matrices.items():
                self.matrices[measure] = matrix.after(arrival, steps[arrival]["rows"][measure])
            self.trained = (*self.trained, *members)
        return tuple(there[:-1])

    def _fit(self, members: tuple[str, ...]) -> list[Path]:
        """Let the members of an arrival train; returns the contributions' folders."""
        members = tuple(c for c in members if c in self.exchange.clients)
        if not members:  # they failed when they measured, as members
            return []
        self.roster.take_turn(members, {*self.working.members, *self.trained})
        self.fitting = self.new_fitting()
        try:
            self.fitting.run()
        except ContributionError:
            if {*members} & {*self.exchange.clients}:
                raise
        came = tuple(c for c in members if c in self.exchange.clients)
        self.trained = (*self.trained, *came)
        return [self.fitting.folder(client) for client in came]

    def arrive(self, arrival: str, folders: list[Path]) -> None:
        """Add contributions to the registry, and measure the composed model."""
        self.composing = Composing(self.exchange, self.backbone, self.registry)
        self.exchange.books.timed("compose", lambda: self.compose(folders))
        self.look(decisive=False, last=arrival == [*self.coming][-1])
        rows = {measure: self._row(measure) for measure in MEASURES}
        for measure, matrix in self.matrices.items():
            self.matrices[measure] = matrix.after(arrival, rows[measure])
        if arrival not in [step["arrival"] for step in self.working.steps]:
            figures = {f.name: self.figures[f.name] for f in folders if f.name in self.figures}
            self.working.step({"arrival": arrival, "rows": rows, "figures": figures})

    def _row(self, measure: str) -> dict[str, float]:
        """Accuracy on the test images of each arrival, of all its members that measured."""
        figures, tests = self.composing.figures, self.roster.participants.tests
        row: dict[str, float] = {}
        for arrival, members in arrivals_of(figures).items():
            hits = sum(figures[c][measure] * tests[c] for c in members)
            row[arrival] = (
                hits / sum(tests[c] for c in members)
                if len(members) > 1
                else figures[members[0]][measure]
            )
        return row

    def report(self) -> dict[str, Any]:
        """Accuracy after each arrival, and who the members of each are where they share tasks."""
        matrices = {measure: m.as_json() for measure, m in self.matrices.items()}
        shared = {a: list(m) for a, m in arrivals_of(self.registry.clients).items() if m != (a,)}
        return {"arrivals": matrices, **({"tasks": shared} if shared else {})}
