"""Keep the clients' Fisher diagonals on disk, and sum them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcompo.backbone.backbone import Backbone
from fedcompo.composition.settings import most_of
from fedcompo.config.choices import AnchorBy, Curvature, HeadStart, Penalty
from fedcompo.config.run import RunConfig
from fedcompo.data.tasks import whole_of
from fedcompo.errors import ContributionError
from fedcompo.messages.answers import FisherAnswer
from fedcompo.messages.body import Body
from fedcompo.messages.requests import FisherRequest
from fedcompo.method.deltas import Weights
from fedcompo.method.fisher import FisherDiagonal, expanded
from fedcompo.method.fisher_file import load_fisher, save_fisher
from fedcompo.method.heads import Head
from fedcompo.method.penalties import ita_penalty
from fedcompo.method.task_vector import TaskVector
from fedcompo.registry.registry import Registry
from fedcompo.runtime import one_thread
from fedcompo.storage.files import FISHER
from fedcompo.training.anchors import FisherSums
from fedcompo.training.probing import load_reference
from server.exchange.checks import checked_fisher, too_large
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
        self.sums: FisherSums | None = None
        self._traces: dict[str, float] = {}
        self._too_large: set[str] = set()

    def gather(self, clients: Collection[str], head: Head, *, decisive: bool = True) -> None:
        """Ask for Fisher diagonals of the class probabilities under a head; keep each on disk.

        If it is decisive, it fails if nobody sends one, or too few clients are left then.
        """
        request = FisherRequest(joint=head).to_body()

        def fold(client: str, body: Body) -> str:
            self.keep(client, FisherAnswer.from_body(body))
            return client

        self.exchange.ask(
            "fisher",
            "query.fisher",
            lambda client: request,
            fold,
            decisive=decisive,
            clients=clients,
        )
        if decisive and not set(clients) & set(self.exchange.clients):
            raise ContributionError(f"No Fisher came of {', '.join(clients) or 'any client'}.")

    def keep(self, client: str, answer: FisherAnswer) -> None:
        """Check a client's Fisher, and write it to its file; none if it sent none."""
        fisher, file = checked_fisher(client, answer, self.backbone), self._file(client)
        self.registry.settings.made_by.require({client: fisher})
        self._traces.pop(client, None)
        if fisher is None:
            file.unlink(missing_ok=True)
        else:
            save_fisher(file, fisher, client=client, base=self.backbone.fingerprint)
        self.figures.setdefault(client, {})["fisher"] = answer.report

    def sum_up(self, *, notes: bool = False) -> None:
        """Sum the known Fisher diagonals of all that take part; note what readers should know."""
        known = self._known_members()
        parties = [c for c in self.roster.parties if self._file(c).exists()]
        everyone, by = self._without_too_large([*known, *parties]), self.config.train.anchor
        fewest = self.config.caps.min_others
        self.sums = None
        if everyone:
            weighed = self._weighed(everyone)
            self.sums = FisherSums(tuple(everyone), weighed, by, self.reference, fewest)
        if not notes:
            return
        if without := sorted(set(self.roster.participants.members) - set(known)):
            self.exchange.books.note(
                f"The registry keeps no Fisher of {', '.join(without)}, or one of another "
                "`curvature`: the clients of this run are not anchored by theirs."
            )
        if self.sums is None and self.held:
            self.exchange.books.note("There is no Fisher of any client: nobody is anchored.")
        if self.sums and self.held and by is AnchorBy.OTHERS:
            self._note_few(self.sums.members)
        if self.config.train.penalty is Penalty.IMPLICIT:
            return  # whose strength does not depend on the scale of the Fisher
        setting = "beta" if self.ensembled else "alpha"
        if self.sums and (note := self.sums.note(self.strength, setting=setting)):
            self.exchange.books.note(note)

    def _note_few(self, members: Sequence[str]) -> None:
        """Note where a mean is of so few that it is one client's own, or is not used."""
        fewest = self.config.caps.min_others
        clients = {*map(whole_of, members)}
        if alone := [c for c in self.roster.parties if len(clients - {whole_of(c)}) < fewest]:
            self.exchange.books.note(
                f"Fewer than {fewest} other clients (`min-others`) sent a Fisher: "
                f"{', '.join(alone)} trained without an anchor."
            )
        elif len(clients) == 2:
            both = " and ".join(sorted(clients))
            self.exchange.books.note(
                f"Of two clients, the mean of the others is the other's: {both} "
                "were each given the other's own Fisher. Set `min-others` to 2 to give nobody that."
            )

    def known(self, client: str) -> FisherDiagonal | None:
        """Read a client's Fisher *sum*, if there is one of it."""
        return self.load(client) if self.sums and client in self.sums.members else None

    def load(self, client: str) -> FisherDiagonal:
        """Read a client's Fisher *sum*: from the registry, if it is a member."""
        if client in self.roster.participants.members:
            fisher = self.registry.contribution(client, with_fisher=True).fisher
            assert fisher is not None
            return fisher
        return load_fisher(self._file(client), client=client, base=self.backbone.fingerprint)

    def anchored(self, client: str) -> bool:
        """Whether a client is anchored at all."""
        if self.sums is None or not self.held:
            return False
        return self.sums.anchored(client, with_own=self.ensembled)

    def anchor_of(self, client: str) -> Weights:
        """The *mean* Fisher that anchors a client, in its form; empty if there is none."""
        if self.sums is None or not self.anchored(client):
            return {}
        return self.sums.mean_for(client, with_own=self.ensembled) or {}

    def distance(self, client: str, vector: TaskVector, variance: float) -> float | None:
        r"""Say how far a client went: :math:`\tau^\top\bar F\tau / \mathrm{tr}\,\mathrm{Cov}(f)`.

        To first order it is how much the task vector changes the features of the others' images,
        in units of their variance over the images of all clients. None where there is no Fisher of
        the features of others.
        """
        of_features = self.config.fisher.curvature is Curvature.FEATURES
        mean = self.sums.beside(client) if self.sums and of_features and variance > 0 else None
        if mean is None:
            return None
        theta_0 = self.backbone.theta_0
        metric = expanded(mean, theta_0)
        with one_thread():  # the last digits depend on their number
            parts = [
                float(ita_penalty({name: vector.delta(name, weight).cpu().double()}, metric, 2.0))
                for name, weight in theta_0.items()
            ]
        return sum(parts) / variance

    def anchored_by(self, client: str) -> tuple[str, ...]:
        """The other clients whose Fisher anchors a client."""
        return self.sums.others(client) if self.sums and self.held else ()

    @property
    def strength(self) -> float:
        """Strength of the anchor: β in IEL, else α."""
        return self.config.method.beta if self.ensembled else self.config.train.alpha

    @property
    def held(self) -> bool:
        """Whether a Fisher holds the clients at all."""
        return self.strength > 0 or self.config.train.bounded

    def _weighed(self, clients: Sequence[str]) -> Callable[[str], FisherDiagonal]:
        """Read Fisher sums, none of which counts by more examples than the settings allow."""
        counts = (self.load(client).num_examples for client in clients)
        most = most_of(counts, self.config.compose.max_count_ratio)
        return lambda client: self.load(client).capped(most)

    def _without_too_large(self, clients: Sequence[str]) -> list[str]:
        """Leave out whose Fisher is far too large to anchor others, and note it once by name."""
        if self.config.train.anchor is not AnchorBy.OTHERS:
            return list(clients)
        for client in clients:
            if client not in self._traces:
                self._traces[client] = self.load(client).mean_trace()
        large = too_large("Fisher", {client: self._traces[client] for client in clients})
        for client in sorted(large.keys() - self._too_large):
            self.exchange.books.note(f"{large[client]} It anchors nobody.")
        self._too_large |= large.keys()
        return [client for client in clients if client not in large]

    def _known_members(self) -> list[str]:
        """Members whose Fisher the registry keeps, and in the unit of this run's."""
        members = self.roster.participants.members
        kept = [client for client in members if FISHER in self.registry.member(client).files]
        return [client for client in kept if self._has_unit(client)]

    def _has_unit(self, client: str) -> bool:
        """Whether a member's Fisher is of what this run's are of: features, or probabilities."""
        own = RunConfig.stored(self.registry.card(client)["settings"]).fisher.curvature
        kinds = own, self.config.fisher.curvature
        return len({kind is Curvature.FEATURES for kind in kinds}) == 1

    def _file(self, client: str) -> Path:
        return self.contributions / client / FISHER

    def _read_reference(self) -> FisherDiagonal | None:
        if self.config.train.anchor is not AnchorBy.REFERENCE:
            return None
        path = Path(self.config.train.reference).expanduser()
        curvature = self.config.fisher.curvature
        fisher = load_reference(path, base=self.backbone.fingerprint, curvature=curvature)
        fisher.check(self.backbone.theta_0, owner=f"the reference {path}")
        return fisher


def fisher_apart(config: RunConfig) -> bool:
    """Whether the Fisher is asked for by itself: it is under the joint head, which comes before."""
    of_features = config.fisher.curvature is Curvature.FEATURES
    return not of_features and config.train.head_start is not HeadStart.PROBE
