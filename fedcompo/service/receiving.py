"""A folder that comes in pieces: kept as ``.<name>.part`` until all of it is there and right."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fedcompo.errors import FileFormatError
from fedcompo.report.units import size
from fedcompo.service import registry_pb2 as wire
from fedcompo.service.transfer import FileEntry, Incoming, Part, check_entries, identity
from fedcompo.storage.files import write_atomically

FILES, ID = "files", "id"
LONGEST_ID = 64


def received(
    output: Path,
    call: Callable[[Any], Iterable[Any]],
    names: tuple[frozenset[str], frozenset[str]],
    on_step: Callable[[str], None],
) -> Any:
    """Make one call, and put what it brings in its place once nothing is missing.

    Args:
        output: A folder that is new, or empty.
        call: Makes the call, given the message ``Resume``; yields messages ``Download``.
        names: Files that must come, and files that may.
        on_step: Told how much has come.

    Returns:
        The message ``Content``.

    Raises:
        FileFormatError: If something came that was not announced, or was altered on the way.
    """
    draft = output.with_name(f".{output.name}.part")
    files = draft / FILES
    files.mkdir(parents=True, exist_ok=True)
    try:
        replies = iter(call(_resume(draft)))
        first = next(replies, None)
    except BaseException:
        if not any(files.iterdir()):  # nothing to go on with
            shutil.rmtree(draft)
        raise
    if first is None or first.WhichOneof("part") != "content":
        raise FileFormatError("The server's answer does not begin with what is to come.")
    content, entries = first.content, _entries(first.content, names)
    if content.id != _known_id(draft):
        shutil.rmtree(files)
        files.mkdir()
        write_atomically(draft / ID, content.id.encode())
    incoming = Incoming(files, entries)
    total = sum(entry.size for entry in entries)
    for reply in replies:
        chunk = reply.chunk
        incoming.write(Part(chunk.file, chunk.offset, chunk.data))
        on_step(f"receiving, {size(total - incoming.missing)} of {size(total)}")
    incoming.check()
    files.replace(output)
    shutil.rmtree(draft)
    return content


def _entries(content: Any, names: tuple[frozenset[str], frozenset[str]]) -> list[FileEntry]:
    entries = [FileEntry(file.name, file.size, file.sha256) for file in content.files]
    check_entries(entries, required=names[0], allowed=names[1])
    if identity(entries) != content.id:
        raise FileFormatError("The server calls its files by an id that is not theirs.")
    return entries


def _known_id(draft: Path) -> str:
    path = draft / ID
    return path.read_bytes()[:LONGEST_ID].decode("ascii", "replace") if path.is_file() else ""


def _resume(draft: Path) -> Any:
    """What an earlier call left, and of which content."""
    positions = [
        wire.Position(file=path.name, bytes=path.stat().st_size)
        for path in sorted((draft / FILES).iterdir())
    ]
    return wire.Resume(id=_known_id(draft), positions=positions)
