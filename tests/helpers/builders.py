"""Small things that tests are made of: "pico" models, random deltas, contributions of each kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedcompo.backbone.backbone import Backbone, target_weights
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.composition.running_sum import RunningSum
from fedcompo.config.choices import Kind, Statistics
from fedcompo.config.run import BackboneConfig, RunConfig
from fedcompo.data.client_data import Split
from fedcompo.method.contribution import AnyStatistics, Contribution
from fedcompo.method.deltas import Delta, Weights, new_deltas
from fedcompo.method.features import FeatureMixture
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.method.heads import Head
from fedcompo.method.lineage import Lineage
from fedcompo.method.statistics import FeatureSums
from fedcompo.method.task_vector import TaskVector
from fedcompo.storage import tensorfile

PICO_ARGS = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 8,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
    "num_classes": 0,
}
PATTERNS = BackboneConfig().target_weights
KINDS = tuple(Kind)
MIXABLE = tuple(kind for kind in Kind if kind is not Kind.TANGENT)
"""Kinds that one model can be composed of together; tangents keep to themselves."""


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(
    *shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Normal numbers, drawn in float64 and rounded: each dtype sees the same ones."""
    return (scale * torch.randn(*shape, generator=rng(seed), dtype=torch.float64)).to(dtype)


def pico_model(
    *, seed: int = 0, dtype: torch.dtype = torch.float64, dropout: float = 0.0
) -> VisionTransformer:
    """A vision transformer of two blocks and 8 features; its weights are far from trivial."""
    model = VisionTransformer(**PICO_ARGS, proj_drop_rate=dropout).double()
    generator = rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(start + (0.4 if parameter.ndim > 1 else 0.1) * noise)
    return model.to(dtype).eval()


def pico_backbone(*, seed: int = 0) -> Backbone:
    """A :func:`pico_model` in float32 as clients hold it."""
    model = pico_model(seed=seed, dtype=torch.float32).requires_grad_(False)
    return Backbone(
        model=model,
        theta_0=target_weights(model, PATTERNS),
        name="pico",
        fingerprint=f"pico@{tensorfile.tensor_digest(model.state_dict())}",
        preprocessing=Preprocessing(image_size=8, channels=1, mean=(0.5,), std=(0.5,)),
        architecture="vit_tiny_patch16_224",
        classifier="head",
        model_args={key: value for key, value in PICO_ARGS.items() if key != "num_classes"},
    )


def pico_weights(*, seed: int = 0, dtype: torch.dtype = torch.float64) -> Weights:
    """Two target weights, (out, in), without a model around them."""
    shapes = {"blocks.0.attn.qkv.weight": (6, 4), "blocks.0.mlp.fc1.weight": (5, 4)}
    return {
        name: normal(*shape, seed=seed + i, dtype=dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }


def random_like(weights: Weights, *, seed: int, positive: bool = False) -> Weights:
    """Normal numbers (squared if positive) of the same names, shapes and dtypes."""
    drawn = {
        n: normal(*w.shape, seed=seed + i, dtype=w.dtype)
        for i, (n, w) in enumerate(weights.items())
    }
    return {n: w.square() for n, w in drawn.items()} if positive else drawn


def random_deltas(
    kind: Kind, theta_0: Weights, *, seed: int, rank: int = 2, scale: float = 0.5
) -> dict[str, Delta]:
    """Deltas as they might be after training: every parameter is away from its start."""
    deltas = new_deltas(kind, theta_0, rank=rank, generator=rng(seed))
    with torch.no_grad():
        for i, name in enumerate(deltas):
            for j, parameter in enumerate(deltas[name].parameters()):
                shift = normal(*parameter.shape, seed=1000 * seed + 10 * i + j, scale=scale)
                parameter.add_(shift.to(parameter))
    return deltas


def task_vector(
    kind: Kind, theta_0: Weights, *, seed: int, base: str = "pico@0", scale: float = 0.5
) -> TaskVector:
    return TaskVector.of(kind, random_deltas(kind, theta_0, seed=seed, scale=scale), base=base)


def dense_by_hand(vector: TaskVector, theta_0: Weights) -> Weights:
    """Oracle of a task vector, from its stored tensors alone, in float64."""
    t = {name: tensor.double() for name, tensor in vector.tensors.items()}
    formulas = {
        Kind.FULL: lambda name: t[f"{name}/delta"],
        Kind.LORA: lambda name: t[f"{name}/B"] @ t[f"{name}/A"],
        Kind.IA3: lambda name: theta_0[name].double() * (t[f"{name}/l"] - 1),
        Kind.TANGENT: lambda name: t[f"{name}/delta"],
    }
    return {name: formulas[vector.kind](name) for name in theta_0}


def random_head(classes: Sequence[str], num_features: int, *, seed: int) -> Head:
    return Head(
        tuple(classes),
        normal(len(classes), num_features, seed=seed, dtype=torch.float32),
        normal(len(classes), seed=seed + 1, dtype=torch.float32),
    )


def random_mixture(
    num_features: int, *, seed: int, components: int = 2, num_examples: int = 20
) -> FeatureMixture:
    shares = torch.rand(components, generator=rng(seed)) + 0.1
    return FeatureMixture(
        shares / shares.sum(),
        normal(components, num_features, seed=seed + 1, scale=3, dtype=torch.float32),
        normal(components, num_features, seed=seed + 2, dtype=torch.float32).square() + 0.1,
        num_examples,
    )


def random_sums(
    classes: Sequence[str], num_features: int, *, seed: int, num_examples: int = 20
) -> FeatureSums:
    """Sums of normal features of so many images, dealt to the classes in turn."""
    features = normal(num_examples, num_features, seed=seed, scale=3)
    return FeatureSums.of(features, torch.arange(num_examples) % len(classes), sorted(classes))


def random_statistics(
    kind: Statistics,
    classes: Sequence[str],
    num_features: int,
    *,
    seed: int,
    num_examples: int = 20,
) -> AnyStatistics:
    """Sums of so many images, or a mixture for each class."""
    if kind is Statistics.SUMS:
        return random_sums(classes, num_features, seed=seed, num_examples=num_examples)
    share, rest = divmod(num_examples, len(classes))
    return {
        name: random_mixture(num_features, seed=seed + 10 * i, num_examples=share + (i < rest))
        for i, name in enumerate(classes)
    }


def contribution(
    client: str = "client-0",
    kind: Kind = Kind.LORA,
    *,
    theta_0: Weights | None = None,
    base: str = "pico@0",
    seed: int = 0,
    classes: Sequence[str] = ("cat", "dog"),
    num_examples: int = 20,
    with_fisher: bool = True,
    scale: float = 0.5,
    statistics: Statistics = Statistics.SUMS,
) -> Contribution:
    """A contribution with random content in every part."""
    theta_0 = pico_weights(dtype=torch.float32) if theta_0 is None else theta_0
    fisher = random_like(theta_0, seed=seed + 500, positive=True)
    return Contribution(
        client=client,
        task_vector=task_vector(kind, theta_0, seed=seed + 1, base=base, scale=scale),
        head=random_head(classes, 3, seed=seed + 700),
        statistics=random_statistics(
            statistics, classes, 3, seed=seed + 800, num_examples=num_examples
        ),
        num_examples=num_examples,
        lineage=Lineage(anchored_by=("client-8", "client-9"), aligned_with=("client-8",)),
        fisher=FisherDiagonal(fisher, num_examples) if with_fisher else None,
        settings=RunConfig.parse({"statistics": statistics}).of_client(),
    )


def mixed_pool_members(theta_0: Weights, *, seed: int = 0) -> list[Contribution]:
    """One contribution of each kind that mixes, of unequal size."""
    return [
        contribution(f"client-{i}", kind, theta_0=theta_0, seed=seed + 20 * i, num_examples=10 + i)
        for i, kind in enumerate(MIXABLE)
    ]


def left_or_right(count: int, *, seed: int = 0) -> Split:
    """Grey 8x8 images that are bright on the left (class 0) or on the right (class 1)."""
    generator = rng(seed)
    labels = torch.arange(count) % 2
    images = torch.randint(0, 60, (count, 1, 8, 8), generator=generator)
    images[labels == 0, :, :, :4] += 150
    images[labels == 1, :, :, 4:] += 150
    return Split(images.to(torch.uint8), labels)


def pixels(count: int, channels: int, size: int, *, seed: int = 0) -> Tensor:
    """Random images, uint8."""
    return torch.randint(0, 256, (count, channels, size, size), generator=rng(seed)).to(torch.uint8)


def altered(path: Path, position: int, mask: int = 1) -> None:
    """Flip bits of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(bytes(data))


def in_memory(folder: Path) -> Contribution:
    """A contribution whose tensors are read now: its files may go."""
    opened = Contribution.open(folder)
    vector, fisher = opened.task_vector, opened.fisher
    return replace(
        opened,
        task_vector=replace(vector, tensors=dict(vector.tensors)),
        fisher=FisherDiagonal.read(fisher.tensors, fisher.num_examples) if fisher else None,
    )


def running_sum_of(
    theta_0: Weights, vectors: Mapping[str, TaskVector], times: Mapping[str, int]
) -> RunningSum:
    """The sum of these task vectors, put in one after the other."""
    running = RunningSum(theta_0)
    for client, vector in vectors.items():
        running.put(client, vector, times=times[client])
    return running
