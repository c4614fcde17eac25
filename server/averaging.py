r"""FedAvg and FedProx: baselines, by Flower's own strategies.

.. math:: p \leftarrow \sum_c \frac{n_c}{\sum_s n_s}\,p_c

In each round all clients train one model further, from the same parameters p. The server averages
what they send, weighted by their numbers of examples (McMahan et al., AISTATS 2017, arXiv
1602.05629), as far as `max-count-ratio` lets these count. FedProx adds
:math:`\tfrac\mu2\lVert p_c - p\rVert^2` to a client's loss (Li et al., MLSys 2020, arXiv
1812.06127).

p is the parameters of one task vector and a head of all classes, which starts at zero, or as the
joint head of all clients' statistics (`head-start`). The factors A and B of a LoRA are averaged
separately, as FedAvg does: :math:`\bar B\bar A` is not the mean of the products. All
clients start from the same A, drawn by the seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedProx

from fedcompo.backbone.backbone import Backbone
from fedcompo.composition.settings import CompositionSettings
from fedcompo.composition.timm_folder import export_timm
from fedcompo.config.choices import HeadStart, Kind, Method, Schedule, kinds_of
from fedcompo.config.run import RunConfig
from fedcompo.config.setting import names_of
from fedcompo.errors import ConfigError, ContributionError
from fedcompo.messages.answers import AveragingAnswer, EvaluateAnswer
from fedcompo.messages.body import Body
from fedcompo.messages.requests import AveragingRequest, EvaluateRequest
from fedcompo.method.deltas import Weights, new_deltas
from fedcompo.method.heads import Head, zero_head
from fedcompo.method.task_vector import TaskVector
from fedcompo.registry.admission import rounding_of
from fedcompo.registry.company import Company
from fedcompo.seeds import generator_for
from server.exchange.checks import checked_losses, measured_in
from server.exchange.exchange import Exchange
from server.exchange.exchange_grid import ExchangeGrid
from server.phases import roster
from server.phases.roster import Roster
from server.phases.weight import leave_out_strange, weighed

METHODS = (Method.FEDAVG, Method.FEDPROX)
NO_REGISTRY = (
    "There is no registry: what was averaged over rounds cannot be taken apart, so no client can "
    "be removed, and none can be specialised on."
)


@dataclass
class Averaging:
    """A run in which all clients train one model, in rounds."""

    exchange: Exchange
    config: RunConfig
    backbone: Backbone
    output: Path
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What clients reported, by client."""
    answers: dict[str, EvaluateAnswer] = field(default_factory=dict)
    """Whole, of the last measurement, by client."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """By round: who trained, and the mean loss over all their examples."""

    def __post_init__(self) -> None:
        """Refuse settings that allow no averaging, before any client is asked."""
        self.kind = _only_kind(self.config)
        alone = Company.on(self.backbone, CompositionSettings.of(self.config))
        self.roster = Roster(self.exchange, self.backbone, lambda: alone)
        self.folder = self.output / "model"

    def run(self) -> None:
        """Do all phases; afterwards the model lies in its folder."""
        self.describe()
        self.measure("evaluate frozen", {}, self.aligned, prefix="frozen_")
        self.train()
        export_timm(self.folder, self.backbone, self.theta, self.head)
        self.exchange.books.note(NO_REGISTRY)
        self.measure("evaluate", self.theta, self.head, decisive=False)
        if not self.exchange.clients:
            self.exchange.require_clients("evaluate")

    def describe(self) -> None:
        """Ask clients what their classes look like; settle who takes part; make the joint head."""
        self.roster.gather()
        self.roster.exclude(names_of(self.config.server.exclude))
        leave_out_strange(self.roster, self.exchange.clients)
        for client in self.exchange.clients:
            wanted = self.roster.participants.described[client].kind
            if wanted not in (None, self.kind):
                reason = f"It insists on the kind {wanted}; what is averaged is of {self.kind}."
                self.exchange.leave_out("describe", client, reason)
        self.exchange.require_clients("describe")
        self.roster.note_names({})
        settings, statistics = weighed(self.roster, CompositionSettings.of(self.config))
        described = self.roster.participants.described
        self.weights = {c: min(described[c].num_examples, settings.client_cap) for c in statistics}
        self.aligned = self.roster.align(statistics, self.config)

    def start(self) -> AveragingRequest:
        """The request that all clients start from: a task vector that is zero, and a head."""
        generator = generator_for(self.config.seed, "averaging")
        deltas = new_deltas(
            self.kind, self.backbone.theta_0, rank=self.config.train.rank, generator=generator
        )
        vector = TaskVector.of(self.kind, deltas, base=self.backbone.fingerprint)
        return AveragingRequest(
            kind=self.kind,
            task_vector=vector.tensors,
            joint=self._start(),
            rounds=self.config.method.num_server_rounds,
            number=1,
        )

    def _start(self) -> Head:
        """The head that all clients start from: it must be the same for all."""
        if self.config.train.head_start in (HeadStart.ALIGNED, HeadStart.PROBE):
            return self.aligned
        return zero_head(self.aligned.classes, self.backbone.num_features)

    def train(self) -> None:
        """Do all rounds."""
        start, settings = self.start().to_body()  # the strategy counts the rounds
        self._shapes = {name: tensor.shape for name, tensor in start.items()}
        result = self.strategy().start(
            ExchangeGrid(self.exchange, self.read),
            ArrayRecord(start),
            num_rounds=self.config.method.num_server_rounds,
            train_config=ConfigRecord(settings),
        )
        self.trained = self.exchange.clients
        self.history = [
            {
                "round": number,
                "trained": sorted(self.exchange.books.traffic[f"train, round {number}"]),
                "mean_loss": metrics["loss"],
            }
            for number, metrics in result.train_metrics_clientapp.items()
        ]
        parameters = dict(result.arrays.to_torch_state_dict())
        self.num_parameters = sum(tensor.numel() for tensor in parameters.values())
        averaged = AveragingRequest.from_body((parameters, settings))
        vector = TaskVector(self.kind, averaged.task_vector, self.backbone.fingerprint)
        theta_0 = self.backbone.theta_0
        changes = vector.dense(theta_0)
        self.theta: Weights = {name: theta_0[name] + change for name, change in changes.items()}
        self.head = averaged.joint

    def strategy(self) -> FedAvg:
        """Flower's strategy: all clients in each round, at least ``min-clients``.

        The exchange ends the run where fewer are left, so Flower never waits for more.
        """
        least = self.exchange.min_clients
        sampling = {
            "fraction_evaluate": 0.0,
            "min_train_nodes": least,
            "min_available_nodes": least,
        }
        if self.config.method.method is Method.FEDAVG:
            return FedAvg(**sampling)
        return FedProx(**sampling, proximal_mu=self.config.method.proximal_mu)

    def read(self, client: str, body: Body) -> RecordDict:
        """Check a client's answer, keep its figures, and turn it into a reply for the strategy.

        Raises:
            ContributionError: If its tensors are not those that were sent, trained further.
        """
        answer = AveragingAnswer.from_body(body)
        vector = TaskVector(answer.kind, answer.task_vector, answer.base)
        company, owner = self.roster.others(), f"client {client!r}"
        vector.check_names(company.shapes, base=company.base, owner=owner)
        rounding_of(client, vector, company)
        shapes = {name: tensor.shape for name, tensor in answer.tensors.items()}
        if shapes != self._shapes:
            differing = sorted({*shapes.items()} ^ {*self._shapes.items()})
            raise ContributionError(
                f"Client {client!r} sent other tensors than it was given; first difference: "
                f"{differing[0]}. Use the same fedcompo version everywhere."
            )
        classes = self.aligned.classes
        answer.head(classes).check(classes, self.backbone.num_features, owner)
        losses = checked_losses(client, answer)
        metrics = {"num-examples": self.weights[client], "loss": losses[-1]}
        arrays = ArrayRecord({name: tensor.float() for name, tensor in answer.tensors.items()})
        record = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})
        known = self.figures[client].get("losses", [])
        self.figures[client]["losses"] = [*known, *losses]
        return record

    def measure(
        self, phase: str, theta: Weights, joint: Head, *, prefix: str = "", decisive: bool = True
    ) -> None:
        """Let every client measure a model on its own test images.

        Without weights it is the frozen backbone. The prefix stands before the figures' names.
        """
        self.answers = {}
        last = phase == "evaluate" or None
        request = EvaluateRequest(theta=theta, joint=joint, linearised=False, last=last).to_body()

        def fold(client: str, body: Body) -> str:
            own = self.roster.participants.described[client].classes
            self.answers[client], figures = measured_in(client, body, own, joint.classes)
            known = self.figures.setdefault(client, {})
            known |= {f"{prefix}{name}": value for name, value in figures.items()}
            return client

        self.exchange.ask(phase, "evaluate", lambda c: request, fold, decisive=decisive)


def phases_of(config: RunConfig) -> tuple[str, ...]:
    """The phases of averaging."""
    return (*roster.phases_of(config), "evaluate frozen", "train", "evaluate")


def _only_kind(config: RunConfig) -> Kind:
    """The kind of task vector; raises ``ConfigError`` if these settings allow no averaging."""
    method, kinds = config.method.method, kinds_of(config.train.kind)
    if len(set(kinds)) > 1 or Kind.TANGENT in kinds:
        raise ConfigError(
            f"`method = {method}` averages parameters of one kind, full, lora or ia3; `kind` is "
            f"{config.train.kind!r}. Name one of them, or use `method = ita`."
        )
    if config.method.schedule is Schedule.SEQUENTIAL:
        raise ConfigError(
            f"`method = {method}` trains everyone in each round; `schedule` is sequential. "
            "Use `schedule = parallel`, or `method = ita`."
        )
    if config.registry.registry:
        raise ConfigError(
            f"`method = {method}` yields no contributions that could join a registry; `registry` "
            f"is {config.registry.registry!r}. Leave it empty, or use `method = ita`."
        )
    return kinds[0]
