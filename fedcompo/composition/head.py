"""The joint head: one classifier for all classes, made of the clients' statistics."""

from __future__ import annotations

from collections.abc import Mapping

from fedcompo.composition.claims import capped
from fedcompo.composition.settings import CompositionSettings
from fedcompo.errors import ContributionError
from fedcompo.method.contribution import AnyStatistics
from fedcompo.method.features import FeatureMixture
from fedcompo.method.heads import Head, align, discriminant
from fedcompo.method.pool import Pool
from fedcompo.method.statistics import FeatureSums, total_of
from fedcompo.runtime import one_thread
from fedcompo.seeds import derive_seed

SHRINKAGE = 0.3
"""Shrinkage of the features' covariance: of the composed model's features, whose images were mostly
trained on, it wants more than of pre-trained ones, which lose nothing by it."""


def joint_head(
    statistics: Mapping[str, AnyStatistics],
    settings: CompositionSettings,
    *,
    purpose: str = "joint-head",
    shrinkage: float | None = None,
) -> Head:
    """Make the joint head: of sums in closed form, of mixtures by features drawn from them.

    Args:
        statistics: By client; of θ₀'s features, or of the composed model's.
        settings: Cap on the images of a class; mixtures: number of features for each class, ridge
            and seed.
        purpose: mixtures: purpose of the draws; each has draws of its own.
        shrinkage: sums: see :func:`~fedcompo.method.heads.discriminant`; None: :data:`SHRINKAGE`.

    Returns:
        The head of all classes, sorted. The order of clients and the number of threads do not
        change it.

    Raises:
        ContributionError: If there are sums of some clients and mixtures of others.
    """
    statistics = {c: capped(own, settings.class_cap) for c, own in statistics.items()}
    sums = [own for own in statistics.values() if isinstance(own, FeatureSums)]
    if sums and len(sums) < len(statistics):
        raise ContributionError(
            "Some clients describe their features by sums, others by mixtures: no head can be made "
            "of both. Train all of them with the same `statistics`."
        )
    if sums:
        return head_from_total(total_of(sums), shrinkage)
    by_class: dict[str, list[FeatureMixture]] = {}
    for client in sorted(statistics):
        own = statistics[client]
        assert not isinstance(own, FeatureSums)
        for name, mixture in own.items():
            by_class.setdefault(name, []).append(mixture)
    with one_thread():
        return align(
            by_class,
            sorted(by_class),
            samples=settings.align_samples,
            ridge=settings.ridge,
            seed=derive_seed(settings.seed, purpose),
        )


def head_from_total(total: FeatureSums, shrinkage: float | None = None) -> Head:
    """Make the joint head of the sum of all clients' statistics."""
    with one_thread():
        return discriminant(total, shrinkage=SHRINKAGE if shrinkage is None else shrinkage)


def head_of(pool: Pool, settings: CompositionSettings) -> Head:
    """Make the joint head of some clients of their statistics of θ₀'s features."""
    return joint_head({member.client: member.statistics for member in pool}, settings)
