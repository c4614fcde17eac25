"""Sends and receives files in pieces. A broken transfer resumes; SHA-256 checks every file.

A folder that is being received is kept as ``.<name>.part`` until it is complete and checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

from fedcompo.config import scenario
from fedcompo.errors import FileFormatError
from fedcompo.report.progress import BYTES, track
from fedcompo.service import registry_pb2 as wire
from fedcompo.storage.files import CARD, CONTENT, FISHER, canonical, write_atomically
from fedcompo.storage.identity import HEADER, identity_of
from fedcompo.storage.identity import identity as digest
from fedcompo.storage.tensorstream import file_sha256

PIECE = 1 << 18
"""Bytes of a chunk that is sent."""
LARGEST_PIECE = 1 << 20
"""Bytes of a chunk that is accepted."""
HEXADECIMAL = frozenset("0123456789abcdef")
FILES, ID = "files", "id"
"""In the folder of an unfinished download: its files, and the id of its content."""
LONGEST_ID = 64
CONTRIBUTION = frozenset({CONTENT, CARD}), frozenset({CONTENT, CARD, FISHER})
"""Files of a contribution: those that must be there, and those that may."""


@dataclass(frozen=True)
class FileEntry:
    """Name, size and identity of a complete file, see :mod:`fedcompo.storage.identity`."""

    name: str
    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal, perhaps marked."""

    @classmethod
    def of(cls, name: str, file: BufferedReader) -> FileEntry:
        """Describe an open file."""
        return cls(name, os.fstat(file.fileno()).st_size, identity_of(file))


def identity(entries: Sequence[FileEntry]) -> str:
    """SHA-256 over names, sizes and SHA-256 of files, in the order of names; hexadecimal."""
    described = [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.name)]
    return hashlib.sha256(canonical(described).encode()).hexdigest()


def check_entries(
    entries: Sequence[FileEntry], expected: tuple[frozenset[str], frozenset[str]]
) -> None:
    """Refuse unexpected files: their names become names of files here.

    Raises:
        FileFormatError: If a name is not allowed, missing or repeated, a file is empty, or a digest
            is malformed.
    """
    names, (required, allowed) = [entry.name for entry in entries], expected
    if len(set(names)) < len(names) or not required <= set(names) <= allowed:
        raise FileFormatError(
            f"The files {', '.join(repr(name[:80]) for name in names[:8]) or 'none'} were "
            f"announced; expected {', '.join(sorted(required))}, each once, and at most "
            f"{', '.join(sorted(allowed - required)) or 'nothing'} besides."
        )
    for entry in entries:
        digits = entry.sha256.removeprefix(HEADER)
        if entry.size < 1 or len(digits) != 64 or not HEXADECIMAL.issuperset(digits):
            raise FileFormatError(
                f"The file {entry.name!r} was announced with {entry.size} bytes and the SHA-256 "
                f"{entry.sha256[:80]!r}; expected at least one byte, and 64 hexadecimal digits."
            )


def outgoing(
    files: Mapping[str, BufferedReader], entries: Sequence[FileEntry], offsets: Mapping[str, int]
) -> Iterator[wire.Chunk]:
    """Cut the missing rest of files into pieces.

    Args:
        files: Open files by name.
        entries: Their descriptions.
        offsets: Bytes of each that the receiver has, by name; too large a number counts as all.

    Raises:
        FileFormatError: If a file became shorter meanwhile.
    """
    for entry in entries:
        position, file = min(offsets.get(entry.name, 0), entry.size), files[entry.name]
        file.seek(position)
        while position < entry.size:
            data = file.read(min(PIECE, entry.size - position))
            if not data:
                raise FileFormatError(
                    f"{entry.name} ended at byte {position} of {entry.size}: it was changed while "
                    "it was being sent. Try again."
                )
            yield wire.Chunk(file=entry.name, offset=position, data=data)
            position += len(data)


class Incoming:
    """Files that are received in pieces, into a folder of their own; it outlives the call."""

    def __init__(self, folder: Path, entries: Sequence[FileEntry]) -> None:
        """Resume from the folder; it must exist, and belong to these files alone."""
        self.folder, self.entries = folder, {entry.name: entry for entry in entries}
        self.positions = {name: self._size(name) for name in self.entries}
        """Bytes received of each file, by name."""

    @property
    def missing(self) -> int:
        """Bytes that have not been received yet."""
        return sum(entry.size for entry in self.entries.values()) - sum(self.positions.values())

    def write(self, part: wire.Chunk) -> None:
        """Append a piece.

        Raises:
            FileFormatError: If it does not continue a file that was announced.
        """
        entry = self.entries.get(part.file)
        if entry is None:
            raise FileFormatError(
                f"A piece of {part.file[:80]!r} came, which was not announced; expected pieces of "
                f"{', '.join(self.entries)}."
            )
        position = self.positions[part.file]
        if part.offset != position or not 0 < len(part.data) <= entry.size - position:
            raise FileFormatError(
                f"A piece of {part.file} came with {len(part.data)} bytes for byte {part.offset}; "
                f"expected byte {position}, and at most the {entry.size - position} bytes that "
                "are missing. Ask what has come, and go on from there."
            )
        with (self.folder / part.file).open("ab") as file:
            file.write(part.data)
        self.positions[part.file] = position + len(part.data)

    def check(self) -> None:
        """Compare each file with its digest; a file that differs is deleted.

        Raises:
            FileFormatError: If something is missing, or was altered on the way.
        """
        if self.missing:
            raise FileFormatError(
                f"The transfer ended {self.missing} bytes early. What has come is kept; call "
                "again to go on from there."
            )
        for name, entry in self.entries.items():
            path = self.folder / name
            try:
                received = digest(path, checked=True)
            except FileFormatError:  # its header is right
                received = file_sha256(path)
            if received != entry.sha256:
                path.unlink()
                raise FileFormatError(
                    f"{name} arrived with SHA-256 {received[:16]}…, announced was "
                    f"{entry.sha256[:16]}…: it was altered on the way. Send it again."
                )

    def discard(self) -> None:
        """Delete all that was received."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _size(self, name: str) -> int:
        """Bytes received of a file; one that is too long is foreign, and deleted."""
        path = self.folder / name
        size = path.stat().st_size if path.is_file() else 0
        if size > self.entries[name].size:
            path.unlink()
            return 0
        return size


def received(
    output: Path, call: Callable[[Any], Iterable[Any]], names: tuple[frozenset[str], frozenset[str]]
) -> Any:
    """Make one call, receive its files, and move them to their place once they are complete.

    Args:
        output: A folder that is new, or empty.
        call: Makes the call, given the message ``Resume``; yields messages ``Download``.
        names: Files that must come, and files that may.

    Returns:
        The message ``Content``.

    Raises:
        FileFormatError: If a file was not announced, or was altered on the way.
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
    with track(incoming.missing, BYTES, "receiving") as count:
        for reply in replies:
            incoming.write(reply.chunk)
            count(len(reply.chunk.data))
    incoming.check()
    files.replace(output)
    shutil.rmtree(draft)
    return content


def _entries(content: Any, names: tuple[frozenset[str], frozenset[str]]) -> list[FileEntry]:
    entries = [FileEntry(file.name, file.size, file.sha256) for file in content.files]
    check_entries(entries, names)
    if identity(entries) != content.id:
        raise FileFormatError("The server calls its files by an id that is not theirs.")
    return entries


def _known_id(draft: Path) -> str:
    path = draft / ID
    return path.read_bytes()[:LONGEST_ID].decode("ascii", "replace") if path.is_file() else ""


def _resume(draft: Path) -> Any:
    """Describe what an earlier call received, and of which content."""
    positions = [
        wire.Position(file=path.name, bytes=path.stat().st_size)
        for path in sorted((draft / FILES).iterdir())
    ]
    return wire.Resume(id=_known_id(draft), positions=positions)


@contextmanager
def without_paths(folder: Path) -> Iterator[Path]:
    """Yield a folder with the same contribution, whose settings name no path of this machine.

    Raises:
        FileFormatError: If there are such paths, and the contribution cannot be read.
    """
    try:
        settings = json.loads((folder / CARD).read_bytes())["settings"]
        clean = scenario.without_paths(settings)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        settings, clean = {}, {}  # the server says what is wrong with it
    if clean == settings:
        yield folder
        return
    from fedcompo.method.contribution import Contribution  # imports torch

    with tempfile.TemporaryDirectory() as parent:
        copy = Path(parent) / folder.absolute().name
        copy.mkdir()
        replace(Contribution.open(folder, check=True), settings=clean).save(copy)
        yield copy
