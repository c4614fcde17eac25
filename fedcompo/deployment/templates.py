"""Text files from templates: scripts become executable, and a value that is missing is an error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

SCRIPT = "#!"
EXECUTABLE = 0o755


class _Sheet(Template):
    """A template with ``@{name}``: shell scripts, units and nginx use ``$`` themselves."""

    delimiter = "@"


def fill(template: str, **values: object) -> str:
    """Put values in a template's places, which are written ``@{name}``."""
    return _Sheet(template).substitute({key: str(value) for key, value in values.items()})


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write texts; those that begin with ``#!`` can be executed.

    Args:
        folder: Where to.
        files: Text by relative path; none may exist yet.
    """
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
        if text.startswith(SCRIPT):
            path.chmod(EXECUTABLE)
