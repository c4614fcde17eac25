r"""IEL: rounds in which clients train inside the sum of all, each its own task vector.

.. math:: \theta_P = \theta_0 + \lambda \Big(\sum_{s \ne c} w_s \tau_s + w_c \tau_c\Big)

is what client c trains, with only its own :math:`\tau_c` changing (Porrello et al., ICLR 2025,
arXiv 2405.16350, Eq. 17 to 19). It is sent the sum over the others, its share and the mean Fisher:
a message does not grow with the number of clients, nor does the memory of the server, which keeps
the sum and reads task vectors from disk.

A client may miss a round (its last task vector stays), join in a later one, or leave between two
(its task vector is taken out of the sum, exactly). What it sent last is what is composed in the
end.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from fedcompo import tensorfile
from fedcompo.config import RunConfig, rounds_of
from fedcompo.contribution import Lineage
from fedcompo.errors import TooFewClients
from fedcompo.heads import Head
from fedcompo.messages import Body, head_tensors, prefixed
from fedcompo.registry import Registry
from fedcompo.running_sum import RunningSum
from fedcompo.task_vector import TaskVector
from fedcompo.tensorstream import Section, StreamedTensors, save_streamed
from server.books import Traffic
from server.exchange import Exchange
from server.fitting import Fitting

ANCHOR, OWN = "anchor", "own"
"""What a client keeps between rounds, and is asked to use again."""


@dataclass
class Trace:
    """Whose data a client's task vector has seen in its rounds; names."""

    anchored_by: set[str] = field(default_factory=set)
    aligned_with: set[str] = field(default_factory=set)
    ensemble: set[str] = field(default_factory=set)


@dataclass
class Rounds:
    """Lets clients train in rounds, from what a :class:`Fitting` knows of them."""

    fitting: Fitting
    number: int
    """How many rounds."""
    folder: Path
    """Where the clients' last task vectors lie, a file each."""
    continuing: bool = False
    """Whether members of the registry go on from what they are there."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """By round: who is in the sum, who trained, who missed it, came or went; the mean loss."""

    def __post_init__(self) -> None:
        """Begin with the sum of the registry's members."""
        self.exchange: Exchange = self.fitting.exchange
        self.config: RunConfig = self.fitting.config
        self.registry: Registry = self.fitting.registry
        self.joins = rounds_of(self.config.server.joins)
        self.leaves = rounds_of(self.config.server.leaves)
        self.heads: dict[str, Head] = {}
        self.traces: dict[str, Trace] = {}
        self._digests: dict[tuple[str, str], str] = {}
        self._held: dict[str, dict[str, str]] = {}
        self._came: list[str] = []
        self._went: list[str] = []

    # -- who is there -----------------------------------------------------------------------------

    def seat_members(self) -> None:
        """Put the registry's members into the sum: as they are, or to go on from there."""
        theta_0, settings = self.fitting.backbone.theta_0, self.registry.settings
        vectors, times = {}, {}
        going_on = self.fitting.newcomers if self.continuing else ()
        for client in (*self.fitting.members, *going_on):
            contribution = self.registry.contribution(client)
            vectors[client] = contribution.task_vector
            times[client] = settings.times(contribution.num_examples)
            if client not in self.fitting.members:
                lineage = contribution.lineage
                self.heads[client] = contribution.head
                self.fitting.kinds[client] = contribution.task_vector.kind
                self.traces[client] = Trace(
                    set(lineage.anchored_by), set(lineage.aligned_with), set(lineage.ensemble)
                )
        self.sum = RunningSum.of(theta_0, vectors, times)

    def run(self) -> None:
        """Do all rounds; raises ``TooFewClients`` if one of them has nobody left to train."""
        self.seat_members()
        for number in range(1, self.number + 1):
            self.exchange.part = f"round {number}"
            self._came, self._went = [], []
            self.welcome(number)
            self.round(number)
            self.part_with([c for c, last in self.leaves.items() if last == number])
        self.exchange.part = ""
        self.drop_silent()

    @property
    def present(self) -> tuple[str, ...]:
        """Connected clients whose turn has come, sorted."""
        return tuple(c for c in self.fitting.newcomers if c in self.fitting.roster.described)

    def welcome(self, number: int) -> None:
        """Take note of who has come or gone since the round before; describe who is new."""
        roster = self.fitting.roster
        if number > 1:
            nodes, gone = self.exchange.look_again()
            for client in gone:
                self.exchange.note(f"{client} is not connected in round {number}; it misses it.")
            self.fitting.absent |= set(gone) & roster.described.keys()
            if nodes:
                roster.identify(nodes)
                self.fitting.absent -= set(self.exchange.clients)
        waiting = {client for client, first in self.joins.items() if first > number}
        connected = set(self.exchange.clients) - waiting - set(self.fitting.members)
        if new := sorted(connected - roster.described.keys()):
            self._came = new
            self.fitting.take_in(new)
            self._digests = {at: d for at, d in self._digests.items() if at[1] != ANCHOR}

    def part_with(self, clients: Iterable[str]) -> None:
        """Take clients out: of the sum, of the metric, of all that follows."""
        for client in clients:
            if client in self.sum.clients:
                self.sum.drop(client)
                self._file(client).unlink()
            if client in self.exchange.clients:
                reason = f"left after {self.exchange.part}; its task vector is out of the sum"
                self.exchange.leave_out("train", client, reason, Traffic(0, 0, 0.0))
            self._went.append(client)
            self.fitting.forget(client)
            self._digests = {at: d for at, d in self._digests.items() if at[1] != ANCHOR}

    def drop_silent(self) -> None:
        """Leave out who never sent a task vector."""
        for client in (*self.present, *sorted(self.fitting.absent)):
            if client in self.sum.clients:
                continue
            self.fitting.forget(client)
            if client in self.exchange.clients:
                reason = "sent no task vector in any round"
                self.exchange.leave_out("train", client, reason, Traffic(0, 0, 0.0))
        self.exchange.require_clients("train")

    # -- one round --------------------------------------------------------------------------------

    def round(self, number: int) -> None:
        """Let everyone who is there train, inside the sum as it is at the beginning."""
        asked = self.present
        if not asked:
            self.exchange.require_clients("train")
            raise TooFewClients(f"Nobody is there to train in round {number}.")
        self._number, self._together = number, self._count(asked)
        self._losses: dict[str, float] = {}
        lacking = self._ask(asked)
        if lacking:  # who lost what it was left to remember is sent all of it
            self._ask(lacking)
        inside = set(self.sum.clients)
        for client in sorted(self._losses):
            self._enter(client, inside)
        self.history.append(
            {
                "round": number,
                "members": list(self.sum.clients),
                "trained": sorted(self._losses),
                "missed": sorted(set(asked) - set(self._losses)),
                "came": self._came,
                "went": self._went,
                "mean_loss": fmean(self._losses.values()) if self._losses else None,
            }
        )
        if not self._losses:
            label = self.exchange.label("train")
            reasons = [
                f"  - {m.client}: {m.reason}" for m in self.exchange.missed if m.phase == label
            ]
            raise TooFewClients("\n".join([f"Nobody trained in round {number}:", *reasons]))

    def _ask(self, clients: tuple[str, ...]) -> tuple[str, ...]:
        """Ask clients to train; returns who cannot without being sent more.

        All see the sum of the round's beginning. What arrives waits, on disk, for the round's end.
        """
        lacking: list[str] = []

        def fold(client: str, body: Body) -> str:
            if lacks := body[1].get("lacks"):
                self._held.pop(client, None)
                lacking.append(client)
                names = " and ".join(map(str, lacks))
                self.exchange.note(f"{client} has lost what it kept ({names}); it is sent again.")
            else:
                self._check(client, body)
            return client

        self.exchange.ask(
            "train", "train", self._request, fold, may_miss=True, decisive=False, clients=clients
        )
        return tuple(sorted(lacking))

    def _count(self, asked: Iterable[str]) -> int:
        """M: how often all count who are in the sum, or are about to be."""
        times = dict(self.sum.times)
        for client in asked:
            times.setdefault(client, self._times(client))
        return sum(times.values())

    def _times(self, client: str) -> int:
        described = self.fitting.roster.described[client]
        return self.registry.settings.times(described.num_examples)

    def _request(self, client: str) -> Body:
        """The sum over the others, and what the client needs besides and does not hold."""
        fitting, together = self.fitting, self._together
        tensors = head_tensors(fitting.aligned)
        tensors |= prefixed("rest", self.sum.rest(client, together=together))
        needs: dict[str, str] = {}
        held = self._held.get(client, {})
        for name in self._needed(client):
            if (digest := self._digests.get((client, name), "")) != held.get(name) or not digest:
                wanted = self._wanted(client, name)
                digest = self._digests[client, name] = tensorfile.tensor_digest(wanted)
                tensors |= prefixed(name, wanted)
            needs[name] = digest
        manifest = {
            "classes": list(fitting.aligned.classes),
            "kind": str(fitting.kinds[client]),
            "frozen": client not in fitting.figures or "losses" not in fitting.figures[client],
            "federation": self.registry.identity,
            "needs": needs,
            "ensemble": {
                "share": self._times(client) / together,
                "scale": self.registry.settings.scale,
            },
            "course": {"passed": (self._number - 1) / self.number, "share": 1 / self.number},
            "round": self._number,
        }
        return tensors, manifest

    def _needed(self, client: str) -> list[str]:
        """What a client trains with that it may have kept from the round before."""
        anchored = [ANCHOR] if self.fitting.anchors.anchored(client, with_own=True) else []
        return [*anchored, OWN] if client in self.sum.clients else anchored

    def _wanted(self, client: str, name: str) -> dict[str, Tensor]:
        """The server's copy of it."""
        if name == ANCHOR:
            return self.fitting.anchor_of(client)
        own = self.sum.vectors[client].tensors
        return prefixed("task_vector", {n: own[n] for n in own}) | head_tensors(self.heads[client])

    def _check(self, client: str, body: Body) -> None:
        """Check what a client trained, and put it beside what it trained the last time."""
        vector, _ = self.fitting.check_trained(client, body)
        manifest = {"content": "round", "kind": str(vector.kind), "base": vector.base}
        tensors = {n: t for n, t in body[0].items() if n.split("/")[0] in ("task_vector", "head")}
        save_streamed(self._arriving(client), tensors, manifest)
        self._held[client] = dict(body[1].get("holds", {}))
        self._digests[client, OWN] = tensorfile.tensor_digest(tensors)
        self._losses[client] = float(body[1]["losses"][-1])

    def _enter(self, client: str, inside: set[str]) -> None:
        """Let what a client sent take the place of what it sent before, in the sum and on disk.

        Args:
            client: Who trained.
            inside: Whose task vectors were in the sum that it trained in.
        """
        path, arriving = self._file(client), self._arriving(client)
        vector, _ = self._read(client, arriving)
        self.sum.put(client, vector, times=self._times(client))
        tensorfile.put_in_place(arriving, path)
        self.sum.vectors[client], self.heads[client] = self._read(client, path)
        trace, lineage = self.traces.setdefault(client, Trace()), self.fitting.lineage(client)
        trace.anchored_by |= set(lineage.anchored_by)
        trace.aligned_with |= set(lineage.aligned_with)
        trace.ensemble |= inside - {client}

    def _read(self, client: str, path: Path) -> tuple[TaskVector, Head]:
        tensors = StreamedTensors(path)
        fitting = self.fitting
        vector = TaskVector(
            fitting.kinds[client], Section(tensors, "task_vector"), fitting.backbone.fingerprint
        )
        classes = fitting.roster.described[client].classes
        return vector, Head(classes, tensors["head/weight"], tensors["head/bias"])

    # -- what comes of it -------------------------------------------------------------------------

    @property
    def trained(self) -> tuple[str, ...]:
        """Clients of this run whose task vector is in the sum, sorted."""
        return tuple(client for client in self.sum.clients if client not in self.fitting.members)

    def keep(self) -> list[Path]:
        """Write the contributions of all who trained; returns their folders."""
        folders = []
        for client in self.trained:
            trace = self.traces[client]
            lineage = Lineage(
                method="iel",
                anchored_by=tuple(sorted(trace.anchored_by)),
                aligned_with=tuple(sorted(trace.aligned_with)),
                ensemble=tuple(sorted(trace.ensemble)),
            )
            self.fitting.keep(client, self.sum.vectors[client], self.heads[client], lineage)
            folders.append(self.fitting.folder(client))
        return folders

    def clear(self) -> None:
        """Remove the working files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, client: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{client}.safetensors"

    def _arriving(self, client: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{client}.arriving"
