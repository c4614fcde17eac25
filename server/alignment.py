"""The joint head, aligned on what the clients say of their features."""

from __future__ import annotations

from collections.abc import Mapping

from fedcompo.config.run import RunConfig
from fedcompo.method.features import FeatureMixture
from fedcompo.method.heads import Head, align
from fedcompo.seeds import derive_seed

Mixtures = dict[str, FeatureMixture]
"""Of one client, by class name."""


def align_joint_head(described: Mapping[str, Mixtures], config: RunConfig, purpose: str) -> Head:
    """Fit the joint head to features drawn from everyone's mixtures.

    Args:
        described: Mixtures by client.
        config: Settings of the fit, and the seed.
        purpose: What the draws are for; each purpose has its own.

    Returns:
        The head of all their classes, sorted.
    """
    by_class: dict[str, list[FeatureMixture]] = {}
    for client in sorted(described):
        for name, mixture in described[client].items():
            by_class.setdefault(name, []).append(mixture)
    return align(
        by_class,
        sorted(by_class),
        samples=config.head.align_samples,
        ridge=config.head.ridge,
        seed=derive_seed(config.seed, purpose),
    )
