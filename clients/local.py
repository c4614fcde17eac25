"""One client's part of each phase: from a request to an answer, without Flower.

A request brings all that a client needs besides its data. Between rounds a client keeps its own
task vector and its metric, so that they need not be sent again; the server has a copy.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clients import outgoing
from clients.course import course_of
from clients.loading import load_images, load_shared_backbone
from clients.store import Store, completed, images_home, maps_home, store_home
from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.backbone.tangent import feature_map
from fedcompo.config.caps import FEWEST_IMAGES, NODE_KEYS
from fedcompo.config.choices import Curvature, HeadStart, Kind, Statistics, kinds_of
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData, Split, set_aside
from fedcompo.data.enough import check_enough
from fedcompo.data.shards import needed_for
from fedcompo.data.tasks import shard_name
from fedcompo.errors import ConfigError
from fedcompo.messages.answers import (
    DescribeAnswer,
    FisherAnswer,
    IdentifyAnswer,
    LacksAnswer,
    NoticeAnswer,
    TrainAnswer,
)
from fedcompo.messages.requests import (
    OWN,
    DescribeRequest,
    FisherRequest,
    NoticeRequest,
    TrainRequest,
    own_tensors,
)
from fedcompo.method.contribution import AnyStatistics
from fedcompo.method.deltas import Weights
from fedcompo.method.features import extract_features
from fedcompo.method.heads import Head, zero_head
from fedcompo.names import check_client_name
from fedcompo.runtime import pick_device
from fedcompo.seeds import derive_seed, generator_for
from fedcompo.training.accuracy import Accuracy, accuracy_of
from fedcompo.training.fit import ensembled, fit_task_vector
from fedcompo.training.probing import fit_probe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalClient:
    """A client with its images, its settings and the shared backbone."""

    name: str
    config: RunConfig
    backbone: Backbone
    data: ClientData
    kind: Kind | None = None
    """The only kind of task vector that this node trains; None: any."""
    state: Path = field(default_factory=store_home)
    """Folder of what this client keeps between rounds."""

    @classmethod
    def from_node(
        cls,
        run_config: Mapping[str, Any],
        node_config: Mapping[str, Any],
        registered_name: str = "",
        preprocessing: Preprocessing | None = None,
        backbone: Backbone | None = None,
        shard: int | None = None,
    ) -> LocalClient:
        """Build the client of one node, or one of its shards.

        Args:
            run_config: Flat settings of the run.
            node_config: In a simulation ``partition-id``; in a deployment ``client`` (its name),
                ``data`` (folder or file of its images), and optionally ``kind``, ``device``,
                ``state`` (folder of what it keeps between rounds), ``keep-cache``, and caps of what
                leaves it; see :mod:`fedcompo.config.caps`.
            registered_name: Name under which the server knows the node; wins over ``client``.
            preprocessing: How the server wants images prepared; None: as the backbone says.
            backbone: The shared one, where it is in memory; None: that of the settings.
            shard: Its number; None: the settings have but one.

        Raises:
            FedcompoError: If settings, backbone or data cannot be used.
        """
        keys = ("device", "kind", "keep-cache", *NODE_KEYS)
        own = {key: node_config[key] for key in keys if key in node_config}
        least = FEWEST_IMAGES if node_config.get("data") else 1
        own["min-images"] = own.get("min-images") or least  # a run may ask for more, never for less
        wished = RunConfig.parse(run_config)  # its preset is resolved before the node's own
        config = RunConfig.parse({**wished.flat(), **own})
        config = replace(config, caps=wished.caps.strictest(config.caps))
        config.caps.check_noise(
            statistics=config.head.statistics,
            curvature=config.fisher.curvature,
            start=config.train.head_start,
        )
        count = config.data.shards
        if (shard is None) != (count == 1) or not 0 <= (shard or 0) < count:
            raise ConfigError.public(
                f"The server asks for shard {shard!r}, and `shards` is {count}. Use the same "
                "fedcompo version everywhere."
            )
        if backbone is None:
            backbone = load_shared_backbone(config.backbone, pick_device(config.device))
        if preprocessing is not None:
            preprocessing = preprocessing.instead_of(backbone.preprocessing)
            backbone = replace(backbone, preprocessing=preprocessing)
        name = registered_name or str(node_config.get("client", ""))
        state = str(node_config.get("state", ""))
        data = load_images(
            config.data,
            backbone.preprocessing,
            config.seed,
            str(node_config.get("data", "")),
            int(node_config.get("partition-id", -1)),
            images_home(state, keep=config.keep_cache),
            name,
            None if shard is None else maps_home(state, config),
            needed_for(config.caps.min_images, aside=config.train.aside),
        )
        data = data if shard is None else data.shard(shard)
        name = check_client_name(shard_name(name or data.name, shard))
        labels = data.train.labels
        check_enough(data.classes, labels, len(data.test.labels), client=name, config=config)
        return cls(
            name,
            config,
            backbone,
            data,
            kinds_of(config.train.kind)[0] if "kind" in own else None,
            store_home(state),
        )

    def describe(self, request: DescribeRequest) -> DescribeAnswer:
        """Describe all training images at θ₀, and sum their Fisher diagonal if it is asked for."""
        of_features = self.config.fisher.curvature is Curvature.FEATURES
        head = None if of_features or not request.fisher else self._probe()
        seen: list[Tensor] = []  # features, as the estimate of the Fisher sees them
        fisher = self._fisher(head, seen) if request.fisher else None
        train, form = self.data.train, self.config.head.statistics
        statistics, caps = self.statistics(train, {}, form=form, purpose="features", seen=seen)
        return DescribeAnswer(
            **self._about(),
            statistics=statistics,
            kind=self.kind,
            fisher=fisher,
            caps=caps,
            pictures=None if self.config.caps.dp_noise else self.data.facts or None,
        )

    def identify(self) -> IdentifyAnswer:
        """Send name, backbone, classes and the number of test images."""
        return IdentifyAnswer(**self._about())

    def notice(self, request: NoticeRequest) -> NoticeAnswer:
        """Log that another client was removed, with the removal record."""
        logger.warning("%s: %s", self.name, request.text)
        logger.info("%s: the removal record:\n%s", self.name, request.record)
        return NoticeAnswer(**self.who())

    def fisher(self, request: FisherRequest) -> FisherAnswer:
        """Sum the Fisher diagonal of the class probabilities under the joint head."""
        return self._fisher(request.joint)

    def train(self, request: TrainRequest) -> TrainAnswer | LacksAnswer:
        """Fit the task vector, alone or inside the sum of the others, and measure it.

        If the request relies on something that this client no longer keeps, the answer names it.
        """
        part = request.round
        store = Store.of(self.state, part.federation, self.name) if part else None
        request, holds = completed(request, store)
        if request.lacks:
            return LacksAnswer(**self.who(), lacks=request.lacks)
        classes, theta_0 = self.data.classes, self.backbone.theta_0
        course = course_of(
            request,
            theta_0,
            base=self.backbone.fingerprint,
            classes=classes,
            beta=self.config.method.beta,
            of_features=self.config.fisher.curvature is Curvature.FEATURES,
        )
        kept, start = self.split[0], self._start(request.joint)
        purpose = "train", self.name, *([str(part.number)] if part else [])
        fitted = fit_task_vector(
            self.backbone,
            request.kind,
            Split(kept.images, start.indices(classes)[kept.labels]),
            start,
            self.config.train,
            generator=generator_for(self.config.seed, *purpose),
            course=course,
        )
        fitted = replace(fitted, head=fitted.head.rows(classes))
        tensors, fitted, caps = outgoing.trained(fitted, self.backbone, self.config.caps)
        if store and part and part.last:
            holds = {}
            store.clear()
        elif store:
            kept_tensors = own_tensors(fitted.task_vector.tensors, fitted.head)
            holds[OWN] = store.keep(OWN, kept_tensors)  # as the server has it, bit for bit
        vector = fitted.task_vector
        theta = ensembled(vector.dense(theta_0), theta_0, course.ensemble)
        own = self.measure(theta, fitted.head, linearised=vector.kind is Kind.TANGENT)
        frozen = self.measure({}, request.joint) if request.frozen else None
        return TrainAnswer(
            **self.who(),
            tensors=tensors,
            kind=vector.kind,
            losses=fitted.losses,
            holds=holds,
            caps=caps,
            held=fitted.held,
            own_task_accuracy=own.task_il,
            frozen_class_il_accuracy=frozen.class_il if frozen else None,
            frozen_task_il_accuracy=frozen.task_il if frozen else None,
        )

    def measure(self, theta: Weights, head: Head, *, linearised: bool = False) -> Accuracy:
        """Accuracy on the client's test images; with an empty ``theta``, of the frozen backbone."""
        classes, test = self.data.classes, self.data.test
        return accuracy_of(self.backbone, theta, head, classes, test, linearised=linearised)

    @cached_property
    def split(self) -> tuple[Split, Split]:
        """The images to train on, and those kept aside to choose the composition on."""
        share, seed = self.config.train.aside, self.config.seed
        return set_aside(self.data.train, share=share, seed=seed, client=self.name)

    def _start(self, joint: Head) -> Head:
        """The head that training starts from; of all classes if the client has but one."""
        classes, start = self.data.classes, self.config.train.head_start
        if len(classes) == 1:
            return joint
        if start is HeadStart.ALIGNED:
            return joint.rows(classes)
        if start is HeadStart.PROBE:
            return self._probe()
        return zero_head(classes, self.backbone.num_features)

    def statistics(
        self,
        images: Split,
        theta: Weights,
        *,
        form: Statistics,
        purpose: str,
        linearised: bool = False,
        seen: Sequence[Tensor] = (),
    ) -> tuple[AnyStatistics, dict[str, Any]]:
        """Statistics of a model's features, by class, and the answer's report on caps.

        Features of all images that were seen already are not computed again.
        """
        if sum(map(len, seen)) != len(images.labels):
            forward = feature_map(self.backbone, theta, tangent=linearised)
            seen = [extract_features(forward, images.images)]
        seed, classes = derive_seed(self.config.seed, purpose, self.name), self.data.classes
        own = images.labels, classes, self.config
        return outgoing.statistics_of(torch.cat([*seen]), *own, form=form, seed=seed)

    def _fisher(self, head: Head | None, seen: list[Tensor] | None = None) -> FisherAnswer:
        """The Fisher diagonal of the training images; of their features if there is no head."""
        images, who = self.data.train.images, self.who()
        return outgoing.fisher_of(self.backbone, head, images, self.config, who=who, seen=seen)

    def _probe(self) -> Head:
        """The client's own head. Each phase fits it again and gets the same bits."""
        ridge = self.config.head.ridge
        return fit_probe(self.backbone, self.split[0], self.data.classes, ridge=ridge)

    def who(self) -> dict[str, Any]:
        """Name, backbone and classes, which every answer states; see :class:`NoticeAnswer`."""
        base, classes = self.backbone.fingerprint, self.data.classes
        return {"client": self.name, "base": base, "classes": classes}

    def _about(self) -> dict[str, Any]:
        """What else a client states of itself; see :class:`IdentifyAnswer`."""
        noised, tests = self.config.caps.dp_noise > 0, len(self.data.test.labels)
        return {**self.who(), "num_test_examples": tests, "noised": noised}
