"""Reading the log of Flower's engine: what went wrong, without the noise around it."""

from __future__ import annotations

import re
from pathlib import Path

TRACEBACK = "Traceback (most recent call last)"
NOISE = re.compile(
    r"\[uvicorn\.access\]|\.(ListRuns|StreamLogs|StartRun)$|Exit Code: \d+$"
    r"|^An unhandled exception occurred|^For more information, visit"
)
LEVEL = re.compile(r"^(DEBUG|INFO|WARNING|ERROR)\s*:|^\d{4}-\d\d-\d\dT")


def read_from(file: Path, position: int) -> str:
    """The text of a file from a byte on; empty if there is no file."""
    if not file.exists():
        return ""
    with file.open("rb") as stream:
        stream.seek(position)
        return stream.read().decode("utf-8", errors="replace")


class LineTail:
    """Reads what has been added to a file, whole lines at a time.

    Args:
        file: May not exist yet.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._position = 0

    def read(self) -> list[str]:
        """The lines since the last call; one that is still being written waits for the next."""
        if not self._file.exists():
            return []
        with self._file.open("rb") as stream:
            stream.seek(self._position)
            new = stream.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._position += len(complete)
        return complete.decode("utf-8", errors="replace").split("\n")[:-1]


def plain(text: str) -> str:
    """Drop the escape sequences that colour a log."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


def last_error(text: str, lines: int = 15) -> str:
    """The end of the last traceback in a log, or of the log if it holds none; indented."""
    kept = [line.rstrip() for line in plain(text).splitlines()]
    kept = [line for line in kept if line and not NOISE.search(line)]
    begins = [index for index, line in enumerate(kept) if TRACEBACK in line]
    if begins:
        kept = kept[begins[-1] :]
        ends = (index for index, line in enumerate(kept) if LEVEL.search(line))
        kept = kept[: next(ends, len(kept))]
    return "\n".join(f"  {line}" for line in kept[-lines:])
