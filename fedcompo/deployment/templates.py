"""Texts of a deployment: files of ``templates/``, with names, ports and paths put in.

A place for a value is written ``@NAME@``. To a shell, to nginx and to systemd that is a word like
any other, where ``$name`` and ``{name}`` mean something: shellcheck reads the scripts as they
stand. Scripts end in ``.sh`` there, and have no suffix in a deployment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from fedcompo.storage.files import PACKAGE

TEMPLATES = PACKAGE / "deployment" / "templates"
PLACE = re.compile(r"@([A-Z][A-Z0-9_]*)@")
SCRIPT = "#!"
EXECUTABLE = 0o755


def fill(template: str, values: Mapping[str, object]) -> str:
    """Put values, by lower-case name, in a text's places; raises ``KeyError`` if one is missing."""
    return PLACE.sub(lambda place: str(values[place[1].lower()]), template)


def filled(name: str, values: Mapping[str, object]) -> str:
    """Fill the template of this name."""
    return fill((TEMPLATES / name).read_text(encoding="utf-8"), values)


def filled_folder(name: str, values: Mapping[str, object]) -> dict[str, str]:
    """Fill all templates of a folder; returns the texts by the name that each file bears."""
    files = sorted((TEMPLATES / name).iterdir())
    return {file.name.removesuffix(".sh"): filled(f"{name}/{file.name}", values) for file in files}


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write texts by relative path, to new files; those that begin with ``#!`` can be executed."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
        if text.startswith(SCRIPT):
            path.chmod(EXECUTABLE)
