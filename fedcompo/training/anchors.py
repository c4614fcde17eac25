r"""Gives each client the mean Fisher diagonal that anchors it (the setting ``anchor``).

- *others*: the mean over all examples of the *other* clients, as in ITA (Porrello et al., ICLR
  2025, arXiv 2405.16350), or of all clients, as in IEL. What a client learns then depends on the
  others.
- *own*: the mean over its own examples. The client keeps those weights that its own task needs.
- *reference*: the mean over examples of no client; see :mod:`fedcompo.training.probing`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

from fedcompo.config.choices import AnchorBy
from fedcompo.data.tasks import whole_of
from fedcompo.method.deltas import Weights
from fedcompo.method.fisher import FisherDiagonal

TOLERATED = 10.0
"""Ratio of the mean traces of reference and clients, either way, from which there is a note."""


@dataclass(frozen=True)
class FisherSums:
    """The Fisher sums of a run's clients, added up in the order of names."""

    members: tuple[str, ...]
    """Clients that have a Fisher sum, at least one; sorted."""
    load: Callable[[str], FisherDiagonal]
    """Reads a member's Fisher sum."""
    by: AnchorBy
    """Whose Fisher anchors a client."""
    reference: FisherDiagonal | None = None
    """Fisher sum of no client's examples; needed if clients are anchored by it."""
    fewest: int = 1
    """Other clients without which their mean anchors nobody (the setting ``min-others``)."""
    total: FisherDiagonal = field(init=False)
    """Sum over the examples of all members; factored if one of them is."""

    def __post_init__(self) -> None:
        """Read and add up the members' sums."""
        object.__setattr__(self, "members", tuple(sorted(self.members)))
        total = functools.reduce(operator.add, map(self.load, self.members))
        object.__setattr__(self, "total", total)

    def mean_for(self, client: str, *, with_own: bool = False) -> Weights | None:
        """Return the *mean* Fisher that anchors a client; None if there are no examples for it.

        Args:
            client: A member, or one that has no Fisher sum.
            with_own: Whether the others' examples and its own anchor it (IEL).

        Returns:
            In the form of the sums; see :func:`fedcompo.method.fisher.expanded`.
        """
        if not self.anchored(client, with_own=with_own):
            return None
        if self.by is AnchorBy.OWN:
            return self.load(client).mean()
        if self.by is AnchorBy.REFERENCE:
            assert self.reference is not None
            return self.reference.mean()
        return self.total.mean() if with_own else self.beside(client)

    def beside(self, client: str) -> Weights | None:
        """Return the mean over the examples of all other clients; None if there are none."""
        own = [member for member in self.members if whole_of(member) == whole_of(client)]
        if len(own) == len(self.members):
            return None
        return functools.reduce(operator.sub, map(self.load, own), self.total).mean()

    def anchored(self, client: str, *, with_own: bool = False) -> bool:
        """Whether there are examples whose Fisher anchors a client."""
        if self.by is AnchorBy.OWN:
            return client in self.members
        if self.by is AnchorBy.REFERENCE:
            return True
        return bool(self.others(client)) or (with_own and self.fewest == 1)

    def note(self, alpha: float, *, setting: str = "alpha") -> str:
        """Return a note if a reference Fisher is far larger or smaller than the clients'; or "".

        For the penalties that act on the Fisher's own scale: ``explicit`` and ``coupled``.

        Args:
            alpha: Strength of the anchor.
            setting: Name of that setting; ``beta`` in IEL.
        """
        if self.reference is None:
            return ""
        theirs, ours = self.reference.mean_trace(), self.total.mean_trace()
        if not alpha * theirs or ours / TOLERATED <= theirs <= ours * TOLERATED:
            return ""
        return (
            f"`{setting}` {alpha:g} acts on the reference's Fisher, whose mean trace is "
            f"{theirs:.3g}; that of the clients' is {ours:.3g}. To hold as firmly as theirs would, "
            f"set `{setting}` to {alpha * ours / theirs:.3g}."
        )

    def others(self, client: str) -> tuple[str, ...]:
        """Return the members of other clients whose Fisher anchors this one; shards are no others.

        So a shard that leaves has not shaped how the client's other shards trained.
        """
        if self.by is not AnchorBy.OTHERS:
            return ()
        own = whole_of(client)
        others = tuple(member for member in self.members if whole_of(member) != own)
        return others if len({*map(whole_of, others)}) >= self.fewest else ()
