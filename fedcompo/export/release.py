"""Releases the model of everyone: checks whom it lays bare, writes it, notes it in the journal.

The journal is written before the folder appears. A crash between the two leaves a release that the
journal knows and nobody has; the next attempt, of the same bits, writes the folder alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedcompo.export.folder import publish
from fedcompo.export.selection import from_registry
from fedcompo.registry import transaction
from fedcompo.registry.draft import drafted
from fedcompo.registry.envelope import sealed, statement_of
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.releases import (
    RELEASED,
    check_due,
    check_revealed,
    members_named,
    parse_every,
    releases_in,
    version_after,
)
from fedcompo.registry.signing import signer_for
from fedcompo.report.progress import step
from fedcompo.storage.files import WEIGHTS, write_synced

STATEMENT = "release.json"
"""File beside the model: which version of which registry it is, signed."""
PREDICATE = "https://fedcompo.org/release/v1"


def release(
    registry: RegistryReader,
    output: Path,
    *,
    every: str = "",
    reveal: Collection[str] = (),
    key: Path | None = None,
) -> dict[str, Any]:
    """Release the model of all members, by the registry's own settings.

    One of the members of an earlier release is released at any time: it tells nothing new of any of
    them.

    Args:
        registry: The registry; its journal grows by a line.
        output: A new or empty folder for the model.
        every: Policy from this release on: ``3`` changes of clients, or ``7d``. The one in force
            must be kept too. Empty: as it is.
        reveal: Clients who may be laid bare by it.
        key: File of the private key; None: as the registry's other signatures.

    Returns:
        What was written; ``line`` of the journal; ``again``, whether these bits were there before.

    Raises:
        RegistryError: If it is too early, or a client would be laid bare; says whom.
        ConfigError: If the policy cannot be read, the folder is taken, or ``reveal`` names another.
        ContributionError: If nobody is in the registry.
    """
    signer = signer_for(registry.path, key)
    if every:
        parse_every(every)
    with drafted(registry, "releasing a version") as draft:
        past = releases_in(draft.entries, registry.settings)
        now, names = version_after(draft.entries, registry.settings), members_named(draft.entries)
        same = [earlier for earlier in past if earlier.version == now]
        selection, policy = from_registry(registry), past[-1].every if past else ""
        new_policy = every not in ("", policy)
        if not same:
            check_revealed(past, now, reveal)
        if past and (new_policy or not same):
            check_due(past[-1], now, every)
        outcome: dict[str, Any] = {}

        def note(folder: Path, written: Mapping[str, Any]) -> None:
            weights = written["sha256"]
            known = [r.entry.sequence for r in same if r.weights == weights and not new_policy]
            again = known[0] if known else 0
            line = again or draft.next_sequence
            about = {"registry": registry.identity, "line": line, "root": registry.state.root}
            about |= {"clients": names, "factor": registry.factor}
            data = sealed(statement_of(PREDICATE, {WEIGHTS: weights}, about), signer)
            write_synced(folder / STATEMENT, data)
            outcome.update(line=line, again=bool(again))
            if again:
                transaction.recover(registry.path)  # nothing was staged
                return
            details = {"clients": names, "weights_sha256": weights, "every": every or policy}
            details |= {"revealed": sorted(reveal)} if reveal else {}
            draft.finish(draft.before, [(RELEASED, details)])

        step("composing")
        return {**publish(output, selection, sealing=note), **outcome}
