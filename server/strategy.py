"""ITA, in parallel: features → align → fisher → train → compose → realign → evaluate.

Every client trains alone, anchored by the mean Fisher of the *others*; the server adds up what
comes back. It holds no data: statistics, sums and task vectors are all it sees.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcompo.backbone import Backbone
from fedcompo.config import Coefficients, Kind, RunConfig, kinds_of
from fedcompo.contribution import (
    FISHER,
    Contribution,
    Lineage,
    load_fisher,
    save_fisher,
)
from fedcompo.deltas import Weights
from fedcompo.diagnostics import Diagnostics, diagnose
from fedcompo.errors import ContributionError
from fedcompo.features import FeatureMixture
from fedcompo.fisher import FisherDiagonal
from fedcompo.heads import Head, align, side_by_side
from fedcompo.messages import Body, head_from, head_tensors, prefixed
from fedcompo.names import check_client_name
from fedcompo.pool import Pool
from fedcompo.seeds import derive_seed
from server.checks import (
    check_backbone,
    checked_fisher,
    checked_fractions,
    checked_mixtures,
    checked_task_vector,
)
from server.exchange import Exchange

PHASES = ("features", "align", "fisher", "train", "compose", "realign", "evaluate")
CLIENTS = "clients"

Mixtures = dict[str, FeatureMixture]


@dataclass(frozen=True)
class Description:
    """What a client said of itself in the first phase."""

    classes: tuple[str, ...]
    mixtures: Mixtures
    num_examples: int
    num_test_examples: int
    kind: Kind | None
    """Kind of task vector it insists on."""


@dataclass
class ItaStrategy:
    """One run; its phases are its methods, in the order of :data:`PHASES`."""

    exchange: Exchange
    config: RunConfig
    backbone: Backbone
    output: Path
    described: dict[str, Description] = field(default_factory=dict)
    total: FisherDiagonal | None = None
    pool: Pool = field(default_factory=Pool)
    ambiguous: set[str] = field(default_factory=set)
    """Names that several nodes claimed."""
    realigned: dict[str, Mixtures] = field(default_factory=dict)
    """Mixtures of the composed model's features, by client."""
    head_is_realigned: bool = False
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Figures that clients reported, by client."""

    def run(self) -> None:
        """Do all phases; afterwards the attributes hold what there is to report."""
        self.gather_features()
        self.aligned = self.exchange.timed("align", self.align_heads)
        self.gather_fisher()
        self.train()
        self.exchange.timed("compose", self.compose)
        if self.config.compose.realign:
            self.realign()
        self.evaluate()

    # -- features ---------------------------------------------------------------------------------

    def gather_features(self) -> None:
        """Ask every client what its classes look like to the pre-trained backbone."""
        self.exchange.ask(
            "features", "query.features", lambda client: ({}, {}), self._fold_features
        )

    def _fold_features(self, client: str, body: Body) -> str:
        manifest = body[1]
        name = check_client_name(str(manifest["client"]))
        registered = self.exchange.registered.get(self.exchange.nodes[client])
        if registered and name != registered:
            raise ContributionError(
                f"The node registered as {registered!r} calls itself {name!r}; it must use the "
                "name under which it is registered."
            )
        self._refuse_twins(name)
        check_backbone(name, str(manifest["base"]), self.backbone)
        classes = tuple(manifest["classes"])
        mixtures = checked_mixtures(name, body, classes, self.backbone.num_features)
        kind = manifest.get("kind")
        self.described[name] = Description(
            classes=classes,
            mixtures=mixtures,
            num_examples=sum(mixture.num_examples for mixture in mixtures.values()),
            num_test_examples=int(manifest["num_test_examples"]),
            kind=Kind(kind) if kind else None,
        )
        return name

    def _refuse_twins(self, name: str) -> None:
        """Of two nodes with one name, neither can be trusted to be that client."""
        reason = f"Two nodes call themselves {name!r}; give each node a name of its own."
        if name in self.described:
            del self.described[name]
            self.ambiguous.add(name)
            cost = self.exchange.traffic["features"].pop(name)
            self.exchange.leave_out("features", name, reason, cost)
        if name in self.ambiguous:
            raise ContributionError(reason)

    # -- align ------------------------------------------------------------------------------------

    def align_heads(self) -> Head:
        """Fit the joint head to features drawn from everyone's mixtures."""
        return self._align("align", {c: self.described[c].mixtures for c in self.clients})

    def _align(self, purpose: str, described: Mapping[str, Mixtures]) -> Head:
        by_class: dict[str, list[FeatureMixture]] = {}
        for client in sorted(described):
            for name, mixture in described[client].items():
                by_class.setdefault(name, []).append(mixture)
        settings = self.config.head
        return align(
            by_class,
            sorted(by_class),
            samples=settings.align_samples,
            ridge=settings.ridge,
            seed=derive_seed(self.config.seed, purpose),
        )

    # -- fisher -----------------------------------------------------------------------------------

    def gather_fisher(self) -> None:
        """Sum up everyone's Fisher diagonal under the aligned head; keep each on disk."""
        request = head_tensors(self.aligned), {"classes": list(self.aligned.classes)}
        self.exchange.ask("fisher", "query.fisher", lambda client: request, self._fold_fisher)
        # In the order of names, so that no bit depends on who answered first.
        for client in self.clients:
            fisher = load_fisher(self.folder(client) / FISHER, client=client)
            self.total = fisher if self.total is None else self.total + fisher

    def _fold_fisher(self, client: str, body: Body) -> str:
        fisher = checked_fisher(client, body, self.backbone, self.aligned)
        report = dict(body[1]["report"])
        save_fisher(self.folder(client) / FISHER, fisher, client=client)
        self._note(client, fisher=report)
        return client

    # -- train ------------------------------------------------------------------------------------

    def train(self) -> None:
        """Let every client fit its task vector, anchored by the mean Fisher of the others."""
        self.trained_by = self.clients
        self.kinds = self._deal_kinds()
        self.exchange.ask("train", "train", self._train_request, self._fold_trained)

    def _deal_kinds(self) -> dict[str, Kind]:
        dealt = kinds_of(self.config.train.kind)
        return {
            client: self.described[client].kind or dealt[index % len(dealt)]
            for index, client in enumerate(self.clients)
        }

    def _train_request(self, client: str) -> Body:
        assert self.total is not None
        own = load_fisher(self.folder(client) / FISHER, client=client)
        mean = (self.total - own).mean()
        tensors = head_tensors(self.aligned)
        tensors |= {
            "anchor_head/weight": mean.pop("head.weight"),
            "anchor_head/bias": mean.pop("head.bias"),
        }
        if self.config.train.alpha > 0:
            tensors |= prefixed("anchor", mean)
        manifest = {
            "classes": list(self.aligned.classes),
            "kind": str(self.kinds[client]),
            "anchored": len(self.trained_by) > 1,
        }
        return tensors, manifest

    def _fold_trained(self, client: str, body: Body) -> str:
        tensors, manifest = body
        description = self.described[client]
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
            lineage=self._lineage(client),
            fisher=self._fisher_to_keep(client),
            settings=self.config.flat(),
        )
        contribution.save(self.folder(client))
        # Read back, its tensors are mapped from the file: memory holds one contribution at a time.
        saved = Contribution.load(self.folder(client), with_fisher=False)
        self.pool = self.pool.add(saved)
        self._note(client, losses=losses, **figures)
        return client

    def _fisher_to_keep(self, client: str) -> FisherDiagonal | None:
        if not self.config.server.keep_fisher:
            return None
        return load_fisher(self.folder(client) / FISHER, client=client)

    def _lineage(self, client: str) -> Lineage:
        others = tuple(name for name in self.trained_by if name != client)
        settings = self.config.train
        anchored = settings.alpha > 0 or settings.head_alpha > 0
        aligned = tuple(name for name in self.described_at_align if name != client)
        return Lineage(anchored_by=others if anchored else (), aligned_with=aligned)

    # -- compose ----------------------------------------------------------------------------------

    def compose(self) -> None:
        """Add the task vectors up, and measure them against each other."""
        for client in set(self.described) - set(self.clients):
            shutil.rmtree(self.folder(client), ignore_errors=True)
        settings = self.config.compose
        by_examples = settings.coefficients is Coefficients.EXAMPLES
        self.coefficients = self.pool.by_examples() if by_examples else self.pool.uniform()
        theta_0 = self.backbone.theta_0
        self.theta_p: Weights = self.pool.compose(
            theta_0, self.coefficients, scale=settings.scale, base=self.backbone.fingerprint
        )
        assert self.total is not None
        mean = self.total.mean()
        self.diagnostics: Diagnostics = diagnose(self.pool, theta_0, mean, self.coefficients)
        for client in self.diagnostics.outliers:
            self.exchange.note(
                f"The task vector of {client} stands out by its length, or opposes the others: "
                "look at its data and its learning rate."
            )
        classes = sorted({name for c in self.pool for name in c.head.classes})
        self.joint_head = side_by_side([(c.head, _examples(c)) for c in self.pool], classes)

    # -- realign ----------------------------------------------------------------------------------

    def realign(self) -> None:
        """Align the joint head again, on mixtures of the composed model's features."""
        members = self.clients
        self.exchange.ask(
            "realign", "query.realign", self._theta_request, self._fold_realigned, decisive=False
        )
        missing = sorted(set(members) - set(self.realigned))
        if missing:
            self.exchange.note(
                f"The joint head was not aligned again: {', '.join(missing)} did not describe the "
                "composed model's features. The clients' trained heads stand side by side."
            )
            return
        self.joint_head = self._align("realign", self.realigned)
        self.head_is_realigned = True

    def _theta_request(self, client: str) -> Body:
        return prefixed("theta", self.theta_p), {}

    def _fold_realigned(self, client: str, body: Body) -> str:
        self.realigned[client] = checked_mixtures(
            client, body, self.described[client].classes, self.backbone.num_features
        )
        return client

    # -- evaluate ---------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Let every client measure the composed model on its own test images."""
        self.exchange.ask(
            "evaluate", "evaluate", self._evaluate_request, self._fold_evaluated, decisive=False
        )
        if not any("class_il_accuracy" in figures for figures in self.metrics.values()):
            self.exchange.nodes.clear()
            self.exchange.require_clients("evaluate")

    def _evaluate_request(self, client: str) -> Body:
        tensors = prefixed("theta", self.theta_p) | head_tensors(self.joint_head)
        return tensors, {"classes": list(self.joint_head.classes)}

    def _fold_evaluated(self, client: str, body: Body) -> str:
        figures = ("class_il_accuracy", "task_il_accuracy")
        self._note(client, **checked_fractions(client, body[1], figures))
        return client

    # -- shared -----------------------------------------------------------------------------------

    @property
    def clients(self) -> tuple[str, ...]:
        """Clients still in the run, sorted."""
        return self.exchange.clients

    @property
    def described_at_align(self) -> tuple[str, ...]:
        """Clients whose statistics shaped the aligned head, sorted."""
        return tuple(sorted(self.described))

    def folder(self, client: str) -> Path:
        """Where a client's contribution lies."""
        return self.output / CLIENTS / client

    def _note(self, client: str, **figures: Any) -> None:
        self.metrics[client] = {**self.metrics.get(client, {}), **figures}


def _examples(contribution: Contribution) -> dict[str, int]:
    return {name: mixture.num_examples for name, mixture in contribution.features.items()}
