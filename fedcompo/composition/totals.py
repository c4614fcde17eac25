"""The members' statistics, added up: a file beside the sum of their task vectors.

The statistics are integers. A version's total is that of the version before, plus who came, minus
who left: the bits of a sum taken anew, at a cost that does not grow with the number of members.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from fedcompo.composition.claims import capped
from fedcompo.composition.settings import CompositionSettings
from fedcompo.errors import ContributionError
from fedcompo.method.contribution import AnyStatistics, Contribution
from fedcompo.method.ranges import STRANGE, beyond
from fedcompo.method.statistics import BITS, FeatureSums
from fedcompo.storage.tensorstream import StreamedTensors, save_streamed


def total_after(
    before: FeatureSums | None,
    coming: Iterable[Contribution],
    going: Iterable[Contribution],
    settings: CompositionSettings,
) -> FeatureSums:
    """Return the total of a version: that before, with who comes, without who is gone.

    If there is none before, somebody comes. Raises ``ContributionError`` if a sum leaves the range
    of int64.
    """
    terms = [_sums_of(member, settings) for member in coming]
    total = before or terms.pop()
    for own in terms:
        total += own
    for member in going:
        total -= _sums_of(member, settings)
    return total


def check_alike(
    client: str, own: AnyStatistics, total: FeatureSums | None, members: Iterable[Contribution]
) -> None:
    """Refuse features so long that they would outweigh everybody's in the joint head.

    The members, whose total this is, are read only if it seems so. Their median decides: who claims
    most images has no say. Raises ``ContributionError``.
    """
    if total is None or not isinstance(own, FeatureSums):
        return
    squares = {client: own.mean_square}
    if squares[client] > STRANGE * total.mean_square:
        others = {m.client: m.statistics for m in members if m.client != client}
        squares |= {c: s.mean_square for c, s in others.items() if isinstance(s, FeatureSums)}
    if usual := beyond(squares, STRANGE).get(client):
        raise ContributionError(
            f"The features of client {client!r} have the mean square {own.mean_square:.3g}, more "
            f"than {STRANGE:g} times the members' {usual:.3g}. Look at its images and its version "
            "of fedcompo."
        )


def save_total(path: Path, total: FeatureSums) -> None:
    """Write a total to a new file."""
    about = {"content": "statistics", "bits": BITS, "classes": list(total.classes)}
    save_streamed(path, exact_tensors(total), about)


def read_total(tensors: StreamedTensors) -> FeatureSums:
    """Read what :func:`save_total` wrote; an old file's sums of Fisher diagonals are ignored."""
    return exact_from(tensors, tensors.manifest["classes"])


def exact_tensors(statistics: FeatureSums) -> dict[str, Tensor]:
    """Name the tensors of a total, int64: beyond float32, in which a client's own travel."""
    return {part: getattr(statistics, part) for part in ("counts", "sums", "second")}


def exact_from(tensors: Mapping[str, Tensor], classes: Iterable[str]) -> FeatureSums:
    """Rebuild what :func:`exact_tensors` named."""
    return FeatureSums(tuple(classes), *(tensors[part] for part in ("counts", "sums", "second")))


def _sums_of(member: Contribution, settings: CompositionSettings) -> FeatureSums:
    own = capped(member.statistics, settings.class_cap)
    assert isinstance(own, FeatureSums)  # a registry holds one kind of statistics
    return own
