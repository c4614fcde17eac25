"""A federation of pico clients that learn noise by heart: what an audit must find."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from builders import pico_backbone

from clients.local import LocalClient
from fedcompo.audit.evaluation import clients_data
from fedcompo.composition.head import joint_head
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import AnchorBy, HeadStart, Kind, kinds_of
from fedcompo.config.run import RunConfig
from fedcompo.messages.answers import DescribeAnswer
from fedcompo.messages.requests import ANCHOR, DescribeRequest, TrainRequest
from fedcompo.method.contribution import Contribution
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.method.heads import Head
from fedcompo.method.lineage import Lineage
from fedcompo.method.task_vector import TaskVector
from fedcompo.registry.registry import Registry
from fedcompo.training.anchors import FisherSums
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
    "augmentation": "none",
    "alpha": 0.0,
    "trust-region": 0.0,
    "wire": "float32",  # no server is there to read fewer bits
    "head-start": "aligned",
    "local-steps": 0,
}
"""Settings under which noise ends up in the backbone."""
FREE = {"head_start": "probe", "anchor": "own", "alpha": 0.1}
"""Settings, of :func:`config_of`, under which nobody is trained with anything of another."""
OTHERS = {"anchor": "others", "alpha": 0.1}
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
    described = {client.name: client.describe(DescribeRequest(fisher=True)) for client in clients}
    settings = CompositionSettings.of(config)
    aligned = joint_head({name: said.statistics for name, said in described.items()}, settings)
    by, reference = config.train.anchor, None
    if by is AnchorBy.REFERENCE:
        reference = load_reference(
            Path(config.train.reference),
            base=backbone.fingerprint,
            curvature=config.fisher.curvature,
        )
    fishers = {name: _fisher(said) for name, said in described.items()}
    sums = FisherSums(fishers, fishers.__getitem__, by=by, reference=reference)
    registry = Registry.create(path, backbone, settings)
    registry.add(
        *(
            _trained(client, dealt[client.name], aligned, sums, described[client.name])
            for client in clients
        ),
        empty=True,
    )
    return registry


def _fisher(said: DescribeAnswer) -> FisherDiagonal:
    assert said.fisher is not None
    return FisherDiagonal(said.fisher.parts, said.fisher.num_examples)


def _trained(
    client: LocalClient, kind: Kind, aligned: Head, sums: FisherSums, said: DescribeAnswer
) -> Contribution:
    settings, name = client.config.train, client.name
    others = tuple(other for other in sums.members if other != name)
    mean = sums.mean_for(name)
    sent = {ANCHOR: mean} if mean is not None else {}
    answer = client.train(
        TrainRequest(
            joint=aligned, kind=kind, frozen=True, needs=dict.fromkeys(sent, ""), sent=sent
        )
    )
    is_anchored, is_aligned = settings.alpha > 0, settings.head_start is HeadStart.ALIGNED
    return Contribution(
        client=name,
        task_vector=TaskVector(kind, answer.task_vector, client.backbone.fingerprint),
        head=answer.head(answer.classes),
        statistics=said.statistics,
        num_examples=len(client.data.train.labels),
        lineage=Lineage(
            anchored_by=others if is_anchored and settings.anchor is AnchorBy.OTHERS else (),
            aligned_with=others if is_aligned else (),
        ),
        fisher=_fisher(said),
        settings=dict(client.config.of_client()),
    )
