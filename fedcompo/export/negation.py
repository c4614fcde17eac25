r"""Subtracts a client's task vector from composed weights: a *negated* copy of a model.

.. math:: \theta_- = \theta_P - s\,\tau

To leave a client out (:meth:`fedcompo.method.pool.Pool.without`) gives the model that never had it.
A negated copy is worse at the client's task than that. It is an experiment in forgetting: its card
says so, and it never goes into a registry.
Source: Ilharco et al., *Editing Models with Task Arithmetic*, ICLR 2023 (arXiv 2212.04089),
section 3, "forgetting via negation".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from fedcompo.errors import ConfigError
from fedcompo.method.task_vector import TaskVector


def negated(
    theta: Iterable[tuple[str, Tensor]],
    task_vector: TaskVector,
    theta_0: Mapping[str, Tensor],
    *,
    scale: float,
) -> Iterator[tuple[str, Tensor]]:
    r"""Subtract a task vector, one weight at a time.

    The difference is taken in float64 and rounded once, of the :math:`\tau` that composing adds.

    Args:
        theta: Names and values of weights to subtract from, (out, in): the composition without the
            client. Those that the task vector does not change pass through.
        task_vector: The task vector to subtract.
        theta_0: The pre-trained weights that it belongs to: (IA)³ scales them.
        scale: :math:`s`, > 0.

    Yields:
        Name and value of each weight of ``theta``, in its order, with its shape and dtype.

    Raises:
        ConfigError: If the scale is not a positive number.
    """
    if not (scale > 0 and math.isfinite(scale)):
        raise ConfigError(
            f"The strength of a negation must be a positive number, got {scale}. "
            "To add a task vector, compose it."
        )
    changed = set(task_vector.names)
    for name, weight in theta:
        if name not in changed:
            yield name, weight
            continue
        tau = task_vector.delta(name, theta_0[name]).to(weight.device)
        yield name, (weight.double() - scale * tau.double()).to(weight.dtype)
