"""Measures any weights as a run measures its own: realigned joint head, then every client's test.

Here all clients' images are at hand, as in a simulation, so what a federation asks its clients is
computed in one place, from the same seeds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedcompo.audit.evaluation import clients_data, run_config_of
from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.tangent import feature_map
from fedcompo.composition.head import head_of, joint_head
from fedcompo.composition.models import stream_composition
from fedcompo.composition.scale import FactorBy
from fedcompo.config.choices import Statistics
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData, set_aside
from fedcompo.method.contribution import AnyStatistics
from fedcompo.method.deltas import Weights
from fedcompo.method.features import extract_features, fit_mixtures
from fedcompo.method.heads import Head
from fedcompo.method.pool import Pool
from fedcompo.method.statistics import FeatureSums
from fedcompo.registry.registry import Registry
from fedcompo.runtime import pick_device
from fedcompo.seeds import derive_seed
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
    def data(self) -> dict[str, ClientData]:
        """Every member's images, by client."""
        source, wanted = self.config.data, self.registry.clients
        found = clients_data(source, self.backbone, seed=self.config.seed, wanted=wanted)
        return {data.name: data for data in found}

    def composed(self, pool: Pool) -> Weights:
        """Some of the members' task vectors, composed as the registry would after a removal."""
        stored, settings = self.registry.backbone, self.registry.settings
        voted = self.registry.factor if self.registry.factor_by == FactorBy.VOTE else None
        return dict(stream_composition(pool, stored, None, settings, voted))

    def frozen_head(self, clients: Iterable[str]) -> Head:
        """The joint head of pre-trained features, of some clients' classes."""
        return head_of(self.pool.only(*clients), self.registry.settings)

    def head(self, theta: Weights, clients: Iterable[str]) -> Head:
        """The joint head, of some clients' classes, that the run would give to these weights.

        Of the features under these weights, unless the run did not realign.
        """
        if not self.registry.realigned:
            return self.frozen_head(clients)
        statistics = {client: self._described(theta, self.data[client]) for client in clients}
        shrinkage = self.registry.shrinkage
        return joint_head(statistics, self.registry.settings, shrinkage=shrinkage)

    def _described(self, theta: Weights, data: ClientData) -> AnyStatistics:
        """Statistics of a client's features, as it would send them to realign the head."""
        config, name = self.config, data.name
        images, _ = set_aside(data.train, share=config.train.aside, seed=config.seed, client=name)
        forward = feature_map(self.backbone, theta, tangent=self.registry.linearised)
        features = extract_features(forward, images.images)
        if config.head.statistics is Statistics.SUMS:
            return FeatureSums.of(features, images.labels, data.classes)
        seed, components = derive_seed(config.seed, "realign", name), config.head.mixture_components
        return fit_mixtures(features, images.labels, data.classes, components=components, seed=seed)

    def accuracies(self, theta: Weights, head: Head, clients: Iterable[str]) -> Accuracies:
        """Class-IL and task-IL on clients' test images; with no weights, of the pre-trained."""
        found, linearised = {}, self.registry.linearised and bool(theta)
        for client in clients:
            classes, test = self.data[client].classes, self.data[client].test
            accuracy = accuracy_of(self.backbone, theta, head, classes, test, linearised=linearised)
            found[client] = accuracy.class_il, accuracy.task_il
        return found
