"""Tells a registry's story for its report: who is in it, who left, the receipts; JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcompo.errors import FileFormatError, RegistryError
from fedcompo.registry.inspection import summary
from fedcompo.registry.journal import Entry
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.removal import RemovalRecord
from fedcompo.registry.rotation import key_at
from fedcompo.registry.signing import is_signed
from fedcompo.registry.state import ABOUT
from fedcompo.storage.tensorstream import file_sha256

Values = dict[str, Any]
SAID = (
    *("client", "classes", "num_examples"),
    *("record", "record_sha256", "root_before", "root_after"),
)
"""What a removal's line of the journal says of it."""


def story(registry: RegistryReader) -> Values:
    """Describe who is in a registry, who was removed, and its journal; reads no tensor.

    Each removal has a ``fault``: why its record does not hold, or an empty text.
    """
    about, members, entries = summary(registry), registry.state.members, registry.entries()
    removals = [e for e in entries if e.event == "removed" and "record" in e.details]
    return {
        **about,
        "identity": registry.identity,
        "created": registry.created,
        "changed": entries[-1].time,
        "clients": [{**one, "norm": members[one["client"]].norm} for one in about["clients"]],
        "removed": [_receipt(registry, entry, entries) for entry in removals],
        "journal": [
            {
                "line": entry.sequence,
                "time": entry.time,
                "event": entry.event + (" to be replaced" if "within" in entry.details else ""),
                "clients": entry.clients,
                "sha256": entry.sha256,
            }
            for entry in entries
        ],
    }


def story_of_run(folder: Path, results: Mapping[str, Any]) -> Values | None:
    """Tell the story of a run's registry as it is now; None if there is none where one looks.

    Args:
        folder: Of the run, which may have been moved.
        results: What ``results.json`` holds.
    """
    places = [folder / "registry"]
    if about := results.get("registry"):
        places.append(Path(about["path"]))
    if record := results.get("record"):
        places.append(Path(record).parent.parent)
    path = next((place for place in places if (place / ABOUT).is_file()), None)
    return story(RegistryReader(path)) if path else None


def _receipt(registry: RegistryReader, entry: Entry, entries: Sequence[Entry]) -> Values:
    """Describe a removal by its line of the journal and its record, and check the record."""
    said, path = entry.details, registry.path / entry.details["record"]
    told: Values = {"requested_by": said.get("requested_by", ""), "fault": ""}
    told |= {"reason": "", "to_retrain": []}
    try:
        record = RemovalRecord.parse(path.read_bytes(), source=str(path))
        public = key_at(registry, entries, record.sequence)
        if not is_signed(record.signed_bytes, record.signature, public):
            told["fault"] = "it is not signed by the registry's key"
        elif file_sha256(path) != said["record_sha256"]:
            told["fault"] = "it is not the one that the journal tells of"
        else:
            told |= {
                "requested_by": record.requested_by,
                "reason": record.reason,
                "to_retrain": list(record.influence.to_retrain),
            }
    except (FileFormatError, RegistryError, OSError) as error:
        told["fault"] = str(error)
    return {"time": entry.time, "line": entry.sequence, **{key: said[key] for key in SAID}, **told}
