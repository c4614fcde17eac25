"""The first half of a run: every client describes itself, and fits its task vector alone.

Features → align → fisher → train. Where clients start from the joint head or are anchored by the
others, what one learns depends on who else is there. Where each starts from its own probe and is
anchored by its own Fisher or by a reference, it does not, to the last bit: its lineage is empty.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcompo.backbone import Backbone
from fedcompo.config import AnchorBy, HeadStart, RunConfig, kinds_of
from fedcompo.contribution import FISHER, Contribution, Lineage
from fedcompo.errors import ContributionError
from fedcompo.fisher import FisherDiagonal
from fedcompo.fisher_file import load_fisher, save_fisher
from fedcompo.heads import Head
from fedcompo.messages import Body, head_from, head_tensors, prefixed
from fedcompo.reference import load_reference
from fedcompo.registry import Registry
from fedcompo.settings import names_of
from server.alignment import Mixtures, align_joint_head
from server.anchors import Anchors
from server.checks import check_fisher, checked_fisher, checked_fractions, checked_task_vector
from server.exchange import Exchange
from server.roster import Roster

PHASES = ("features", "align", "fisher", "train")


@dataclass
class Fitting:
    """Asks for contributions; its phases are its methods, in the order of :data:`PHASES`."""

    exchange: Exchange
    config: RunConfig
    backbone: Backbone
    registry: Registry
    """Whose members the clients of this run join; nobody of them is trained again."""
    contributions: Path
    """Folder of the clients' contributions on their way to the registry, a sub-folder each."""
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What clients reported, by client."""

    def __post_init__(self) -> None:
        """Read what must be at hand before any client is asked; raises as reading it does."""
        self.roster = Roster(self.exchange, self.backbone)
        self.reference = self._read_reference()

    def run(self) -> None:
        """Do all phases; afterwards a contribution of each trained client is in its folder."""
        self.gather_features()
        self.aligned: Head = self.exchange.timed("align", self.align_heads)
        self.gather_fisher()
        self.train()

    @property
    def newcomers(self) -> tuple[str, ...]:
        """Clients still in the run that are to be trained, sorted."""
        return tuple(client for client in self.exchange.clients if client not in self.members)

    def folder(self, client: str) -> Path:
        """Where a client's contribution lies."""
        return self.contributions / client

    # -- features ---------------------------------------------------------------------------------

    def gather_features(self) -> None:
        """Ask every client what its classes look like; settle who takes part, with which kind.

        Kinds are dealt before anyone is excluded, so that excluding one shifts nobody else's.
        """
        self.roster.gather()
        self.kinds = self.roster.deal(kinds_of(self.config.train.kind))
        self.roster.exclude(names_of(self.config.server.exclude))
        self.members = self.registry.clients
        if self.config.registry.replace:
            self.members = tuple(c for c in self.members if c not in self.roster.described)
        self.roster.recognise({c: self.registry.member(c).classes for c in self.members})
        if not self.newcomers:
            raise ContributionError(
                f"All connected clients are in the registry {self.registry.path} already: "
                f"{', '.join(self.exchange.clients)}. Train them anew with `replace = true`, or "
                "start others."
            )

    # -- align ------------------------------------------------------------------------------------

    def align_heads(self) -> Head:
        """Fit the joint head to features drawn from everyone's mixtures."""
        self.described: dict[str, Mixtures] = {
            client: self.registry.contribution(client).features for client in self.members
        }
        self.described |= {c: self.roster.described[c].mixtures for c in self.newcomers}
        return align_joint_head(self.described, self.config, "align")

    @property
    def _starts_aligned(self) -> bool:
        return self.config.train.head_start is HeadStart.ALIGNED

    # -- fisher -----------------------------------------------------------------------------------

    def gather_fisher(self) -> None:
        """Ask for everyone's Fisher diagonal under the head it starts from; keep each on disk."""
        request: Body = {}, {}
        if self._starts_aligned:
            request = head_tensors(self.aligned), {"classes": list(self.aligned.classes)}
        asked = self.newcomers
        self.exchange.ask(
            "fisher", "query.fisher", lambda client: request, self._fold_fisher, clients=asked
        )
        known = [c for c in self.members if FISHER in self.registry.member(c).files]
        if without := sorted(set(self.members) - set(known)):
            self.exchange.note(
                f"The registry keeps no Fisher of {', '.join(without)}: the clients of this run "
                "are not anchored by theirs."
            )
        settings, members = self.config.train, (*known, *self.newcomers)
        self.anchors = Anchors.of(
            members, self._load_fisher, by=settings.anchor, reference=self.reference
        )
        if note := self.anchors.note(settings.alpha):
            self.exchange.note(note)

    def _fold_fisher(self, client: str, body: Body) -> str:
        starts_from = self.aligned if self._starts_aligned else self.roster.described[client]
        fisher = checked_fisher(client, body, self.backbone, starts_from.classes)
        report = dict(body[1]["report"])
        base = self.backbone.fingerprint
        save_fisher(self.folder(client) / FISHER, fisher, client=client, base=base)
        self.figures[client] = {"fisher": report}
        return client

    def _load_fisher(self, client: str) -> FisherDiagonal:
        if client in self.members:
            fisher = self.registry.contribution(client, with_fisher=True).fisher
            assert fisher is not None
            return fisher
        path = self.folder(client) / FISHER
        return load_fisher(path, client=client, base=self.backbone.fingerprint)

    def _read_reference(self) -> FisherDiagonal | None:
        if self.config.train.anchor is not AnchorBy.REFERENCE:
            return None
        path = Path(self.config.train.reference).expanduser()
        fisher = load_reference(path, base=self.backbone.fingerprint)
        check_fisher(fisher, self.backbone, (), f"the reference {path}")
        return fisher

    # -- train ------------------------------------------------------------------------------------

    def train(self) -> None:
        """Let every client fit its task vector, anchored near the pre-trained weights."""
        self.exchange.ask(
            "train", "train", self._train_request, self._fold_trained, clients=self.newcomers
        )
        self.trained = self.newcomers

    def _train_request(self, client: str) -> Body:
        """The anchor, and the joint head: to start from, or only to measure the frozen backbone."""
        tensors = head_tensors(self.aligned)
        mean = self.anchors.mean_for(client, self.roster.described[client].classes)
        if mean is not None:
            head = {"weight": mean.pop("head.weight"), "bias": mean.pop("head.bias")}
            tensors |= prefixed("anchor_head", head)
            tensors |= prefixed("anchor", mean) if self.config.train.alpha > 0 else {}
        manifest = {
            "classes": list(self.aligned.classes),
            "kind": str(self.kinds[client]),
            "anchored": mean is not None,
        }
        return tensors, manifest

    def _fold_trained(self, client: str, body: Body) -> str:
        tensors, manifest = body
        description = self.roster.described[client]
        vector = checked_task_vector(client, body, self.backbone)
        head = head_from(tensors, manifest["classes"])
        head.check(description.classes, self.backbone.num_features, f"client {client!r}")
        names = ("own_task_accuracy", "frozen_class_il_accuracy", "frozen_task_il_accuracy")
        figures = checked_fractions(client, manifest, names)
        losses = [float(loss) for loss in manifest["losses"]]
        contribution = Contribution(
            client=client,
            task_vector=vector,
            head=head,
            features=description.mixtures,
            num_examples=description.num_examples,
            lineage=self.lineage(client),
            fisher=self._load_fisher(client) if self.config.server.keep_fisher else None,
            settings=dict(self.config.of_client()),
        )
        contribution.save(self.folder(client))
        self.figures[client] |= {"losses": losses, **figures}
        return client

    def lineage(self, client: str) -> Lineage:
        """Whose data a client's contribution was made with, besides its own."""
        settings = self.config.train
        anchored = settings.alpha > 0 or settings.head_alpha > 0
        others = sorted(set(self.described) - {client})
        return Lineage(
            anchored_by=self.anchors.others(client) if anchored else (),
            aligned_with=tuple(others) if self._starts_aligned else (),
        )
