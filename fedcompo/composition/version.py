r"""A composed version on disk: the running sum and the model computed from it.

One pass over the target weights writes both files, with a few weights in memory. The sum continues
the one before, or is taken over all members; both give the same bits
(:mod:`fedcompo.composition.fixed_point`). Plain timm loads the folder, unless it is composed of
tangents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcompo.backbone.stored import StoredBackbone
from fedcompo.composition import fixed_point
from fedcompo.composition.fixed_point import Term
from fedcompo.composition.head import head_of
from fedcompo.composition.settings import CompositionSettings
from fedcompo.composition.timm_folder import write_model
from fedcompo.method.contribution import mixture_tensors, mixtures_from
from fedcompo.method.features import FeatureMixture, Mixtures
from fedcompo.method.heads import Head
from fedcompo.method.pool import Pool
from fedcompo.storage.files import SUM
from fedcompo.storage.tensorstream import Section, StreamedTensors, TensorWriter, save_streamed


class RoundedDifferently(Exception):
    """A task vector's rounded form differs from the one that went into the sum."""


@dataclass(frozen=True)
class Recipe:
    """All inputs of a version."""

    backbone: StoredBackbone
    terms: Sequence[Term]
    """Clients to add; where ``before`` is given, also clients to take out."""
    before: StreamedTensors | None
    """Sum to continue; None: start at zero."""
    count: int
    """M, over all members of the version."""
    scale: float
    head: Head
    linearised: bool = False
    """Whether the members are tangents."""

    @classmethod
    def of(cls, pool: Pool, backbone: StoredBackbone, settings: CompositionSettings) -> Recipe:
        """Compose exactly these contributions."""
        terms = [Term(m.client, m.task_vector, settings.times(m.num_examples)) for m in pool]
        count = sum(term.times for term in terms)
        head = head_of(pool, settings)
        return cls(backbone, terms, None, count, settings.scale, head, pool.linearised)


def write_version(folder: Path, recipe: Recipe) -> list[str]:
    """Write a version's running sum and model.

    Args:
        folder: A folder that exists.
        recipe: Inputs of the version.

    Returns:
        SHA-256 of each term's rounded form, in the order of the terms.

    Raises:
        RoundedDifferently: If a term's rounded form has changed; then compose from all members.
        ContributionError: If a value leaves the range of the sum.
    """
    backbone = recipe.backbone
    digests = [hashlib.sha256() for _ in recipe.terms]
    about = {"base": backbone.fingerprint, "count": recipe.count}
    layout = {
        name: (torch.int64, backbone.tensors.layout[name][1]) for name in backbone.target_weights
    }
    manifest = {"content": "sum", "bits": fixed_point.BITS, **about}
    with TensorWriter(folder / SUM, layout, manifest) as running:
        write_model(
            folder,
            backbone,
            _composed(recipe, digests, running),
            recipe.head,
            linearised=recipe.linearised,
            about={"scale": recipe.scale, **about},
        )
    rounded = [digest.hexdigest() for digest in digests]
    for term, digest in zip(recipe.terms, rounded, strict=True):
        if term.rounded_sha256 not in ("", digest):
            raise RoundedDifferently(term.client)
    return rounded


def _composed(
    recipe: Recipe, digests: Sequence[Any], running: TensorWriter
) -> Iterator[tuple[str, Tensor]]:
    """Compute and write the sum of each weight; yield the composed weight."""
    for name in sorted(recipe.backbone.target_weights):
        weight = recipe.backbone.tensors[name]
        before = recipe.before[name] if recipe.before is not None else None
        total = fixed_point.sum_of(recipe.terms, name, weight, start=before, digests=digests)
        running.write(name, total)
        yield name, fixed_point.compose(weight, total, count=recipe.count, scale=recipe.scale)


def save_realigned(path: Path, mixtures: Mapping[str, Mixtures]) -> None:
    """Write the clients' mixtures of the composed model's features."""
    tensors = {
        f"{client}/{name}": tensor
        for client, own in mixtures.items()
        for name, tensor in mixture_tensors(own).items()
    }
    counts = {
        client: {name: mixture.num_examples for name, mixture in own.items()}
        for client, own in mixtures.items()
    }
    save_streamed(path, tensors, {"content": "realigned", "mixtures": counts})


def load_realigned(path: Path) -> dict[str, dict[str, FeatureMixture]]:
    """Read what :func:`save_realigned` wrote, by client and class."""
    tensors = StreamedTensors(path)
    tensors.check()
    return {
        client: mixtures_from(Section(tensors, client), counts)
        for client, counts in tensors.manifest["mixtures"].items()
    }
