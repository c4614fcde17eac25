r"""What a rule of composition is, and what it is given.

The rule sees one weight at a time: each member's change as rounded to the grid of
:mod:`fedcompo.composition.fixed_point`, so that every machine sees the same values. It returns
their total, which is rounded to that grid too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedcompo.composition import fixed_point
from fedcompo.composition.fixed_point import BITS, CEILING, GRID, Term
from fedcompo.composition.lengths import Rounding, squared_length
from fedcompo.errors import ContributionError, blaming
from fedcompo.method.contribution import Contribution
from fedcompo.method.fisher import FisherDiagonal


@dataclass(frozen=True)
class Change:
    """One member's change of one weight."""

    member: Contribution
    """All that it sent, for a rule that needs more of it than its task vector."""
    times: float
    """How often it counts: m_c."""
    tau: Tensor
    """(out, in), float64, a new tensor."""


@dataclass(frozen=True)
class Changes:
    """The members' changes of one weight, in the order of names; read anew at each pass."""

    name: str
    """Name of the weight."""
    weight: Tensor
    """Its pre-trained value, (out, in)."""
    members: Sequence[Contribution]
    """Sorted by name. May be empty for a rule that needs their sum alone, where that is known."""
    times: Mapping[str, float]
    """How often each member counts, by client: whole numbers m_c, or any coefficients."""
    known: Tensor | None = None
    """S, the members' sum on the grid, (out, in), int64; None: it is taken here."""
    squares: dict[str, float] | None = None
    """Where squared lengths are noted as members are read, by client; None: nowhere."""

    def __iter__(self) -> Iterator[Change]:
        """Read one member after the other; a pass holds one of them."""
        for own, values in self._rounded():
            yield Change(own, self.times[own.client], values.double().mul_(GRID))

    def _rounded(self) -> Iterator[tuple[Contribution, Tensor]]:
        for own in self.members:
            with blaming(own.client):
                owner = f"client {own.client!r}"
                values = fixed_point.rounded(own.task_vector, self.name, self.weight, owner=owner)
            if self.squares is not None:
                self.squares[own.client] = squared_length(values)
            yield own, values

    def __len__(self) -> int:
        """T, the number of members."""
        return len(self.times)

    @property
    def together(self) -> float:
        """M, how often all members count."""
        return sum(self.times.values())

    def exact_sum(self) -> Tensor:
        """Return S, (out, in), int64; the members must count whole times."""
        if self.known is not None:
            return self.known
        times = self.times
        terms = [Term(own.client, own.task_vector, int(times[own.client])) for own in self.members]
        if self.squares is None:
            return fixed_point.sum_of(terms, self.name, self.weight)
        roundings = [Rounding() for _ in terms]
        total = fixed_point.sum_of(terms, self.name, self.weight, roundings=roundings)
        self.squares.update({t.client: r.squared for t, r in zip(terms, roundings, strict=True)})
        return total

    @property
    def whole(self) -> bool:
        """Whether all members count whole times."""
        return all(isinstance(times, int) for times in self.times.values())

    def sum(self) -> Tensor:
        r"""Return :math:`\sum_c m_c \tau_c`, (out, in), float64, a new tensor."""
        if self.whole:
            return self.exact_sum().double().mul_(GRID)
        total = torch.zeros(self.weight.shape, dtype=torch.float64)
        for change in self:
            total.add_(change.tau, alpha=change.times)
        return total


@dataclass(frozen=True)
class Rule:
    """How the members' changes of one weight become one; each rule is a subclass.

    The fields of a subclass are the rule's options, declared by
    :func:`~fedcompo.config.setting.setting`; a trailing underscore is not part of their name.
    """

    name: ClassVar[str]
    needs: ClassVar[str] = ""
    """What members must hold beside a task vector, in words; empty: nothing."""
    takes_inputs: ClassVar[bool] = False
    """Whether that is the squares of layers' inputs, which are not sent under noise."""
    removal: ClassVar[Literal["O(1)", "O(T)"]] = "O(T)"
    """What is read to compose without a member: all T that stay; or it alone, out of the sum."""
    weighted: ClassVar[bool] = True
    """Whether members may count differently."""
    is_sum: ClassVar[bool] = False
    """Whether the total is the members' sum itself."""
    votes: ClassVar[bool] = True
    r"""Whether :math:`\lambda` is open to a fixed scale, or to the clients' vote."""
    portable: ClassVar[bool] = True
    """Whether every machine computes the same bits; not so if it takes singular vectors."""

    @property
    def text(self) -> str:
        """The rule with all its options, as :func:`parse_rule` reads it."""
        options = [f"{f.name.rstrip('_')}={getattr(self, f.name)}" for f in fields(self)]
        return f"{self.name}:{','.join(options)}" if options else self.name

    @property
    def factor(self) -> float | None:
        r""":math:`\lambda'`, if the rule itself says it; None: it is chosen."""
        return None

    @property
    def kept_by(self) -> str:
        """Settings of a run under which clients send what the rule needs."""
        noise = " and `dp-noise = 0`" if self.takes_inputs else ""
        return f"`keep-fisher = true`, a `fisher-form` other than none{noise}"

    def check(self, members: Sequence[Contribution], times: Mapping[str, float]) -> None:
        """Refuse members that the rule cannot compose; raises ``ContributionError``."""
        if not self.weighted and len(set(times.values())) > 1:
            raise ContributionError(
                f"The rule {self.name} has no weights in its equation: all members count alike. "
                "Compose without weights and with `coefficients = uniform`, or by another rule."
            )
        if not self.is_sum and min(times.values()) < 0:
            raise ContributionError(
                f"The rule {self.name} takes no member that counts less than nothing, got "
                f"{dict(times)}. Give no negative weight, or compose by the mean."
            )
        self.require({own.client: own.fisher for own in members})

    def require(self, fishers: Mapping[str, FisherDiagonal | None]) -> None:
        """Refuse members that lack what the rule needs; raises ``ContributionError``.

        Args:
            fishers: What each holds, by client.
        """
        inputs = self.takes_inputs
        lacking = [c for c, own in fishers.items() if own is None or (inputs and not own.inputs)]
        if self.needs and lacking:
            with blaming(lacking[0]):
                raise ContributionError(
                    f"The rule {self.name} needs of every member the {self.needs}, which "
                    f"{', '.join(lacking)} did not send. Compose without them or by another rule, "
                    f"or train them anew with {self.kept_by}; import them with `--data`."
                )

    def total(self, changes: Changes) -> Tensor:
        """Return the total of one weight, (out, in), float64, in the size of a sum; a new one."""
        raise NotImplementedError

    def on_grid(self, changes: Changes) -> Tensor:
        """Return the total on the grid of the running sum, (out, in), int64.

        Raises:
            ContributionError: If a value is not finite, or leaves the range of the grid.
        """
        total = self.total(changes).mul_(2.0**BITS).round_()
        if not (peak := fixed_point.largest(total)) < CEILING:
            raise ContributionError(
                f"The rule {self.name} gives a change of {changes.name!r} by {peak * GRID:g}, "
                f"expected less than {CEILING * GRID:g}. Compose with `coefficients = uniform`, or "
                "by another rule."
            )
        return total.long()
