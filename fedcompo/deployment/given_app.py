"""The app that clients get in advance: the code that Flower runs on them, and its digests.

In a run, the server sends every client the app, as a bundle. Flower unpacks a bundle into
``FLWR_HOME/apps/<name and hash>`` unless that folder exists, and runs what lies there. So each
client gets that folder in advance, and its start script makes sure that no other folder can be made
beside it. A client never runs code that the server sends.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fedcompo.engine.log import plain
from fedcompo.engine.superlink import QUIET, program
from fedcompo.errors import LaunchError
from fedcompo.storage.files import PACKAGE

APPS = Path("flower") / "apps"
APP_DIGESTS, LIBRARY_DIGESTS = "app.sha256", "library.sha256"
SECONDS = 120.0
APP_FILES = ("pyproject.toml", "LICENSE", "clients/**/*.py", "server/**/*.py")


def copy_app(app: Path, folder: Path) -> None:
    """Copy the files of a Flower app alone."""
    for pattern in APP_FILES:
        for file in sorted(app.glob(pattern)):
            target = folder / file.relative_to(app)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def give(app: Path, folder: Path) -> None:
    """Write what every client gets: the unpacked app, and digests of it and of this library.

    Raises:
        LaunchError: If Flower cannot bundle it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        # Flower's programs stand beside this interpreter, which may not be on the PATH.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        home = str((folder / APPS).parent.resolve())
        environment = {**os.environ, **QUIET, "PATH": path, "FLWR_HOME": home}
        _flwr(["build", "--app", str(app.resolve())], scratch, environment)
        (bundle,) = Path(scratch).glob("*.fab")
        _flwr(["install", str(bundle)], scratch, environment)
    (folder / APP_DIGESTS).write_text(digests(folder, (folder / APPS).rglob("*")))
    library = PACKAGE
    (folder / LIBRARY_DIGESTS).write_text(digests(library, library_files(library)))


def library_files(library: Path) -> list[Path]:
    """Sources, templates and weights of the library, without the app that an installed one has."""
    sources = library.rglob("*.py")
    own = [file for file in sources if "_app" not in file.relative_to(library).parts]
    return [*own, *library.glob("*/templates/**/*"), *library.glob("assets/*")]


def digests(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 of files by their path below a folder, as ``sha256sum --check`` reads them."""
    return "".join(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder).as_posix()}\n"
        for file in sorted(files)
        if file.is_file()
    )


def _flwr(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [program("flwr", environment), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=SECONDS,
    )
    if done.returncode:
        output = plain(done.stdout + done.stderr).strip()
        raise LaunchError(f"`flwr {arguments[0]}` failed:\n{output}")
