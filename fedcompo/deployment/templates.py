"""Text files from templates: scripts become executable, and a value that is missing is an error.

What every script of a deployment sets first: private files, quiet programs, where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

from fedcompo.engine.superlink import QUIET

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


def exports() -> str:
    """Shell lines that switch off telemetry, looking for updates and installing at run time."""
    return "\n".join(f"export {key}={value}" for key, value in QUIET.items())


SHARED = """\
# What is written here is nobody else's business.
umask 077
if [ -d venv ]; then PATH="$PWD/venv/bin:$PATH"; export PATH; fi
# No telemetry, no look for updates, no installation at run time.
@{exports}
# Temporary files may hold what clients sent: they stay in this folder.
TMPDIR="$PWD/state/tmp"
export TMPDIR
mkdir -p "$TMPDIR"
# Flower's processes talk to each other over loopback, where no proxy of the house reaches them.
NO_PROXY="127.0.0.1,localhost${NO_PROXY:+,$NO_PROXY}"
no_proxy=$NO_PROXY
export NO_PROXY no_proxy
"""
