"""What somebody who has the registry's key can rewrite so that no hash betrays it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedcompo.registry import journal
from fedcompo.registry.journal import START, Entry
from fedcompo.registry.removal import RemovalRecord
from fedcompo.registry.signing import Signer, read_signer
from fedcompo.registry.state import PRIVATE, State
from fedcompo.registry.transaction import JOURNAL, STATE
from fedcompo.storage.files import canonical
from fedcompo.storage.tensorstream import file_sha256

Details = Mapping[str, Any]


def rewrite_state(root: Path, **changes: Any) -> State:
    """Change the state; the root that stands in it follows."""
    state = replace(State.read(root / STATE), **changes)
    (root / STATE).write_text(state.text, encoding="utf-8")
    return state


def rewrite_line(root: Path, number: int, change: Callable[[Details], Details]) -> None:
    """Change the details of a journal's line, chain the lines anew, and tell the state."""
    forged: list[Entry] = []
    for entry in journal.read(root / JOURNAL):
        previous = forged[-1].sha256 if forged else START
        details = change(entry.details) if entry.sequence == number else entry.details
        forged.append(Entry(entry.sequence, entry.time, entry.event, details, previous))
    (root / JOURNAL).write_text("".join(f"{entry.line}\n" for entry in forged), encoding="utf-8")
    rewrite_state(root, journal_sha256=forged[-1].sha256)


def rewrite_record(root: Path, path: Path, **changes: Any) -> RemovalRecord:
    """Change what a record says, sign it again, and let the journal know this record only."""
    record = RemovalRecord.parse(path.read_bytes(), source=str(path))
    line = record.sequence
    record = replace(record, **changes)
    signer = read_signer(root / PRIVATE)
    record = record.signed(signer) if record.removed_content else as_before(record, signer)
    path.write_bytes(record.text.encode())
    rewrite_line(root, line, lambda details: {**details, "record_sha256": file_sha256(path)})
    return record


def reworded(data: bytes, old: str, new: str) -> bytes:
    """A record with other words in its statement, under the old signature."""
    values = json.loads(data)
    payload = base64.b64decode(values["payload"]).replace(old.encode(), new.encode())
    values["payload"] = base64.b64encode(payload).decode()
    return f"{canonical(values)}\n".encode()


def as_before(record: RemovalRecord, signer: Signer) -> RemovalRecord:
    """The record in the format of versions that knew no envelope, signed."""
    record = replace(record, removed_content={}, keyid="", signature="")
    return replace(record, signature=signer.sign(record.signed_bytes).hex())


def rewrite_as_before(root: Path, path: Path) -> None:
    """Let record and journal be those of such a version."""
    record = rewrite_record(root, path, removed_content={}, keyid="")

    def change(details: Details) -> Details:
        return {name: value for name, value in details.items() if name != "numbers_sha256"}

    rewrite_line(root, record.sequence, change)
