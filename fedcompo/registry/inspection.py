"""Looks into a registry: its members, the history of one, what a removal would do; JSON values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fedcompo.config.presets import IMPORTED, STAND_IN
from fedcompo.registry.journal import Entry
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.releases import changed_since, releases_in, version_after
from fedcompo.registry.removal import Lineages
from fedcompo.registry.state import Member
from fedcompo.registry.transaction import MODEL
from fedcompo.report.twins import twins
from fedcompo.storage.files import CARD

Values = dict[str, Any]
DAMAGED = "damaged"
"""Kind of a member that cannot be described."""


def summary(registry: RegistryReader) -> Values:
    """Describe a registry, what it composes, and each of its members."""
    state, entries = registry.state, registry.entries()
    lineages = Lineages.of(entries)
    members = [_listed(registry, own, entries, lineages) for own in state.members.values()]
    return {
        "registry": str(registry.path.absolute()),
        "backbone": state.base,
        "old_pixels": registry.backbone.old_pixels,
        "root": state.root,
        "settings": registry.settings.values,
        "scale": registry.scale,
        "factor": registry.factor,
        "factor_by": str(registry.state.factor_by),
        "shrinkage": registry.state.shrinkage,
        "model": str(registry.path.absolute() / MODEL) if members else None,
        "classes": list(registry.classes),
        "twins": twins({member.client: member.classes for member in state.members.values()}),
        "joint_head": "realigned" if registry.realigned else "aligned",
        "kept_versions": list(state.kept),
        "release": _last_release(registry, entries),
        "clients": members,
    }


def _last_release(registry: RegistryReader, entries: Sequence[Entry]) -> Values | None:
    """Describe the last release, and whose contributions changed since; None: there is none."""
    if not (past := releases_in(entries, registry.settings)):
        return None
    changed = changed_since(past[-1], version_after(entries, registry.settings))
    line = past[-1].entry
    return {
        "line": line.sequence,
        "time": line.time,
        "clients": line.clients,
        "weights_sha256": past[-1].weights,
        "every": past[-1].every,
        "changed_since": changed,
    }


def details(registry: RegistryReader, client: str) -> Values:
    """Describe a client that is a member, or once was one.

    Raises:
        ContributionError: If it never was.
    """
    entries = registry.entries()
    history, present = history_of(entries, client), client in registry.clients
    values: Values = {"client": client, "present": present, "history": history}
    if history and not present:
        return values
    member = registry.member(client)
    return {
        **values,
        **_row(registry, member, entries, Lineages.of(entries)),
        "folder": str(registry.path.absolute() / member.folder),
        "files": dict(member.files),
        "lineage": dict(vars(member.lineage)),
        "settings": registry.card(client)["settings"],
    }


def history_of(entries: Sequence[Entry], client: str) -> list[Values]:
    """List the lines of a journal that are about a client."""
    return [
        {
            "sequence": entry.sequence,
            "time": entry.time,
            "event": entry.event,
            **{k: v for k, v in entry.details.items() if k in ("record", "within")},
        }
        for entry in entries
        if entry.event != "realigned" and client in entry.clients
    ]


def removal_plan(registry: RegistryReader, client: str, *, keep_versions: bool) -> Values:
    """List what a removal would delete, what it would keep, and what it could not undo.

    Raises:
        ContributionError: If there is no such client.
    """
    member = registry.member(client)
    survivors = [name for name in registry.clients if name != client]
    staying = {name for c in survivors for name in registry.state.members[c].classes}
    old = [f for f, kept in registry.state.kept.items() if client in kept["clients"]]
    containing = [*old, registry.state.version]
    influence = registry.influence_of(client)
    return {
        "client": client,
        "goes": {
            "folder": member.folder,
            "bytes": _bytes(registry, member),
            "task_vector": member.kind,
            "classes": [name for name in member.classes if name not in staying],
            "versions": [] if keep_versions else containing,
        },
        "stays": {
            "clients": survivors,
            "classes": sorted(staying),
            "versions": containing if keep_versions else [],
        },
        "composition_exact": True,
        "influence_exact": influence.exact,
        "lineage": asdict(influence),
        "to_retrain": list(influence.to_retrain),
    }


def _listed(
    registry: RegistryReader, member: Member, entries: Sequence[Entry], lineages: Lineages
) -> Values:
    """Describe a member; one that cannot be described keeps nobody else from being listed."""
    try:
        return _row(registry, member, entries, lineages)
    except (OSError, LookupError, TypeError, ValueError) as error:
        nothing: Values = {
            "num_examples": 0,
            "stand_in": False,
            "bytes": 0,
            "added": "",
            "line": member.added,
            "shaped_by": [],
            "shapes": [],
        }
        fault = f"{type(error).__name__}: {error}"
        return {"client": member.client, "kind": DAMAGED, "classes": [], **nothing, "fault": fault}


def _row(
    registry: RegistryReader, member: Member, entries: Sequence[Entry], lineages: Lineages
) -> Values:
    """Describe a member in a few values; entries and lineages are those of the journal."""
    others = [client for client in registry.clients if client != member.client]
    influence = lineages.influence(member.client, others)
    card = json.loads((registry.path / member.folder / CARD).read_text(encoding="utf-8"))
    return {
        "client": member.client,
        "kind": member.kind,
        "classes": list(member.classes),
        "num_examples": member.num_examples,
        "stand_in": card["settings"].get(f"{IMPORTED}statistics") == STAND_IN,
        "bytes": _bytes(registry, member),
        "added": entries[member.added - 1].time,
        "line": member.added,
        "shaped_by": sorted(member.lineage.shaped_by),
        "shapes": list(influence.to_retrain),
    }


def _bytes(registry: RegistryReader, member: Member) -> int:
    folder = registry.path / member.folder
    return sum((folder / file).stat().st_size for file in member.files)
