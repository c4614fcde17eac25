"""Measures any weights as a run measures its own: realigned joint head, then every client's test.

Here all clients' images are at hand, as in a simulation, so what a federation asks its clients is
computed in one place, from the same seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from joint import described
from torch import Tensor

from fedcompo.audit.evaluation import clients_data, run_config_of
from fedcompo.backbone.backbone import Backbone
from fedcompo.composition.head import joint_head
from fedcompo.composition.models import stream_composition
from fedcompo.composition.scale import FactorBy
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData
from fedcompo.method.deltas import Weights
from fedcompo.method.heads import Head
from fedcompo.method.pool import Pool
from fedcompo.registry.registry import Registry
from fedcompo.training.accuracy import accuracy_of

Accuracies = dict[str, tuple[float, float]]
"""Class-IL and task-IL by client."""


@dataclass(frozen=True)
class Bench:
    """A finished run's registry, with all that it was trained on."""

    path: Path
    """Folder of the registry."""

    @cached_property
    def registry(self) -> Registry:
        """The registry."""
        return Registry(self.path)

    @cached_property
    def backbone(self) -> Backbone:
        """The pre-trained weights."""
        return self.registry.backbone.load()

    @cached_property
    def config(self) -> RunConfig:
        """Settings of the run."""
        return run_config_of(self.registry)

    @cached_property
    def pool(self) -> Pool:
        """The clients' contributions."""
        return self.registry.pool(with_fisher=True)

    @cached_property
    def data(self) -> dict[str, ClientData]:
        """Every member's images, by client."""
        found = clients_data(self.config.data, self.backbone, seed=self.config.seed)
        return {data.name: data for data in found if data.name in self.registry.clients}

    def composed(self, pool: Pool) -> Weights:
        """Some of the members' task vectors, composed as the registry would after a removal."""
        stored, settings = self.registry.backbone, self.registry.settings
        voted = self.registry.factor if self.registry.factor_by == FactorBy.VOTE else None
        return dict(stream_composition(pool, stored, None, settings, voted))

    def head(self, theta: Mapping[str, Tensor], clients: Iterable[str]) -> Head:
        """The joint head, made of the features of some weights, as clients would describe them.

        Args:
            theta: Target weights by name.
            clients: Whose classes it knows.
        """
        datas = [self.data[client] for client in clients]
        statistics = described(
            self.backbone,
            dict(theta),
            datas,
            self.config,
            purpose="realign",
            linearised=self.registry.linearised,
        )
        shrinkage = self.registry.shrinkage
        return joint_head(statistics, self.registry.settings, shrinkage=shrinkage)

    def accuracies(
        self, theta: Mapping[str, Tensor], head: Head, clients: Iterable[str]
    ) -> Accuracies:
        """Class-IL and task-IL on clients' test images."""
        found = {}
        for client in clients:
            data = self.data[client]
            accuracy = accuracy_of(
                self.backbone,
                dict(theta),
                head,
                data.classes,
                data.test,
                linearised=self.registry.linearised,
            )
            found[client] = accuracy.class_il, accuracy.task_il
        return found
