"""Statistics of the composed model's features, of which a version's joint head was made again.

Sums are kept added up: the head needs no more, and the file goes as a whole when somebody leaves.
Mixtures are kept by client.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedcompo.composition.head import head_from_total, joint_head
from fedcompo.composition.settings import CompositionSettings
from fedcompo.composition.totals import exact_from, exact_tensors
from fedcompo.config.choices import Statistics
from fedcompo.method.contribution import (
    MIXTURES,
    SUMS,
    AnyStatistics,
    counts_of,
    statistics_from,
    statistics_tensors,
)
from fedcompo.method.heads import Head
from fedcompo.method.statistics import FeatureSums, total_of
from fedcompo.storage.tensorfile import prefixed
from fedcompo.storage.tensorstream import Section, StreamedTensors, save_streamed


def save_realigned(path: Path, statistics: Mapping[str, AnyStatistics] | FeatureSums) -> None:
    """Write statistics of one kind, by client; those that are sums are added up, or are already."""
    entry: dict[str, Any] = {"content": "realigned"}
    if isinstance(statistics, FeatureSums):
        entry[SUMS] = list(statistics.classes)
        save_streamed(path, exact_tensors(statistics), entry)
    elif sums := [own for own in statistics.values() if isinstance(own, FeatureSums)]:
        save_realigned(path, total_of(sums))
    else:
        tensors: dict[str, Tensor] = {}
        for client, own in statistics.items():
            tensors |= prefixed(client, statistics_tensors(own))
        entry[MIXTURES] = {client: counts_of(own) for client, own in statistics.items()}
        save_streamed(path, tensors, entry)


def realigned_head(path: Path, settings: CompositionSettings, shrinkage: float | None) -> Head:
    """Make the joint head of what :func:`save_realigned` wrote; every byte is checked."""
    tensors = StreamedTensors(path)
    tensors.check()
    if settings.statistics is Statistics.SUMS:
        return head_from_total(exact_from(tensors, tensors.manifest[SUMS]), shrinkage)
    mixtures = {
        client: statistics_from(Section(tensors, client), {MIXTURES: counts})
        for client, counts in tensors.manifest[MIXTURES].items()
    }
    return joint_head(mixtures, settings)
