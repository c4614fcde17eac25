r"""Whose Fisher diagonal anchors whom.

- *others*: the mean over all examples of the *other* clients, as ITA has it (Porrello et al., ICLR
  2025, arXiv 2405.16350), or of all, as IEL has it. What a client learns then depends on who else
  is there.
- *own*: the mean over its own examples: it keeps what of the backbone its own task rests on.
- *reference*: the mean over examples of no client; see :mod:`fedcompo.training.probing`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fedcompo.config.choices import AnchorBy
from fedcompo.method.deltas import Weights
from fedcompo.method.fisher import FisherDiagonal

TOLERATED = 10.0
"""A reference this many times larger or smaller than the clients' Fisher is worth a note."""


@dataclass(frozen=True)
class FisherSums:
    """The Fisher sums of a run."""

    by: AnchorBy
    members: tuple[str, ...]
    """Whose Fisher sums there are, sorted."""
    total: FisherDiagonal
    """Over the examples of all members; head rows for the classes of all their heads."""
    load: Callable[[str], FisherDiagonal]
    """Reads a member's Fisher sum."""
    reference: FisherDiagonal | None = None

    @classmethod
    def of(
        cls,
        members: Iterable[str],
        load: Callable[[str], FisherDiagonal],
        *,
        by: AnchorBy,
        reference: FisherDiagonal | None = None,
    ) -> FisherSums:
        """Sum up, in the order of names: no bit depends on who answered first.

        Args:
            members: At least one.
            load: Reads a member's Fisher sum.
            by: Whose Fisher anchors a client.
            reference: That of no client; needed where clients are anchored by it.
        """
        members = tuple(sorted(members))
        return cls(by, members, functools.reduce(operator.add, map(load, members)), load, reference)

    def mean_for(
        self, client: str, classes: Iterable[str], *, with_own: bool = False
    ) -> Weights | None:
        """The *mean* Fisher that anchors a client; None where there is nobody to anchor it.

        Args:
            client: A member.
            classes: Its own, to which the head's rows shall belong; zeros for a class that no
                anchoring head has.
            with_own: Where the others anchor it, count its own examples, too (IEL).
        """
        if not self.anchored(client, with_own=with_own):
            return None
        if self.by is AnchorBy.OWN:
            anchoring = self.load(client)
        elif self.by is AnchorBy.REFERENCE:
            assert self.reference is not None
            anchoring = self.reference
        elif with_own:
            anchoring = self.total
        else:
            anchoring = self.total - self.load(client)
        return anchoring.for_classes(classes).mean()

    def anchored(self, client: str, *, with_own: bool = False) -> bool:
        """Whether there is anybody to anchor a client."""
        return with_own or self.by is not AnchorBy.OTHERS or bool(self.others(client))

    def note(self, alpha: float, *, setting: str = "alpha") -> str:
        """What whoever set ``alpha`` should know of the scale on which it acts; mostly nothing.

        Args:
            alpha: How firmly the Fisher holds.
            setting: What it is called; ``beta`` in IEL.
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
        """The other clients whose Fisher anchors this one."""
        if self.by is not AnchorBy.OTHERS:
            return ()
        return tuple(member for member in self.members if member != client)
