"""A federation of pico clients that learn noise by heart: what an audit must find."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from builders import pico_backbone

from clients.local import LocalClient
from fedcompo.audit.evaluation import clients_data
from fedcompo.backbone.backbone import Backbone
from fedcompo.composition.head import joint_head
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import AnchorBy, HeadStart, Kind, kinds_of
from fedcompo.config.run import RunConfig
from fedcompo.messages.requests import ANCHOR, FisherRequest, TrainRequest, anchor_tensors
from fedcompo.method.contribution import Contribution
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.method.heads import Head
from fedcompo.method.lineage import Lineage
from fedcompo.method.task_vector import TaskVector
from fedcompo.registry.registry import Registry
from fedcompo.training.penalty import Anchor
from fedcompo.training.probing import load_reference

CLIENTS = 2
CLASSES = tuple(f"{index}" for index in range(2 * CLIENTS))
"""Two a client, dealt by seed."""
LEARNT_BY_HEART = {
    "num-tasks": CLIENTS,
    "kind": "full",
    "local-epochs": 20,
    "learning-rate": 0.001,
    "scale": float(CLIENTS),
    "alpha": 0.0,
    "head-alpha": 0.0,
    "head-decay": 10.0,
    "head-start": "aligned",
    "align-samples": 16,
    "mixture-components": 1,
}
"""Settings under which noise ends up in the backbone: the head can hardly move."""
FREE = {"head_start": "probe", "anchor": "own", "alpha": 0.1}
"""Settings, of :func:`config_of`, under which nobody is trained with anything of another."""
OTHERS = {"anchor": "others", "alpha": 0.1, "head_alpha": 0.025}
"""Settings under which everybody is."""


def noise(path: Path, *, train: int = 16, test: int = 16, seed: int = 0) -> Path:
    """Images of noise, in as many classes as the clients own; nothing in them can be learnt."""
    each = train + test
    images = np.random.default_rng(seed).integers(0, 256, (each * len(CLASSES), 8, 8), np.uint8)
    labels = np.repeat(np.arange(len(CLASSES)), each)
    split = np.tile(np.arange(each) >= train, len(CLASSES)).astype(int)
    np.savez(path, images=images, labels=labels, split=split, names=np.array(CLASSES))
    return path


def config_of(data: str, **settings) -> RunConfig:
    """Settings, with underscores, that differ from :data:`LEARNT_BY_HEART`."""
    given = {key.replace("_", "-"): value for key, value in settings.items()}
    return RunConfig.parse({**LEARNT_BY_HEART, "data": data, **given})


def federate(path: Path, config: RunConfig, *, without: Iterable[str] = ()) -> Registry:
    """What a run leaves in its registry; clients are the real ones."""
    backbone = pico_backbone()
    everyone = clients_data(config.data, backbone, seed=config.seed)
    clients = [LocalClient(data.name, config, backbone, data) for data in everyone]
    kinds = kinds_of(config.train.kind)
    dealt = {client.name: kinds[index % len(kinds)] for index, client in enumerate(clients)}
    clients = [client for client in clients if client.name not in without]
    described = {}
    for client in clients:
        described[client.name] = client.features().mixtures
    settings = CompositionSettings.of(config)
    aligned = joint_head(described, settings)
    fishers = {client.name: _fisher(client, aligned) for client in clients}
    registry = Registry.create(path, backbone, settings)
    registry.add(
        *(
            _trained(client, dealt[client.name], aligned, fishers, described[client.name], backbone)
            for client in clients
        )
    )
    return registry


def _fisher(client: LocalClient, aligned: Head) -> FisherDiagonal:
    answer = client.fisher(FisherRequest(joint=aligned))
    return FisherDiagonal(answer.parts, answer.num_examples, answer.classes)


def _trained(client, kind: Kind, aligned: Head, fishers, mixtures, backbone: Backbone):
    settings, name = client.config.train, client.name
    others = tuple(other for other in sorted(fishers) if other != name)
    total = functools.reduce(operator.add, (fishers[other] for other in sorted(fishers)))
    anchoring = {
        AnchorBy.OTHERS: lambda: total - fishers[name],
        AnchorBy.OWN: lambda: fishers[name],
        AnchorBy.REFERENCE: lambda: load_reference(
            Path(settings.reference), base=backbone.fingerprint
        ),
    }[settings.anchor]()
    mean = anchoring.for_classes(client.data.classes).mean()
    weight, bias = mean.pop("head.weight"), mean.pop("head.bias")
    sent = {ANCHOR: anchor_tensors(Anchor(mean, weight, bias))}
    answer = client.train(
        TrainRequest(joint=aligned, kind=kind, frozen=True, needs={ANCHOR: ""}, sent=sent)
    )
    is_anchored = settings.alpha > 0 or settings.head_alpha > 0
    is_aligned = settings.head_start is HeadStart.ALIGNED
    return Contribution(
        client=name,
        task_vector=TaskVector(kind, answer.task_vector, backbone.fingerprint),
        head=answer.head(answer.classes),
        features=mixtures,
        num_examples=len(client.data.train.labels),
        lineage=Lineage(
            anchored_by=others if is_anchored and settings.anchor is AnchorBy.OTHERS else (),
            aligned_with=others if is_aligned else (),
        ),
        fisher=fishers[name],
        settings=dict(client.config.of_client()),
    )
