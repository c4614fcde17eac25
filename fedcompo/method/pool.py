r"""The pool of contributions: task vectors are added up here.

.. math:: \theta_P = \theta_0 + \lambda \sum_c w_c\,\tau_c, \qquad w_c \ge 0,\ \sum_c w_c = 1

To remove a client is to leave out its term. The sum is over dense :math:`\tau`, one weight at a
time, so memory is a few weights, not models: averaging the factors of LoRAs would be wrong. Kinds
mix, except for tangents: their sum is a direction, in which the backbone is linearised
(:mod:`fedcompo.backbone.tangent`); the sum of the others is a change of the weights themselves.
Source: Porrello et al., ICLR 2025 (arXiv 2405.16350), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedcompo.config.choices import Kind, are_tangents
from fedcompo.errors import BackboneMismatch, ContributionError
from fedcompo.method.contribution import Contribution
from fedcompo.method.deltas import Weights
from fedcompo.method.task_vector import weighted_sum
from fedcompo.names import require_known
from fedcompo.runtime import in_order


@dataclass(frozen=True)
class Pool:
    """Contributions of distinct clients; operations return new pools.

    Example::

        theta_p = pool.without("hospital-b").compose(theta_0)
    """

    contributions: tuple[Contribution, ...] = ()

    def __post_init__(self) -> None:
        """Order by name, so that no result depends on the order of arrival."""
        ordered = tuple(sorted(self.contributions, key=lambda c: c.client))
        names = [contribution.client for contribution in ordered]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ContributionError(f"Client(s) {', '.join(twice)} are in the pool already.")
        first, *others = ordered or (None,)
        for other in others:
            if first is not None and other.task_vector.base != first.task_vector.base:
                raise BackboneMismatch(
                    f"Client {other.client!r} was trained on {other.task_vector.base}, client "
                    f"{first.client!r} on {first.task_vector.base}. Task vectors add up only on "
                    "one backbone; train one of them again."
                )
        object.__setattr__(self, "contributions", ordered)

    @property
    def clients(self) -> tuple[str, ...]:
        """Names of the clients, sorted."""
        return tuple(contribution.client for contribution in self.contributions)

    @property
    def linearised(self) -> bool:
        """Whether all members are tangents: the composition is then evaluated linearised."""
        return are_tangents(c.task_vector.kind for c in self)

    def __iter__(self) -> Iterator[Contribution]:
        """Contributions in the order of names."""
        return iter(self.contributions)

    def __len__(self) -> int:
        """Number of clients."""
        return len(self.contributions)

    def only(self, *clients: str) -> Pool:
        """Return the pool of these clients alone, for a specialised model."""
        require_known(clients, self.clients, "pool")
        return Pool(tuple(c for c in self.contributions if c.client in clients))

    def without(self, *clients: str) -> Pool:
        """Return the pool as if these clients had never contributed."""
        require_known(clients, self.clients, "pool")
        return Pool(tuple(c for c in self.contributions if c.client not in clients))

    def compose(
        self,
        theta_0: Weights,
        coefficients: Mapping[str, float] | None = None,
        *,
        scale: float = 1.0,
    ) -> Weights:
        r"""Add the task vectors to the pre-trained weights.

        The sum is in float64, in the order of clients' names.

        Args:
            theta_0: Target weights by name, each (out, in).
            coefficients: :math:`w_c` by client; None: equal ones.
            scale: :math:`\lambda`.

        Returns:
            :math:`\theta_P`, same names, shapes, dtypes as ``theta_0``.

        Raises:
            ContributionError: If the pool is empty or mixes tangents with another kind, or the
                coefficients are not one a client, not negative, summing to one.
        """
        theta_p = dict(theta_0)
        theta_p.update(self.stream(theta_0, coefficients, scale=scale))
        return theta_p

    def stream(
        self,
        theta_0: Mapping[str, Tensor],
        coefficients: Mapping[str, float] | None = None,
        *,
        scale: float = 1.0,
        names: Iterable[str] | None = None,
        normalise: bool = True,
    ) -> Iterator[tuple[str, Tensor]]:
        """Compose one weight after the other, in the order of names; see :meth:`compose`.

        Args:
            theta_0: Target weights by name, each (out, in).
            coefficients: By client; None: equal ones.
            scale: λ.
            names: Weights to compose; None: all that change.
            normalise: Whether coefficients must be a mean's.
        """
        coefficients = self.check_composable(coefficients, normalise=normalise)
        holders: dict[str, list[Contribution]] = {}
        for contribution in self:
            for name in contribution.task_vector.names:
                holders.setdefault(name, []).append(contribution)

        def composed(name: str) -> tuple[str, Tensor]:
            weight = theta_0[name]
            own = ((c.task_vector, coefficients[c.client]) for c in holders.get(name, ()))
            change = weighted_sum(own, name, weight)
            return name, change.mul_(scale).add_(weight).to(weight.dtype)

        yield from in_order(composed, sorted(holders if names is None else names))

    def check_composable(
        self, coefficients: Mapping[str, float] | None, *, base: str = "", normalise: bool = True
    ) -> dict[str, float]:
        """Return the coefficients that :meth:`compose` uses; raises as it does.

        And ``BackboneMismatch``, if it was trained on another base than this fingerprint. Without
        ``normalise`` coefficients may be negative and have any sum.
        """
        if not self.contributions:
            raise ContributionError("An empty pool cannot be composed; add a contribution.")
        trained_on = self.contributions[0].task_vector.base
        if base and base != trained_on:
            raise BackboneMismatch(
                f"The pool was trained on the backbone {trained_on}, but is to be composed on "
                f"{base}. Load the backbone that it was trained on."
            )
        require_unmixed({c.client: c.task_vector.kind for c in self})
        if coefficients is None:
            return dict.fromkeys(self.clients, 1 / len(self))
        if set(coefficients) != set(self.clients):
            raise ContributionError(
                f"Coefficients are given for {', '.join(sorted(coefficients)) or 'nobody'}, "
                f"expected exactly {', '.join(self.clients)}."
            )
        total = sum(coefficients.values())  # fsum raises where it overflows, or infinities meet
        mean = abs(total - 1) <= 1e-6 and min(coefficients.values()) >= 0
        if not (mean if normalise else math.isfinite(total)):
            raise ContributionError(
                f"Coefficients must be >= 0 and sum to 1, got {dict(coefficients)} with the sum "
                f"{total:.6g}. Use `scale` to enlarge the sum, or a recipe with "
                "`normalise = false`, which takes any numbers."
            )
        return dict(coefficients)


def require_unmixed(kinds: Mapping[str, str]) -> None:
    """Refuse tangents together with another kind; raises ``ContributionError``.

    Args:
        kinds: Kind of each client's task vector, by client.
    """
    tangents = [client for client, kind in sorted(kinds.items()) if kind == Kind.TANGENT]
    others = [client for client, kind in sorted(kinds.items()) if kind != Kind.TANGENT]
    if tangents and others:
        raise ContributionError(
            f"Client {tangents[0]!r} is of kind {Kind.TANGENT}, client {others[0]!r} of kind "
            f"{kinds[others[0]]}: a model is linearised, or it is not. Compose them apart, in "
            "registries of their own, or train one of them again as the other kind."
        )
