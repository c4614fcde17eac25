"""The joint head: one classifier for all classes, fitted to the clients' mixtures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from fedcompo.composition.settings import CompositionSettings
from fedcompo.method.features import FeatureMixture, Mixtures
from fedcompo.method.heads import Head, align
from fedcompo.method.pool import Pool
from fedcompo.seeds import derive_seed


def joint_head(
    mixtures: Mapping[str, Mixtures], settings: CompositionSettings, *, purpose: str = "joint-head"
) -> Head:
    """Fit the joint head to features drawn from all clients' mixtures.

    Args:
        mixtures: By client and class; of θ₀'s features, or of the composed model's.
        settings: Number of features for each class, ridge and seed.
        purpose: Purpose of the draws; each has draws of its own.

    Returns:
        The head of all classes, sorted. The order of clients and the number of threads do not
        change it.
    """
    by_class: dict[str, list[FeatureMixture]] = {}
    for client in sorted(mixtures):
        for name, mixture in mixtures[client].items():
            by_class.setdefault(name, []).append(mixture)
    with one_thread():
        return align(
            by_class,
            sorted(by_class),
            samples=settings.align_samples,
            ridge=settings.ridge,
            seed=derive_seed(settings.seed, purpose),
        )


def head_of(pool: Pool, settings: CompositionSettings) -> Head:
    """Fit the joint head of some clients to their mixtures of θ₀'s features."""
    return joint_head({member.client: member.features for member in pool}, settings)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: the bits of a matrix product depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
