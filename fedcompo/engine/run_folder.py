"""The folder of a run: the names of its files, how a run gets one, and how it is resumed."""

from __future__ import annotations

import json
from pathlib import Path

from fedcompo.config.setting import Scalar
from fedcompo.errors import LaunchError

LOG, EVENTS, RESULTS = "flower.log", "events.jsonl", "results.json"
CLIENTS = "clients"
"""Folder of the simulated clients' own logs, one file each; nothing else names their files."""
LOGS = "FEDCOMPO_CLIENT_LOGS"
"""Variable with that folder, for the processes of a simulation."""
PROGRESS = ".progress"
"""Folder in that of the clients' logs: what the processes at work are doing, for the display."""
RUN = "run.json"
"""Progress of a run, to resume it; see :mod:`server.resume`."""


def reserve_output(wanted: Path) -> Path:
    """Take a folder for a run, and for no other: ``wanted``, or ``wanted-2``, ``wanted-3``, ...

    A folder that holds something is left alone. Two runs that ask at the same time get two folders:
    the first to create the log in it has it.

    Raises:
        LaunchError: If no folder can be made there.
    """
    if not wanted.name:
        raise LaunchError(f"The output {wanted} cannot be a run's own folder; name another.")
    number = 1
    while True:
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        number += 1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not any(folder.iterdir()):
                (folder / LOG).open("x").close()
                return folder
        except FileExistsError:
            if folder == wanted and not folder.is_dir():
                raise LaunchError(f"The output {folder} is a file; name a folder.") from None
        except OSError as error:
            raise LaunchError(
                f"The output folder {folder} cannot be made: {error.strerror}. "
                "Choose another with --output."
            ) from error


def begun_settings(output: Path) -> dict[str, Scalar]:
    """Read the settings that the interrupted run in a folder was begun with, to resume it.

    Raises:
        LaunchError: If it holds no such run.
    """
    path = output / RUN
    if (output / RESULTS).exists():
        raise LaunchError(f"The run in {output} is finished: there is a {RESULTS}.")
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LaunchError(
            f"{output} holds no run to go on with: {path.name} cannot be read "
            f"({type(error).__name__}). Check the path, or start the run anew."
        ) from error
    return {**begun, "output": str(output), "resume": True}


def reopen_output(output: Path) -> Path:
    """Put the log and the events of an interrupted run aside; a resumed one writes its own."""
    for path in (output / LOG, output / EVENTS):
        number = 1
        while (aside := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
            number += 1
        if path.exists():
            path.rename(aside)
    (output / LOG).touch()
    return output
