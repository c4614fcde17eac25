"""Measures any weights as a run measures its own: realigned joint head, then every client's test.

Here all clients' images are at hand, as in a simulation, so what a federation asks its clients is
computed in one place, from the same seeds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from clients.local import LocalClient
from fedcompo.audit.evaluation import clients_data, run_config_of
from fedcompo.backbone.backbone import Backbone
from fedcompo.composition.head import head_of, joint_head
from fedcompo.config.run import RunConfig
from fedcompo.export.selection import from_registry
from fedcompo.method.deltas import Weights
from fedcompo.method.heads import Head
from fedcompo.method.pool import Pool
from fedcompo.registry.registry import Registry
from fedcompo.runtime import pick_device

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
        return self.registry.backbone.load(pick_device(self.config.device))

    @cached_property
    def config(self) -> RunConfig:
        """Settings of the run."""
        return run_config_of(self.registry)

    @cached_property
    def pool(self) -> Pool:
        """The clients' contributions."""
        return self.registry.pool(with_fisher=True)

    @cached_property
    def clients(self) -> dict[str, LocalClient]:
        """Every member with its images, by name."""
        config, backbone, wanted = self.config, self.backbone, self.registry.clients
        found = clients_data(config.data, backbone, seed=config.seed, wanted=wanted)
        return {data.name: LocalClient(data.name, config, backbone, data) for data in found}

    def composed(self, *clients: str) -> Weights:
        """Some of the members' task vectors, composed as the registry would after a removal."""
        return dict(from_registry(self.registry, only=clients).stream())

    def frozen_head(self, clients: Iterable[str]) -> Head:
        """The joint head of pre-trained features, of some clients' classes."""
        return head_of(self.pool.only(*clients), self.registry.settings)

    def head(self, theta: Weights, clients: Iterable[str]) -> Head:
        """The joint head, of some clients' classes, that the run would give to these weights.

        Of the features under these weights, unless the run did not realign.
        """
        if not self.registry.realigned:
            return self.frozen_head(clients)
        form, statistics = self.config.head.statistics, {}
        for name in clients:
            client = self.clients[name]
            statistics[name], _ = client.statistics(
                client.split[0],
                theta,
                form=form,
                purpose="realign",
                linearised=self.registry.linearised,
            )
        shrinkage = self.registry.state.shrinkage
        return joint_head(statistics, self.registry.settings, shrinkage=shrinkage)

    def accuracies(self, theta: Weights, head: Head, clients: Iterable[str]) -> Accuracies:
        """Class-IL and task-IL on clients' test images; with no weights, of the pre-trained."""
        found, linearised = {}, self.registry.linearised and bool(theta)
        for client in clients:
            accuracy = self.clients[client].measure(theta, head, linearised=linearised)
            found[client] = accuracy.class_il, accuracy.task_il
        return found
