"""What ``registry_operations.py`` measures: operations on a registry of random members.

Each is a function of a :class:`Job`, which says where and how large; :data:`OPERATIONS` names them.
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

from fedcompo.backbone.backbone import Backbone, load_backbone, target_weights
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.composition.head import head_of
from fedcompo.composition.models import stream_composition
from fedcompo.composition.settings import CompositionSettings
from fedcompo.composition.timm_folder import write_model
from fedcompo.config.choices import Kind
from fedcompo.config.run import BackboneConfig
from fedcompo.method.contribution import Contribution
from fedcompo.method.deltas import rank_of, stored_shapes
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.method.heads import Head
from fedcompo.method.lineage import Lineage
from fedcompo.method.statistics import FeatureSums
from fedcompo.method.task_vector import TaskVector
from fedcompo.registry.registry import Registry
from fedcompo.registry.transaction import MODEL
from fedcompo.storage.files import BACKBONE, CONTENT, SUM
from fedcompo.storage.tensorfile import tensor_digest

EMBEDDED = "embedded"
"""The backbone that fedcompo brings along; its LoRAs are small, so that thousands are soon made."""
ARCHITECTURES = {
    "vit-b": ("vit_base_patch16_224", {}),
    "vit-ti": ("vit_tiny_patch16_224", {}),
    "tiny": (
        "vit_tiny_patch16_224",
        {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2},
    ),
}
RANK = 16
BATCH = 8
"""Contributions that lie outside the registry at a time, while it is filled; ten times as many of
those that are thin."""


@dataclass(frozen=True)
class Job:
    """What to do, and where."""

    operation: str
    """Name of a function in :data:`OPERATIONS`."""
    folder: str
    kind: str
    members: int
    """T, with the one that comes or goes: the last."""
    scale: str
    classes: int
    """Of all clients together; each owns all of them."""
    threads: int
    own: int = 0
    """Classes of each client, dealt in turn; 0: all."""
    lineage: int = 0
    """Clients before it that each is anchored by."""

    @property
    def registry(self) -> Path:
        return Path(self.folder) / "registry"

    @property
    def newcomer(self) -> Path:
        return Path(self.folder) / "newcomer"

    @property
    def output(self) -> Path:
        return Path(self.folder) / self.operation

    @property
    def contributions(self) -> list[Path]:
        return [self.registry / "clients" / name(i) / CONTENT for i in range(self.members)]

    @property
    def inputs(self) -> list[Path]:
        """The files the operation cannot do without, but for those of a few kB."""
        running = self.registry / MODEL / SUM
        needed = {
            "add": [self.newcomer / CONTENT, *([running] if running.exists() else [])],
            "remove": [self.contributions[-1], running],
        }
        return [self.registry / BACKBONE, *needed.get(self.operation, self.contributions)]


def name(index: int) -> str:
    return f"client-{index:03d}"


# -- what is measured -----------------------------------------------------------------------------


def nothing(job: Job) -> None:
    """Import the same modules."""


def add(job: Job) -> None:
    Registry(job.registry).add(job.newcomer)


def remove(job: Job) -> None:
    Registry(job.registry).remove(name(job.members - 1))


def compose(job: Job) -> None:
    """As ``fedcompo compose`` does, but for the model card."""
    registry = Registry(job.registry)
    pool, settings = registry.pool(), registry.settings
    changed = stream_composition(pool, registry.backbone, None, settings)
    write_model(job.output, registry.backbone, changed, head_of(pool, settings))


# -- what comes before ----------------------------------------------------------------------------


def fill(job: Job) -> None:
    """Bring the registry to T - 1 members, and write the contribution that comes next."""
    backbone = _backbone(job.scale)
    if not job.registry.exists():
        Registry.create(job.registry, backbone, CompositionSettings(scale=1.0))
    registry = Registry(job.registry)
    missing = range(len(registry.clients), job.members - 1)
    size = BATCH * (10 if job.scale in (EMBEDDED, "tiny") else 1)
    for start in range(missing.start, missing.stop, size):
        batch = range(start, min(start + size, missing.stop))
        folders = [Path(job.folder) / name(index) for index in batch]
        for index, folder in zip(batch, folders, strict=True):
            _contribution(job, backbone, index).save(folder)
        registry.add(*folders)
        for folder in folders:
            shutil.rmtree(folder)
    shutil.rmtree(job.newcomer, ignore_errors=True)
    _contribution(job, backbone, job.members - 1).save(job.newcomer)


OPERATIONS = {operation.__name__: operation for operation in (nothing, add, remove, compose, fill)}


def _backbone(scale: str) -> Backbone:
    if scale == EMBEDDED:
        return load_backbone(BackboneConfig())
    architecture, model_args = ARCHITECTURES[scale]
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False, num_classes=0, **model_args)
    model = model.eval().requires_grad_(False)
    return Backbone(
        model=model,
        theta_0=target_weights(model, BackboneConfig().target_weights),
        name=scale,
        fingerprint=f"{scale}@{tensor_digest(model.state_dict())}",
        preprocessing=Preprocessing(model_args.get("img_size", 224), 3, (0.5,) * 3, (0.5,) * 3),
        architecture=architecture,
        classifier="head",
        model_args=model_args,
    )


def _contribution(job: Job, backbone: Backbone, index: int) -> Contribution:
    """A task vector that changes weights by the order of 1e-3, and a factored Fisher."""
    kind, width = Kind(job.kind), backbone.num_features
    rank = 2 if job.scale == EMBEDDED else RANK
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(index))
    size = 1e-3 if kind is Kind.FULL else 1e-2
    tensors = {
        f"{weight}/{part}": draw([n or min(rank_of(weight, rank), *value.shape) for n in shape])
        * size
        for weight, value in backbone.theta_0.items()
        for part, shape in stored_shapes(kind, value).items()
    }
    dealt = range(job.classes)
    if job.own:
        dealt = sorted({(index * job.own + i) % job.classes for i in range(job.own)})
    classes = tuple(f"class-{i:03d}" for i in dealt)
    images = draw(2 * len(classes) + 64, width)
    labels = torch.arange(len(images)) % len(classes)
    return Contribution(
        client=name(index),
        task_vector=TaskVector(kind, tensors, backbone.fingerprint),
        head=Head(classes, draw(len(classes), width), torch.zeros(len(classes))),
        statistics=FeatureSums.of(images, labels, classes),
        num_examples=len(images),
        lineage=Lineage(anchored_by=tuple(map(name, range(max(0, index - job.lineage), index)))),
        fisher=_fisher(backbone, len(images)),
    )


def _fisher(backbone: Backbone, num_examples: int) -> FisherDiagonal:
    """All entries alike, and all inputs."""
    sums, inputs = {}, {}
    for weight, value in backbone.theta_0.items():
        rows, columns = value.shape
        sums[f"{weight}/rows"] = torch.full((rows,), float(columns))
        sums[f"{weight}/columns"] = torch.full((columns,), float(rows))
        inputs[f"{weight}/inputs"] = torch.ones(columns)
    return FisherDiagonal(sums, num_examples, inputs)
