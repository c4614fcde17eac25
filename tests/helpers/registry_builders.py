"""Small registries, contributions to fill them with, and exact oracles of what they compose."""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from builders import (
    contribution,
    dense_by_hand,
    pico_backbone,
    random_head,
    random_like,
    random_mixture,
    random_statistics,
    random_sums,
)
from torch import Tensor

from fedcompo.backbone.backbone import Backbone
from fedcompo.composition import fixed_point
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Kind, Statistics
from fedcompo.method.contribution import AnyStatistics, Contribution
from fedcompo.method.deltas import Weights
from fedcompo.method.features import FeatureMixture
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.method.lineage import Lineage
from fedcompo.method.pool import Pool
from fedcompo.method.statistics import FeatureSums
from fedcompo.method.task_vector import TaskVector
from fedcompo.registry.registry import Registry

WIDTH = 8
"""Features of the pico backbone."""
QUICK = CompositionSettings()
OF_MIXTURES = CompositionSettings(statistics=Statistics.MIXTURES, align_samples=8)
"""Settings of a registry as it was written before there were sums."""


@functools.cache
def backbone() -> Backbone:
    return pico_backbone()


def member(
    client: str = "ada",
    kind: Kind = Kind.LORA,
    *,
    seed: int = 0,
    classes: Sequence[str] = ("cat", "dog"),
    num_examples: int = 20,
    lineage: Lineage | None = None,
    with_fisher: bool = False,
    statistics: Statistics = Statistics.SUMS,
) -> Contribution:
    """A contribution to :func:`backbone` with random content in every part."""
    num_examples = max(num_examples, len(classes))
    own = zlib.crc32(client.encode("utf-8", "replace")) % 1000  # nobody is another's copy
    seed = 10_000 * (seed + 1 + 100 * own)  # what is derived from it must not meet another's
    made = contribution(
        client,
        kind,
        theta_0=backbone().theta_0,
        base=backbone().fingerprint,
        seed=seed,
        classes=classes,
        num_examples=num_examples,
        with_fisher=False,
        statistics=statistics,
    )
    sums = random_like(backbone().theta_0, seed=seed + 500, positive=True)
    return replace(
        made,
        head=random_head(classes, WIDTH, seed=seed + 1),
        statistics=random_statistics(
            statistics, classes, WIDTH, seed=seed + 2, num_examples=num_examples
        ),
        num_examples=num_examples,
        lineage=lineage or Lineage(),
        fisher=FisherDiagonal(sums, num_examples) if with_fisher else None,
    )


def sums(classes: Sequence[str], *, seed: int, num_examples: int = 20) -> FeatureSums:
    """Random sums as wide as the features of :func:`backbone`."""
    return random_sums(classes, WIDTH, seed=seed, num_examples=num_examples)


def mixtures(classes: Iterable[str], *, seed: int) -> dict[str, FeatureMixture]:
    """One random mixture a class."""
    return {
        name: random_mixture(WIDTH, seed=seed + 10 * i, num_examples=5 + seed % 7 + i)
        for i, name in enumerate(classes)
    }


def one_of_each_kind(statistics: Statistics = Statistics.SUMS) -> list[Contribution]:
    """Three clients, of the kinds that mix; two of them share a class, one has a single class."""
    given: dict[str, Any] = {"statistics": statistics}
    return [
        member("ada", Kind.FULL, seed=1, classes=("cat", "dog"), num_examples=10, **given),
        member("ben", Kind.LORA, seed=2, classes=("dog", "owl"), num_examples=25, **given),
        member("cho", Kind.IA3, seed=3, classes=("yak",), num_examples=40, **given),
    ]


def tangents() -> list[Contribution]:
    """The same three clients, all of tangents."""
    return [
        member("ada", Kind.TANGENT, seed=1, classes=("cat", "dog"), num_examples=10),
        member("ben", Kind.TANGENT, seed=2, classes=("dog", "owl"), num_examples=25),
        member("cho", Kind.TANGENT, seed=3, classes=("yak",), num_examples=40),
    ]


def registry_of(
    path: Path, *contributions: Contribution, settings: CompositionSettings = QUICK
) -> Registry:
    """A new registry of these clients."""
    registry = Registry.create(path, backbone(), settings)
    if contributions:
        registry.add(*contributions)
    return registry


@functools.cache
def _three() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    registry_of(Path(folder.name) / "registry", *one_of_each_kind())
    return folder


def three_clients(path: Path) -> Registry:
    """A registry of :func:`one_of_each_kind`, copied from one that is made once."""
    return Registry(shutil.copytree(Path(_three().name) / "registry", path, symlinks=True))


def own_statistics(registry: Registry, *, seed: int = 0) -> dict[str, AnyStatistics]:
    """Statistics to realign a registry's joint head with, different for each client."""
    kind = registry.settings.statistics
    return {
        client: random_statistics(
            kind,
            m.classes,
            WIDTH,
            seed=seed + 100 * i,
            num_examples=m.num_examples + len(m.classes),
        )
        for i, (client, m) in enumerate(registry.state.members.items())
    }


def contents(folder: Path) -> dict[str, bytes | str]:
    """All that lies in a folder: bytes of files, targets of links, folders; but for the lock."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        elif name != "lock":
            found[name] = path.read_bytes()
    return found


def overwrite(path: Path, data: bytes) -> None:
    """Put other bytes into a file of the same size; cutting it first would cost milliseconds."""
    with path.open("r+b") as file:
        file.write(data)


def composition(registry: Registry) -> dict[str, bytes]:
    """The files of the current composition."""
    folder = registry.path / registry.state.version
    return {path.name: path.read_bytes() for path in folder.iterdir()} if registry.clients else {}


def same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether names, dtypes, shapes and bytes agree."""

    def bits(tensors: dict[str, Tensor], name: str) -> tuple[object, ...]:
        tensor = tensors[name].detach().contiguous()
        raw = tensor.view(-1).view(torch.uint8).numpy().tobytes()
        return tensor.dtype, tensor.shape, raw

    return actual.keys() == expected.keys() and all(
        bits(actual, name) == bits(expected, name) for name in actual
    )


def scale_by_hand(pool: Pool, theta_0: Weights, times: Mapping[str, float] | None = None) -> float:
    """The scale that keeps the length of task vectors, in float64, the factor to four digits."""
    times = times or dict.fromkeys(pool.clients, 1)
    together = sum(times.values())
    flat = {
        c.client: torch.cat([t.flatten() for t in dense_by_hand(c.task_vector, theta_0).values()])
        for c in pool
    }
    energy = sum(n * float(flat[client].square().sum()) for client, n in times.items())
    length = float(sum(n * flat[client] for client, n in times.items()).norm())
    scale = min(math.sqrt(together * energy) / length, len(times))
    return float(f"{scale / together:.4g}") * together


# -- exact oracles: Python's integers and fractions -----------------------------------------------


def once(value: Fraction) -> Fraction:
    """Round to float64, as one operation of the processor does; Python divides correctly."""
    return Fraction(float(value))


def fractions(tensor: Tensor) -> list[list[Fraction]]:
    """The values of a matrix, exactly."""
    return [[Fraction(value) for value in row] for row in tensor.double().tolist()]


def exact_delta(vector: TaskVector, name: str, weight: Tensor) -> list[list[Fraction]]:
    """τ of one weight, with the roundings that ``reproducible_delta`` states, and no others."""
    rows, columns = range(weight.shape[0]), range(weight.shape[1])
    if vector.kind in (Kind.FULL, Kind.TANGENT):
        return fractions(vector.tensors[f"{name}/delta"])
    if vector.kind is Kind.IA3:
        w, l = fractions(weight), fractions(vector.tensors[f"{name}/l"])  # noqa: E741
        return [[once(w[i][j] * once(l[i][0] - 1)) for j in columns] for i in rows]
    a = fractions(vector.tensors[f"{name}/A"].float())
    b = fractions(vector.tensors[f"{name}/B"].float())
    total = [[Fraction(0) for _ in columns] for _ in rows]
    for i in rows:
        for j in columns:
            for rank in range(len(a)):
                total[i][j] = once(total[i][j] + b[i][rank] * a[rank][j])
    return total


def exact_term(vector: TaskVector, name: str, weight: Tensor) -> list[list[int]]:
    """q of one weight: the nearest whole multiples of the grid, ties to even."""
    scaled = 2**fixed_point.BITS
    return [[round(value * scaled) for value in row] for row in exact_delta(vector, name, weight)]
