"""Merge the task vectors of a finished run in other ways, and measure the results.

::

    figures = evaluate_merges(Registry("runs/digits/registry"))
    figures["ties"]["class_il_accuracy"]

Each merge gets what the run's own composition got: if that was realigned, the joint head is made
anew of features of the merged model, with the registry's settings. Then every client measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from joint import described, measured
from merging import MERGES, Merge

from fedcompo.audit.evaluation import clients_data, run_config_of
from fedcompo.composition.head import head_of, joint_head
from fedcompo.config.run import RunConfig
from fedcompo.errors import ContributionError
from fedcompo.method.deltas import Weights
from fedcompo.method.heads import Head
from fedcompo.registry.registry import Registry
from fedcompo.runtime import pick_device

FROZEN = "frozen"
"""The pre-trained weights under the joint head: one round, and exactly removable."""


def evaluate_merges(
    registry: Registry, merges: Mapping[str, Merge] = MERGES, *, config: RunConfig | None = None
) -> dict[str, dict[str, Any]]:
    """Measure each merge, and the frozen backbone, on the members' test images.

    Args:
        registry: Of a finished simulation; its Fishers are needed by some merges.
        merges: By name; see :mod:`merging`.
        config: Says where the images are, and on which device to work; None: as the members were
            trained.

    Returns:
        By name of the merge: means over clients and ``per_client``, as :func:`joint.measured` says;
        or the ``reason`` why these task vectors cannot be merged so.

    Raises:
        DataError: If the images cannot be had.
    """
    config = config or run_config_of(registry)
    backbone = registry.backbone.load(pick_device(config.device))
    datas = list(clients_data(config.data, backbone, seed=config.seed, wanted=registry.clients))
    pool, settings = registry.pool(with_fisher=True), registry.settings
    linearised, aligned = pool.linearised, head_of(pool, settings)

    def head_for(theta: Weights) -> Head:
        if not registry.realigned:
            return aligned
        return joint_head(
            described(backbone, theta, datas, config, purpose="realign", linearised=linearised),
            settings,
            shrinkage=registry.shrinkage,
        )

    figures = {FROZEN: measured(backbone, {}, aligned, datas)}
    for name, merge in merges.items():
        try:
            theta = merge(pool, backbone.theta_0)
        except ContributionError as error:
            figures[name] = {"reason": str(error)}
        else:
            head = head_for(theta)
            figures[name] = measured(backbone, theta, head, datas, linearised=linearised)
    return figures
