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
from fedcompo.registry.draft import drafted
from fedcompo.registry.envelope import sealed, statement_of
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.releases import (
    RELEASED,
    check_release,
    members_named,
    releases_in,
    version_after,
)
from fedcompo.registry.signing import require_own, signer_for
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
    with drafted(registry, "releasing a version") as draft:
        require_own(signer, registry.path)  # it may have been changed while we waited
        past = releases_in(draft.entries, registry.settings)
        policy = every or (past[-1].every if past else "")
        now = version_after(draft.entries, registry.settings)
        noted = check_release(past, now, every=policy, reveal=reveal)
        names, next_line = members_named(draft.entries), draft.next_sequence
        about: dict[str, Any] = {"registry": registry.identity, "root": registry.state.root}
        about |= {"clients": names, "factor": registry.factor}

        def seal(folder: Path, written: Mapping[str, Any]) -> None:
            weights = written["sha256"]
            full = {**about, "line": noted.get(weights, next_line)}
            statement = statement_of(PREDICATE, {WEIGHTS: weights}, full)
            write_synced(folder / STATEMENT, sealed(statement, signer))
            if weights not in noted:
                details = {"clients": names, "weights_sha256": weights, "every": policy}
                details |= {"revealed": sorted(reveal)} if reveal else {}
                draft.finish(draft.before, [(RELEASED, details)])

        written = publish(output, from_registry(registry), sealing=seal)
        weights = written["sha256"]
        return {**written, "line": noted.get(weights, next_line), "again": weights in noted}
