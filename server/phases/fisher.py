"""Ask clients for their Fisher diagonals, keep them on disk, and sum them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcompo.backbone.backbone import Backbone
from fedcompo.config.choices import AnchorBy
from fedcompo.config.run import RunConfig
from fedcompo.errors import ContributionError
from fedcompo.messages.answers import FisherAnswer
from fedcompo.messages.body import Body
from fedcompo.messages.requests import FisherRequest, anchor_tensors
from fedcompo.method.contribution import load_fisher, save_fisher
from fedcompo.method.deltas import Weights
from fedcompo.method.fisher import HEAD, FisherDiagonal
from fedcompo.method.heads import Head
from fedcompo.registry.registry import Registry
from fedcompo.storage.files import FISHER
from fedcompo.training.anchors import FisherSums
from fedcompo.training.penalty import Anchor
from fedcompo.training.probing import load_reference
from server.exchange.checks import check_fisher, checked_fisher
from server.exchange.exchange import Exchange
from server.phases.roster import Roster


@dataclass
class Fishers:
    """Fisher diagonals of a run; computes the mean that anchors each client."""

    roster: Roster
    config: RunConfig
    registry: Registry
    """Its members' Fisher diagonals are in the sum, where it keeps them."""
    contributions: Path
    """Folder with a sub-folder for each client."""
    figures: dict[str, dict[str, Any]]
    """What clients report, by client; this phase adds the estimator's report."""
    ensembled: bool
    """Whether clients train inside the sum of the others."""

    def __post_init__(self) -> None:
        """Read the reference before any client is asked; raises if that fails."""
        self.exchange: Exchange = self.roster.exchange
        self.backbone: Backbone = self.roster.backbone
        self.reference = self._read_reference()

    def gather(
        self, clients: Collection[str], head: Head | None = None, *, decisive: bool = True
    ) -> None:
        """Ask for Fisher diagonals under the head that training starts from; keep each on disk.

        Args:
            clients: Whom to ask.
            head: The joint head, if training starts from it; None: each client uses its own.
            decisive: Fail if nobody sends one, or too few clients are left then.
        """
        request = FisherRequest(joint=head).to_body()
        self.exchange.ask(
            "fisher",
            "query.fisher",
            lambda client: request,
            lambda client, body: self._fold(client, body, head),
            decisive=decisive,
            clients=clients,
        )
        if decisive and not set(clients) & set(self.exchange.clients):
            raise ContributionError(f"No Fisher came of {', '.join(clients) or 'any client'}.")
        members = self.roster.participants.members
        if without := sorted(set(members) - set(self._known_members())):
            self.exchange.books.note(
                f"The registry keeps no Fisher of {', '.join(without)}: the clients of this run "
                "are not anchored by theirs."
            )
        self.sum_up()
        if note := self.sums.note(self.strength, setting="beta" if self.ensembled else "alpha"):
            self.exchange.books.note(note)

    def sum_up(self) -> None:
        """Sum the known Fisher diagonals of all that take part."""
        parties = [c for c in self.roster.parties if self._file(c).exists()]
        if everyone := (*self._known_members(), *parties):
            self.sums = FisherSums.of(
                everyone, self.load, by=self.config.train.anchor, reference=self.reference
            )

    def load(self, client: str) -> FisherDiagonal:
        """Read a client's Fisher *sum*: from the registry, if it is a member."""
        if client in self.roster.participants.members:
            fisher = self.registry.contribution(client, with_fisher=True).fisher
            assert fisher is not None
            return fisher
        return load_fisher(self._file(client), client=client, base=self.backbone.fingerprint)

    def anchor_of(self, client: str) -> Weights:
        """The *mean* Fisher that anchors a client, head rows included; empty if there is none."""
        classes = self.roster.participants.described[client].classes
        mean = self.sums.mean_for(client, classes, with_own=self.ensembled)
        if mean is None:
            return {}
        weight, bias = (mean.pop(name) for name in HEAD)
        held = self.strength > 0 and any(bool(f.any()) for f in mean.values())
        return anchor_tensors(Anchor(mean if held else {}, weight, bias))

    @property
    def strength(self) -> float:
        """Strength of the anchor: β in IEL, else α."""
        return self.config.method.beta if self.ensembled else self.config.train.alpha

    def _fold(self, client: str, body: Body, head: Head | None) -> str:
        described = self.roster.participants.described[client]
        answer = FisherAnswer.from_body(body)
        fisher = checked_fisher(client, answer, self.backbone, (head or described).classes)
        save_fisher(self._file(client), fisher, client=client, base=self.backbone.fingerprint)
        self.figures.setdefault(client, {})["fisher"] = answer.report
        return client

    def _known_members(self) -> list[str]:
        """Members whose Fisher the registry keeps."""
        members = self.roster.participants.members
        return [client for client in members if FISHER in self.registry.member(client).files]

    def _file(self, client: str) -> Path:
        return self.contributions / client / FISHER

    def _read_reference(self) -> FisherDiagonal | None:
        if self.config.train.anchor is not AnchorBy.REFERENCE:
            return None
        path = Path(self.config.train.reference).expanduser()
        fisher = load_reference(path, base=self.backbone.fingerprint)
        check_fisher(fisher, self.backbone, (), f"the reference {path}")
        return fisher
