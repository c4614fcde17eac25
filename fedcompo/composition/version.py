r"""A composed version on disk: the running sum and the model made of it, weight by weight.

One pass over the target weights yields both files, with a few weights in memory. A sum is continued
from the one before, or taken over all members; :mod:`fedcompo.composition.fixed_point` makes the
two the same, bit for bit. The folder is one that plain timm loads, unless it is composed of
tangents.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcompo.backbone.stored import StoredBackbone
from fedcompo.composition import fixed_point
from fedcompo.composition.timm_folder import timm_config
from fedcompo.method.contribution import mixture_tensors, mixtures_from
from fedcompo.method.features import FeatureMixture, Mixtures
from fedcompo.method.heads import Head
from fedcompo.method.task_vector import TaskVector
from fedcompo.storage.files import CONFIG, WEIGHTS, write_atomically
from fedcompo.storage.tensorstream import Section, StreamedTensors, TensorWriter, save_streamed

SUM, REALIGNED = "sum.safetensors", "realigned.safetensors"


class RoundedDifferently(Exception):
    """A task vector's rounded form is not the one that once went into the sum."""


@dataclass(frozen=True)
class Term:
    """One client's part of the sum."""

    client: str
    vector: TaskVector
    times: int
    """How often it counts: m_c; negative to take it out."""
    rounded_sha256: str = ""
    """What its rounded form must be; empty: not known yet."""


@dataclass(frozen=True)
class Recipe:
    """All that a version is made of."""

    backbone: StoredBackbone
    terms: Sequence[Term]
    """Clients that come (or, where ``before`` is given, come and go)."""
    before: StreamedTensors | None
    """Sum to continue from; None: start at zero."""
    count: int
    """M, over all members afterwards."""
    scale: float
    head: Head
    linearised: bool = False
    """Whether the members are tangents."""


def write_version(folder: Path, recipe: Recipe) -> list[str]:
    """Write a version's running sum and model.

    Args:
        folder: A folder that exists.
        recipe: What to write.

    Returns:
        SHA-256 of each term's rounded form, in the order of the terms.

    Raises:
        RoundedDifferently: If a term's rounded form is not what it was; compose from all members.
        ContributionError: If a value leaves the range of the sum.
    """
    backbone, head = recipe.backbone, recipe.head
    targets = set(backbone.target_weights)
    digests = [hashlib.sha256() for _ in recipe.terms]
    sums = {name: (torch.int64, backbone.tensors.layout[name][1]) for name in targets}
    classifier = {f"{backbone.classifier}.weight": head.weight}
    classifier[f"{backbone.classifier}.bias"] = head.bias
    layout = {
        **backbone.tensors.layout,
        **{n: (t.dtype, tuple(t.shape)) for n, t in classifier.items()},
    }
    about = {"base": backbone.fingerprint, "count": recipe.count}
    with contextlib.ExitStack() as files:
        running = files.enter_context(
            TensorWriter(folder / SUM, sums, {"content": "sum", "bits": fixed_point.BITS, **about})
        )
        manifest = {"content": "model", "scale": recipe.scale, **about}
        model = files.enter_context(TensorWriter(folder / WEIGHTS, layout, manifest))
        for name in sorted(layout):
            if name in classifier:
                model.write(name, classifier[name])
            elif name in targets:
                model.write(name, _composed(name, recipe, digests, running))
            else:
                model.write(name, backbone.tensors[name])
    found = [digest.hexdigest() for digest in digests]
    for term, digest in zip(recipe.terms, found, strict=True):
        if term.rounded_sha256 not in ("", digest):
            raise RoundedDifferently(term.client)
    described = timm_config(backbone, head.classes, linearised=recipe.linearised)
    config = json.dumps(described, indent=2)
    write_atomically(folder / CONFIG, f"{config}\n".encode())
    return found


def _composed(name: str, recipe: Recipe, digests: Sequence[Any], running: TensorWriter) -> Tensor:
    """Continue and write the sum of one weight; return the weight made of it."""
    weight = recipe.backbone.tensors[name]
    total = _sum(name, weight, recipe, digests)
    running.write(name, total)
    return fixed_point.compose(weight, total, count=recipe.count, scale=recipe.scale)


def _sum(name: str, weight: Tensor, recipe: Recipe, digests: Sequence[Any]) -> Tensor:
    """Continue the sum of one weight, and the digest of each term's rounded form."""
    total = torch.zeros(weight.shape, dtype=torch.int64)
    if recipe.before is not None:
        total = recipe.before[name]
    for term, digest in zip(recipe.terms, digests, strict=True):
        values = fixed_point.rounded(term.vector, name, weight, owner=f"client {term.client!r}")
        fixed_point.feed(digest, name, values)
        total = fixed_point.add(total, values, term.times)
    return total


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
