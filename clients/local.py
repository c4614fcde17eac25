"""One client's part of each phase: from a request to an answer, without Flower.

A request brings all that a client needs besides its data. Between rounds a client keeps its own
task vector and its metric, so that they need not be sent again; the server has a copy.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor

from clients import outgoing
from clients.store import Store, completed, store_home
from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.backbone.tangent import feature_map
from fedcompo.config.caps import NODE_KEYS
from fedcompo.config.choices import HeadStart, Kind, kinds_of
from fedcompo.config.run import BackboneConfig, DataConfig, RunConfig
from fedcompo.data.client_data import ClientData, load_client_data, load_folder
from fedcompo.errors import DataError, FileFormatError
from fedcompo.messages.answers import (
    EvaluateAnswer,
    FeaturesAnswer,
    FisherAnswer,
    IdentifyAnswer,
    LacksAnswer,
    NoticeAnswer,
    RealignAnswer,
    TrainAnswer,
)
from fedcompo.messages.requests import (
    OWN,
    EvaluateRequest,
    FisherRequest,
    NoticeRequest,
    RealignRequest,
    TrainRequest,
    own_tensors,
)
from fedcompo.method.deltas import Weights
from fedcompo.method.features import extract_features
from fedcompo.method.heads import Head
from fedcompo.names import check_client_name
from fedcompo.runtime import pick_device
from fedcompo.seeds import derive_seed, generator_for
from fedcompo.training.accuracy import Accuracy, accuracy_of
from fedcompo.training.fit import ensembled, fit_task_vector
from fedcompo.training.probing import fit_probe

logger = logging.getLogger(__name__)

Features = TypeVar("Features", bound=FeaturesAnswer)


class Who(TypedDict):
    """Fields that every answer has; see :class:`NoticeAnswer`."""

    client: str
    base: str
    classes: tuple[str, ...]


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
    ) -> LocalClient:
        """Build the client of one node.

        Args:
            run_config: Flat settings of the run.
            node_config: In a simulation ``partition-id``; in a deployment ``client`` (its name),
                ``data`` (path of its images), and optionally ``kind``, ``device``, ``state``
                (folder of what it keeps between rounds) and caps of what leaves it; see
                :mod:`fedcompo.config.caps`.
            registered_name: Name under which the server knows the node; wins over ``client``.

        Raises:
            FedcompoError: If settings, backbone or data cannot be used.
        """
        keys = ("device", "kind", *NODE_KEYS)
        own = {key: node_config[key] for key in keys if key in node_config}
        config, wished = RunConfig.parse({**run_config, **own}), RunConfig.parse(run_config)
        config = replace(config, caps=wished.caps.strictest(config.caps))
        config.caps.check_head_start(config.train.head_start)
        device = pick_device(config.device)
        backbone = _load_backbone(config.backbone, device)
        data = _load_data(
            config.data,
            backbone.preprocessing,
            config.seed,
            str(node_config.get("data", "")),
            int(node_config.get("partition-id", -1)),
        )
        name = registered_name or str(node_config.get("client", "")) or data.name
        return cls(
            check_client_name(name),
            config,
            backbone,
            data,
            kinds_of(config.train.kind)[0] if "kind" in own else None,
            store_home(str(node_config.get("state", ""))),
        )

    def features(self) -> FeaturesAnswer:
        """Describe the images by mixtures of the pre-trained features, class by class."""
        return self._mixtures(FeaturesAnswer, {})

    def identify(self) -> IdentifyAnswer:
        """Send name, backbone, classes and the number of test images."""
        return IdentifyAnswer(**self._who(), num_test_examples=len(self.data.test.labels))

    def notice(self, request: NoticeRequest) -> NoticeAnswer:
        """Log that another client was removed, with the removal record."""
        logger.warning("%s: %s", self.name, request.text)
        logger.info("%s: the removal record:\n%s", self.name, request.record)
        return NoticeAnswer(**self._who())

    def realign(self, request: RealignRequest) -> RealignAnswer:
        """Describe the images by mixtures of the composed model's features."""
        return self._mixtures(RealignAnswer, request.theta, linearised=request.linearised)

    def fisher(self, request: FisherRequest) -> FisherAnswer:
        """Sum the Fisher diagonal over the training images, under the head that training starts at.

        Under the joint head the Fisher depends on the classes of all clients. Under the client's
        own probe it depends on its own classes only. It is smaller then, so the same ``alpha``
        penalises less. Clients' sums can be added in both cases; a head's rows belong to its own
        classes.
        """
        head = request.joint if self._starts_aligned else self._probe()
        if head is None:
            raise FileFormatError(
                "The server sent no joint head, which `head-start = aligned` starts from. Use the "
                "same fedcompo version everywhere."
            )
        return outgoing.fisher_of(
            self.backbone, head, self.data.train.images, self.config, client=self.name
        )

    def train(self, request: TrainRequest) -> TrainAnswer | LacksAnswer:
        """Fit the task vector, alone or inside the sum of the others, and measure it.

        If the request relies on something that this client no longer keeps, the answer names it.
        """
        part = request.round
        store = Store.of(self.state, part.federation, self.name) if part else None
        request, holds = completed(request, store)
        if request.lacks:
            return LacksAnswer(**self._who(), lacks=request.lacks)
        classes = self.data.classes
        aligned = request.joint.rows(classes) if self._starts_aligned else self._probe()
        course = request.course(
            base=self.backbone.fingerprint, classes=classes, beta=self.config.method.beta
        )
        purpose = "train", self.name, *([str(part.number)] if part else [])
        fitted = fit_task_vector(
            self.backbone,
            request.kind,
            self.data.train,
            aligned,
            self.config.train,
            generator=generator_for(self.config.seed, *purpose),
            course=course,
            on_epoch=self._log_epoch,
        )
        tensors, fitted, caps = outgoing.trained(fitted, self.backbone, self.config.caps)
        if store and part and part.last:
            holds = {}
            store.clear()
        elif store:
            kept = own_tensors(fitted.task_vector.tensors, fitted.head)
            holds[OWN] = store.keep(OWN, kept)  # as the server has it, bit for bit
        vector, theta_0 = fitted.task_vector, self.backbone.theta_0
        theta = ensembled(vector.dense(theta_0), theta_0, course.ensemble)
        own = self.measure(theta, fitted.head, linearised=vector.kind is Kind.TANGENT)
        frozen = self.measure({}, request.joint) if request.frozen else None
        return TrainAnswer(
            **self._who(),
            tensors=tensors,
            kind=vector.kind,
            losses=fitted.losses,
            holds=holds,
            caps=caps,
            own_task_accuracy=own.task_il,
            frozen_class_il_accuracy=frozen.class_il if frozen else None,
            frozen_task_il_accuracy=frozen.task_il if frozen else None,
        )

    def evaluate(self, request: EvaluateRequest) -> EvaluateAnswer:
        """Measure the composed model on this client's test images."""
        accuracy = self.measure(request.theta, request.joint, linearised=request.linearised)
        return EvaluateAnswer(
            **self._who(), class_il_accuracy=accuracy.class_il, task_il_accuracy=accuracy.task_il
        )

    def measure(self, theta: Weights, head: Head, *, linearised: bool = False) -> Accuracy:
        """Accuracy on the client's test images; with an empty ``theta``, of the frozen backbone."""
        classes, test = self.data.classes, self.data.test
        return accuracy_of(self.backbone, theta, head, classes, test, linearised=linearised)

    @property
    def _starts_aligned(self) -> bool:
        return self.config.train.head_start is HeadStart.ALIGNED

    def _mixtures(
        self, answer: type[Features], theta: Mapping[str, Tensor], *, linearised: bool = False
    ) -> Features:
        weights = {name: tensor.to(self.backbone.device) for name, tensor in theta.items()}
        train = self.data.train
        mixtures, caps = outgoing.mixtures_of(
            extract_features(feature_map(self.backbone, weights, tangent=linearised), train.images),
            self.data,
            self.config,
            seed=derive_seed(self.config.seed, answer.CONTENT, self.name),
        )
        return answer(
            **self._who(),
            num_test_examples=len(self.data.test.labels),
            mixtures=mixtures,
            kind=self.kind,
            caps=caps,
        )

    def _probe(self) -> Head:
        """The client's own head. Each phase fits it again and gets the same bits."""
        ridge = self.config.head.ridge
        return fit_probe(self.backbone, self.data.train, self.data.classes, ridge=ridge)

    def _who(self) -> Who:
        base, classes = self.backbone.fingerprint, self.data.classes
        return Who(client=self.name, base=base, classes=classes)

    def _log_epoch(self, epoch: int, epochs: int, loss: float) -> None:
        logger.info("%s: epoch %d of %d, loss %.4f", self.name, epoch, epochs, loss)


@lru_cache(maxsize=1)
def _load_backbone(config: BackboneConfig, device: torch.device) -> Backbone:
    """Load the backbone once for all phases and clients of this process."""
    return load_backbone(config, device)


@lru_cache(maxsize=2)
def _load_data(
    config: DataConfig, preprocessing: Preprocessing, seed: int, path: str, partition: int
) -> ClientData:
    if path:
        return load_folder(
            Path(path), preprocessing, seed=seed, images_per_class=config.images_per_class
        )
    if partition < 0:
        raise DataError(
            "This node says neither where its images are nor which part of `data` it owns. "
            'Start it with --node-config \'client="name" data="/path/of/its/images"\'.'
        )
    return load_client_data(config, preprocessing, partition=partition, seed=seed)
