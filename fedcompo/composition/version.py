r"""A composed version on disk: the running sum and the model computed from it.

First the sum is written, one weight at a time. It continues the one before, or is taken over all
members; both give the same bits (:mod:`fedcompo.composition.fixed_point`). Then the factor is
known, and the model is computed from the sum, or from what the rule of composition makes of the
members in its place. Plain timm loads the folder, unless it is composed of tangents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcompo.backbone.stored import StoredBackbone
from fedcompo.composition import fixed_point
from fedcompo.composition.fixed_point import Term
from fedcompo.composition.lengths import Rounding, squared_length
from fedcompo.composition.rules.rule import Changes
from fedcompo.composition.settings import CompositionSettings
from fedcompo.composition.timm_folder import write_model
from fedcompo.method.contribution import Contribution
from fedcompo.method.heads import Head
from fedcompo.method.pool import Pool
from fedcompo.report.progress import each
from fedcompo.runtime import THREADS, Made, in_order
from fedcompo.storage.files import RULED, SUM
from fedcompo.storage.tensorstream import StreamedTensors, TensorWriter


def terms_of(pool: Pool, settings: CompositionSettings) -> list[Term]:
    """Return the members of a pool as terms of a sum."""
    return [Term(m.client, m.task_vector, settings.times(m.num_examples)) for m in pool]


def write_sum(
    path: Path,
    backbone: StoredBackbone,
    terms: Sequence[Term],
    *,
    count: int,
    before: StreamedTensors | None = None,
    hashed: bool = False,
) -> tuple[list[Rounding], float]:
    r"""Write a running sum.

    Args:
        path: A new file.
        backbone: Pre-trained weights.
        terms: Clients to add; where ``before`` is given, also clients to take out.
        count: M, over all members.
        before: Sum to continue; None: start at zero.
        hashed: Hash the rounded form of those who are new, which keeps it to one thread.

    Returns:
        The rounding of each term, in their order, and :math:`\lVert\sum_c m_c \tau_c\rVert^2`.

    Raises:
        ContributionError: If a value leaves the range of the sum, or a newcomer's training
            diverged.
    """
    roundings = [
        Rounding(term.client if term.is_new else "", hashed=hashed and term.is_new)
        for term in terms
    ]
    squared = 0.0
    layout = {
        name: (torch.int64, backbone.tensors.layout[name][1]) for name in backbone.target_weights
    }
    about = {"base": backbone.fingerprint, "count": count}

    def added_up(name: str) -> tuple[str, Tensor, float, list[Rounding]]:
        weight, start = backbone.tensors[name], before[name] if before is not None else None
        parts = [rounding.part() for rounding in roundings]
        total = fixed_point.sum_of(terms, name, weight, start=start, roundings=parts)
        return name, total, squared_length(total), parts

    with TensorWriter(path, layout, {"content": "sum", "bits": fixed_point.BITS, **about}) as file:
        threads = 1 if hashed else THREADS
        for name, total, length, parts in _each(added_up, backbone, "adding up", threads):
            squared += length
            for rounding, part in zip(roundings, parts, strict=True):
                rounding.take(part)
            file.write(name, total)
    return roundings, squared


def write_ruled(
    folder: Path,
    backbone: StoredBackbone,
    settings: CompositionSettings,
    members: Sequence[Contribution],
    times: Mapping[str, float],
    *,
    same: StreamedTensors | None = None,
) -> float:
    r"""Write what the rule makes of the members, beside their sum; returns its squared length.

    Args:
        folder: Holds the sum.
        backbone: Pre-trained weights.
        settings: The rule.
        members: Sorted by name; empty for a rule that needs their sum alone.
        times: How often each member counts, by client.
        same: The total of the same members, if it is there already.

    Raises:
        ContributionError: If the rule cannot compose them.
    """
    rule, running, squared = settings.made_by, StreamedTensors(folder / SUM), 0.0
    rule.check(members, times)
    about = {"content": "ruled", "bits": fixed_point.BITS, "base": backbone.fingerprint}

    def ruled(name: str) -> tuple[str, Tensor, float]:
        if same is None:
            changes = Changes(name, backbone.tensors[name], members, times, running[name])
            total = rule.on_grid(changes)
        else:
            total = same[name]
        return name, total, squared_length(total)

    with TensorWriter(folder / RULED, running.layout, {**about, "rule": rule.text}) as file:
        for name, total, length in _each(ruled, backbone, f"composing by {rule.text}"):
            squared += length
            file.write(name, total)
    return squared


def write_composed(
    folder: Path,
    backbone: StoredBackbone,
    head: Head,
    *,
    factor: float,
    linearised: bool,
    about: Mapping[str, Any],
) -> None:
    r"""Write the model that follows from the sum in the same folder, or from another rule's total.

    The factor is :math:`\lambda'`; ``about`` holds further entries of the manifest.
    """
    running, ruled = StreamedTensors(folder / SUM), folder / RULED
    total = StreamedTensors(ruled) if ruled.exists() else running

    def composed(name: str) -> tuple[str, Tensor]:
        return name, fixed_point.compose(backbone.tensors[name], total[name], factor=factor)

    about = {**about, "base": backbone.fingerprint, "count": running.manifest["count"]}
    weights = _each(composed, backbone, "composing")
    write_model(folder, backbone, weights, head, linearised=linearised, about=about)


def _each(
    work: Callable[[str], Made], backbone: StoredBackbone, what: str, threads: int = THREADS
) -> Iterator[Made]:
    """Do the work of each target weight, in their order, and tell whoever listens how far it is."""
    names = sorted(backbone.target_weights)
    made = in_order(work, names, most=threads)
    return each(made, "weights", what, total=len(names))
