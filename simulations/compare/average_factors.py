"""The one-shot mean of A and of B, each by itself: the merge that is not a rule of composition."""

from __future__ import annotations

import torch

from fedcompo.config.choices import Kind
from fedcompo.errors import ContributionError
from fedcompo.method.deltas import Weights
from fedcompo.method.pool import Pool


def average_factors(pool: Pool, theta_0: Weights) -> Weights:
    r"""Average the factors separately, :math:`\theta_0 + \bar B\bar A`: a common mistake.

    The mean of the task vectors is :math:`\tfrac1T\sum_c B_c A_c`. Here each B meets every A,
    though each client drew its own.

    Raises:
        ContributionError: If a task vector is no LoRA, or its ranks are not those of the others.
    """
    pool.check_composable(None)
    first = pool.contributions[0].task_vector.tensors
    shapes = {name: tuple(first[name].shape) for name in first}
    for member in pool:
        vector = member.task_vector
        found = {name: tuple(vector.tensors[name].shape) for name in vector.tensors}
        if vector.kind is not Kind.LORA or found != shapes:
            raise ContributionError(
                f"Factors are averaged of LoRAs of one rank; client {member.client!r} has a task "
                f"vector of kind {vector.kind}, or of other ranks than the first."
            )
    theta_p = dict(theta_0)
    for name in pool.contributions[0].task_vector.names:
        weight = theta_0[name]
        a, b = (
            torch.stack([c.task_vector.tensors[f"{name}/{factor}"].double() for c in pool]).mean(0)
            for factor in "AB"
        )
        theta_p[name] = (weight.double() + (b @ a).to(weight.device)).to(weight.dtype)
    return theta_p
