r"""What was released to the public, whom the next release would lay bare, and when it is due.

A version is :math:`\theta_0 + \lambda' \sum_c m_c\,\tau_c`. Who has several divides each change by
its :math:`\lambda'` and adds and subtracts them, so knows the span of the rows of A: a row for each
version, a column for each contribution, :math:`m_c` where it takes part. Factors scale rows and
counts scale columns; neither changes a rank. A client is laid bare in

.. math:: d_c = \mathrm{rank}(A) - \mathrm{rank}(A \text{ without the columns of } c)

independent ways: so many combinations hold something of the client, and of nobody else. A version
of one client alone is one, because :math:`\theta_0` is public. Exact where the rule is a sum; by
another rule, whoever subtracts has an estimate at best, and the test is the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from fedcompo.composition.settings import CompositionSettings
from fedcompo.data.tasks import client_of
from fedcompo.errors import ConfigError, RegistryError
from fedcompo.registry import journal
from fedcompo.registry.history import members_after
from fedcompo.registry.journal import Entry
from fedcompo.report.units import listed

RELEASED = "released"
EVERY = re.compile("([1-9][0-9]{0,5})(d?)")
Version = Mapping[tuple[str, str], float]
"""How often each contribution counts, by member and SHA-256 of its task vector at arrival."""


@dataclass(frozen=True)
class Release:
    """A version that was released."""

    entry: Entry
    """Its line of the journal."""
    version: Version

    @property
    def weights(self) -> str:
        """SHA-256 of the file of weights that was written."""
        return str(self.entry.details["weights_sha256"])

    @property
    def every(self) -> str:
        """When the next one is due: after so many changes, or days; empty: at once."""
        return str(self.entry.details["every"])


def releases_in(entries: Sequence[Entry], settings: CompositionSettings) -> list[Release]:
    """List the releases that a journal tells of, the oldest first."""
    return [
        Release(entry, version_after(entries[:place], settings))
        for place, entry in enumerate(entries)
        if entry.event == RELEASED
    ]


def members_named(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Name the members after these lines of a journal, each with the line of its arrival."""
    return [{"client": c, "added": m["added"]} for c, m in sorted(members_after(entries).items())]


def version_after(entries: Sequence[Entry], settings: CompositionSettings) -> Version:
    """Describe the version that is composed after these lines of a journal."""
    version: dict[tuple[str, str], float] = {}
    for client, member in members_after(entries).items():
        arrived = entries[member["added"] - 1].details["clients"]  # before another machine's bits
        (content,) = (m["rounded_sha256"] for m in arrived if m["client"] == client)
        version[client, content] = settings.times(member["num_examples"])
    return version


def laid_bare(versions: Sequence[Version]) -> dict[str, int]:
    """Return in how many independent ways these versions lay a client bare; 0: they do not."""
    import numpy as np  # `fedcompo list` does without

    columns = sorted({key for version in versions for key in version})
    if not columns:
        return {}
    table = np.array([[version.get(key, 0.0) for key in columns] for version in versions])
    owners = np.array([client_of(member) for member, _ in columns])
    rank = np.linalg.matrix_rank
    return {c: int(rank(table) - rank(table * (owners != c))) for c in sorted({*owners.tolist()})}


def check_release(
    past: Sequence[Release], now: Version, *, every: str, reveal: Collection[str]
) -> dict[str, int]:
    """Refuse a version that lays a client bare, or comes too early.

    One that was released may be released again: it tells nothing new. A policy other than the one
    in force is begun by a release that keeps both.

    Args:
        past: What was released.
        now: The version.
        every: Policy from now on.
        reveal: Clients who may be laid bare.

    Returns:
        Lines of the journal that tell of this version already, by SHA-256 of the weights.

    Raises:
        RegistryError: If it is refused; says what to do.
        ConfigError: If the policy cannot be read, or ``reveal`` names a client in vain.
    """
    if every:
        parse_every(every)
    same = [earlier for earlier in past if earlier.version == now]
    goes_on = bool(past) and every == past[-1].every
    if not same:
        _check_revealed(past, now, reveal)
    if past and not (same and goes_on):
        _check_due(past[-1], now, every)
    return {own.weights: own.entry.sequence for own in same} if goes_on else {}


def _check_revealed(past: Sequence[Release], now: Version, reveal: Collection[str]) -> None:
    earlier = [release.version for release in past]
    before, after = laid_bare(earlier), laid_bare([*earlier, now])
    bare = [client for client in after if after[client] > before.get(client, 0)]
    if needless := sorted({*reveal} - {*bare}):
        raise ConfigError(
            f"`--reveal` names {listed(needless)}, whom this version does not lay bare. "
            f"It lays bare: {listed(bare) or 'nobody'}."
        )
    if hidden := [client for client in bare if client not in reveal]:
        versions = f"{len(past)} version{'s' * (len(past) != 1)} released before"
        raise RegistryError(
            f"This version would lay bare {listed(hidden)}: with the pre-trained weights and the "
            f"{versions}, subtracting gives what that client sent, and nobody else's. Wait until "
            "other clients join, leave or are replaced too, or lay it bare knowingly: "
            f"--reveal {','.join(hidden)}"
        )


def _check_due(last: Release, now: Version, every: str) -> None:
    changed = changed_since(last, now)
    for policy in filter(None, (last.every, every)):
        number, days = parse_every(policy)
        began, ends = map(datetime.fromisoformat, (last.entry.time, journal.utc_now()))
        passed = (ends - began) / timedelta(days=1)
        if (passed if days else len(changed)) < number:
            since = f"{passed:.1f} days" if days else f"{len(changed)} ({listed(changed) or '–'})"
            raise RegistryError(
                f"A version is released every {number} {'days' if days else 'changes of clients'}; "
                f"since {last.entry.time} there were {since}. Wait, and release then."
            )


def changed_since(last: Release, now: Version) -> list[str]:
    """Clients of whom something came, left or was exchanged since a release, sorted."""
    return sorted({client_of(member) for (member, _), _ in last.version.items() ^ now.items()})


def parse_every(text: str) -> tuple[int, bool]:
    """Read ``3``, changes, or ``7d``, days; returns the number, and whether it is of days.

    Raises:
        ConfigError: If it is neither.
    """
    found = EVERY.fullmatch(text)
    if not found:
        raise ConfigError(
            f"`--every {text}` is neither a number of changes, such as 3, nor of days, such as 7d."
        )
    return int(found[1]), bool(found[2])
