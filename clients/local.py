"""One client's part of each phase: tensors and figures in, tensors and figures out; no Flower.

Whatever a client needs besides its data comes with the request. Between the rounds of a training it
keeps its own task vector, so as not to be sent it each time; the server has a copy.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clients import outgoing
from clients.given import OWN, Given
from clients.store import Store, store_home
from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.backbone.tangent import feature_map
from fedcompo.config.caps import NODE_KEYS
from fedcompo.config.choices import HeadStart, Kind, kinds_of
from fedcompo.config.run import BackboneConfig, DataConfig, RunConfig
from fedcompo.data.client_data import ClientData, load_client_data, load_folder
from fedcompo.errors import DataError
from fedcompo.messages.body import Body
from fedcompo.method.contribution import mixture_tensors
from fedcompo.method.features import extract_features
from fedcompo.method.heads import Head, head_from, head_tensors
from fedcompo.names import check_client_name
from fedcompo.runtime import pick_device
from fedcompo.seeds import derive_seed, generator_for
from fedcompo.storage.tensorfile import prefixed, section
from fedcompo.training.accuracy import evaluate
from fedcompo.training.fit import Fitted, ensembled, fit_task_vector
from fedcompo.training.penalty import Ensemble
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
    """Kind of task vector, if this node insists on one."""
    state: Path = field(default_factory=store_home)
    """Folder of what it keeps between rounds."""

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

    def features(self) -> Body:
        """Describe the images by mixtures of the pre-trained features, class by class."""
        return self._mixtures({}, content="features")

    def identify(self) -> Body:
        """Say who this is; the images are looked at, not described."""
        counts = {"num_test_examples": len(self.data.test.labels)}
        return {}, self._manifest("identify", counts)

    def notice(self, tensors: Mapping[str, Tensor], request: Mapping[str, Any]) -> Body:
        """Take note that another client was removed; the record goes to the log."""
        logger.warning("%s: %s", self.name, request["text"])
        logger.info("%s: the removal record:\n%s", self.name, request["record"])
        return {}, self._manifest("notice", {})

    def realign(self, tensors: Mapping[str, Tensor], request: Mapping[str, Any]) -> Body:
        """Describe the images by mixtures of the composed model's features."""
        theta = section("theta", tensors)
        return self._mixtures(theta, content="realign", linearised=bool(request["linearised"]))

    def fisher(self, tensors: Mapping[str, Tensor], request: Mapping[str, Any]) -> Body:
        """Sum the Fisher diagonal over the training images, under the head that training starts at.

        Under the joint head it weighs confusion with every client's classes, and so depends on
        them. Under the client's own probe it weighs confusion among its own classes alone: it knows
        of nobody else, and is smaller, so that the same ``alpha`` holds less. Clients' sums add up
        either way, each under its own head; a head's rows belong to its own classes.
        """
        given = self._starts_aligned
        head = head_from(tensors, request["classes"]) if given else self._probe()
        body, entries = outgoing.fisher_of(
            self.backbone, head, self.data.train.images, self.config, owner=self.name
        )
        return body, self._manifest("fisher", entries)

    def train(self, tensors: Mapping[str, Tensor], request: Mapping[str, Any]) -> Body:
        """Fit the task vector, alone or inside the sum of the others; measure what comes of it.

        What the request leaves the client to remember, and it does not, the answer asks for.
        """
        store = self._store(str(request["federation"])) if request.get("federation") else None
        given = Given.read(
            tensors,
            request,
            store,
            base=self.backbone.fingerprint,
            classes=self.data.classes,
            beta=self.config.method.beta,
        )
        if given.lacks:
            return {}, self._manifest("train", {"lacks": list(given.lacks)})
        joint = head_from(tensors, request["classes"])
        aligned = joint.rows(self.data.classes) if self._starts_aligned else self._probe()
        purpose = "train", self.name, *([str(request["round"])] if "round" in request else [])
        fitted = fit_task_vector(
            self.backbone,
            Kind(request["kind"]),
            self.data.train,
            given.head or aligned,
            aligned,
            given.anchor,
            self.config.train,
            generator=generator_for(self.config.seed, *purpose),
            ensemble=given.ensemble,
            course=given.course,
            on_epoch=self._log_epoch,
        )
        body, fitted, told = outgoing.trained(fitted, self.backbone, self.config.caps)
        holds: dict[str, str] = {}
        if store and request.get("last"):
            store.clear()
        elif store:
            own = prefixed("task_vector", fitted.task_vector.tensors) | head_tensors(fitted.head)
            holds = {**given.holds, OWN: store.keep(OWN, own)}  # as the server has it, bit for bit
        return body, self._manifest(
            "train",
            {
                "kind": str(fitted.task_vector.kind),
                "losses": list(fitted.losses),
                "holds": holds,
                **told,
                **self._measured(fitted, given.ensemble, joint if request["frozen"] else None),
            },
        )

    def _measured(
        self, fitted: Fitted, ensemble: Ensemble | None, joint: Head | None
    ) -> dict[str, float]:
        """Accuracy of what was trained, on its own task; with the joint head, of the frozen one."""
        classes, test, theta_0 = self.data.classes, self.data.test, self.backbone.theta_0
        theta = ensembled(fitted.task_vector.dense(theta_0), theta_0, ensemble)
        linearised = fitted.task_vector.kind is Kind.TANGENT
        own = evaluate(self.backbone, theta, fitted.head, classes, test, linearised=linearised)
        figures = {"own_task_accuracy": own.task_il}
        if joint is not None:
            frozen = evaluate(self.backbone, {}, joint, classes, test)
            figures["frozen_class_il_accuracy"] = frozen.class_il
            figures["frozen_task_il_accuracy"] = frozen.task_il
        return figures

    def evaluate(self, tensors: Mapping[str, Tensor], request: Mapping[str, Any]) -> Body:
        """Measure the composed model on this client's test images."""
        head = head_from(tensors, request["classes"])
        theta = section("theta", tensors)
        accuracy = evaluate(
            self.backbone,
            theta,
            head,
            self.data.classes,
            self.data.test,
            linearised=bool(request["linearised"]),
        )
        figures = {"class_il_accuracy": accuracy.class_il, "task_il_accuracy": accuracy.task_il}
        return {}, self._manifest("evaluate", figures)

    def _store(self, federation: str) -> Store:
        """What this client keeps between the rounds of a federation."""
        return Store.of(self.state, federation, self.name)

    @property
    def _starts_aligned(self) -> bool:
        return self.config.train.head_start is HeadStart.ALIGNED

    def _mixtures(
        self, theta: Mapping[str, Tensor], content: str, *, linearised: bool = False
    ) -> Body:
        weights = {name: tensor.to(self.backbone.device) for name, tensor in theta.items()}
        train = self.data.train
        mixtures, told = outgoing.mixtures_of(
            extract_features(feature_map(self.backbone, weights, tangent=linearised), train.images),
            self.data,
            self.config,
            seed=derive_seed(self.config.seed, content, self.name),
        )
        counts = {name: mixture.num_examples for name, mixture in mixtures.items()}
        manifest = {
            "mixtures": counts,
            "num_examples": sum(counts.values()),
            "num_test_examples": len(self.data.test.labels),
            "kind": str(self.kind or ""),
            **told,
        }
        return mixture_tensors(mixtures), self._manifest(content, manifest)

    def _probe(self) -> Head:
        """The client's own head; each phase that needs it fits it again, to the same bits."""
        ridge = self.config.head.ridge
        return fit_probe(self.backbone, self.data.train, self.data.classes, ridge=ridge)

    def _manifest(self, content: str, entries: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "content": content,
            "client": self.name,
            "base": self.backbone.fingerprint,
            "classes": list(self.data.classes),
            **entries,
        }

    def _log_epoch(self, epoch: int, epochs: int, loss: float) -> None:
        logger.info("%s: epoch %d of %d, loss %.4f", self.name, epoch, epochs, loss)


@lru_cache(maxsize=1)
def _load_backbone(config: BackboneConfig, device: torch.device) -> Backbone:
    """A process that serves several phases, or several clients, loads the backbone once."""
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
