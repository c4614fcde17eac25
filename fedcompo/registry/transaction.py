"""Changes of a folder that happen as a whole or not at all, whenever the process dies.

::

    stage    new files are written under pending/new/, the new state as pending/state.json
    commit   pending/commit.json appears, by a rename: from here on the change will happen
    apply    staged folders move to their places, the journal grows, state.json is exchanged
             (what readers see), then files are exchanged, what has to go is deleted, and last
             pending/ itself

Before the commit a crash leaves the old state: recovery deletes ``pending/``. After it, recovery
applies what is left to apply; each step can be repeated. Nothing that the old state names is
touched before the new state is in place, so readers need no lock. Writers hold a lock that the
system takes back when its holder dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fedcompo.errors import RegistryDamaged, RegistryLocked
from fedcompo.registry.journal import utc_now
from fedcompo.report.progress import step
from fedcompo.storage.files import sync, sync_folder, tuples, write_synced

LOCK, PENDING, COMMIT = "lock", "pending", "commit.json"
STATE, JOURNAL, MODEL = "state.json", "journal.jsonl", "model"
TICK = 0.1
"""Seconds between two attempts to get the lock."""


@dataclass(frozen=True)
class Change:
    """The steps of a committed change; paths are relative to the folder."""

    moves: tuple[str, ...]
    """Staged folders and files that move to their places; nothing is there yet."""
    journal_size: int
    """Bytes of the journal before the change."""
    journal_lines: tuple[str, ...]
    """Lines that are appended to it."""
    deletions: tuple[str, ...]
    """Folders and files that the new state no longer names."""
    model: str
    """Folder that the link ``model`` shall point to; empty: none."""
    exchanges: tuple[str, ...] = ()
    """Staged files that take the place of others, once readers go by the new state."""


@contextlib.contextmanager
def locked(root: Path, purpose: str, *, patience: float = 60.0) -> Iterator[None]:
    """Hold the writer's lock; first complete or undo what a dead writer left.

    Args:
        root: The folder.
        purpose: Reason for the lock; other writers see it while they wait.
        patience: Seconds to wait for another writer.

    Raises:
        RegistryLocked: If another writer holds it for longer; says who, and since when.
    """
    with (root / LOCK).open("a+", encoding="utf-8") as file:
        _acquire(file.fileno(), root, patience)
        file.truncate(0)
        file.write(
            f"{purpose}, by {_user()} in process {os.getpid()} on {socket.gethostname()} "
            f"since {utc_now()}\n"
        )
        file.flush()
        try:
            recover(root)
            yield
        finally:
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                file.truncate(0)


def recover_if_idle(root: Path) -> None:
    """Complete or undo what a dead writer left, unless another writer holds the lock."""
    if not (root / PENDING).exists():
        return
    with contextlib.suppress(RegistryLocked, OSError), locked(root, "recover", patience=0):
        pass  # where nothing can be written, what there is can be read all the same


def stage(root: Path) -> Path:
    """Make the folder for new files, ``pending/new``; call with the lock held."""
    folder = root / PENDING / "new"
    folder.mkdir(parents=True)
    return folder


def commit(root: Path, change: Change, state: str) -> None:
    """Commit a staged change with its new ``state.json``, and apply it; the lock is held.

    Raises:
        RegistryDamaged: If something lies where a staged folder should go.
    """
    for path in change.moves:
        if (root / path).exists():
            raise RegistryDamaged(
                f"{root / path} is in the way: the registry did not put it there. "
                "Move it elsewhere, then try again."
            )
    pending = root / PENDING
    _sync_tree(pending / "new")
    write_synced(pending / STATE, state.encode())
    write_synced(pending / "commit", json.dumps(asdict(change)).encode())
    (pending / "commit").rename(pending / COMMIT)
    sync_folder(pending)
    _apply(root, change)


def recover(root: Path) -> None:
    """Complete a committed change, undo one that was not; call with the lock held.

    Raises:
        RegistryDamaged: If the commit cannot be read.
    """
    pending = root / PENDING
    if not pending.exists():
        return
    if not (pending / COMMIT).exists():
        shutil.rmtree(pending, ignore_errors=True)
        return
    try:
        values = json.loads((pending / COMMIT).read_text(encoding="utf-8"))
        change = Change(**tuples(values))
        model = [change.model] if change.model else []
        require_inside(root, [*change.moves, *change.exchanges, *change.deletions, *model])
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RegistryDamaged(
            f"{pending / COMMIT} cannot be read ({error}). A change was committed there but cannot "
            "be completed; restore the registry from a copy."
        ) from error
    _apply(root, change)


def require_inside(root: Path, paths: Iterable[str]) -> None:
    """Raise ``ValueError`` if a path that a file names is not one of something below the folder.

    A registry may come from elsewhere: what it names must not reach anything of yours.
    """
    home, folders = root.resolve(), dict[Path, str]()
    for path in paths:
        parts = Path(path).parts
        if not parts or Path(path).is_absolute() or ".." in parts or "\0" in path:
            raise ValueError(f"{path!r} does not lie in {root}")
        folders[Path(path).parent] = path
    for folder, path in folders.items():
        if not (root / folder).resolve().is_relative_to(home):
            raise ValueError(f"{path!r} does not lie in {root}")


def _apply(root: Path, change: Change) -> None:
    """Do what a commit says; any step may have been done already."""
    pending = root / PENDING
    for path in change.moves:
        (root / path).parent.mkdir(exist_ok=True)
    sync_folder(root)  # a power cut must take neither pending/ nor a folder that is moved into
    _move(root, change.moves)
    if (pending / STATE).exists():  # else readers go by the new state already, and its journal
        _grow_journal(root / JOURNAL, change)
        (pending / STATE).replace(root / STATE)
        sync_folder(root)
    _move(root, change.exchanges)
    _point_model(root, change.model)
    for path in change.deletions:
        delete(root / path)
        sync_folder((root / path).parent)  # or it could be back after a power cut
    shutil.rmtree(pending)
    sync_folder(root)


def _move(root: Path, paths: Iterable[str]) -> None:
    """Move staged files and folders to their places, those that are not there yet."""
    for path in paths:
        if (staged := root / PENDING / "new" / path).exists():
            staged.replace(root / path)
            sync_folder((root / path).parent)


def _grow_journal(path: Path, change: Change) -> None:
    with path.open("r+b") as file:
        file.truncate(change.journal_size)
        file.seek(change.journal_size)
        file.write("".join(f"{line}\n" for line in change.journal_lines).encode())
        sync(file)


def delete(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _point_model(root: Path, folder: str) -> None:
    """Exchange the link to the current composition in one step."""
    link, fresh = root / MODEL, root / PENDING / MODEL
    if not folder:
        link.unlink(missing_ok=True)
        return
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder, target_is_directory=True)
    fresh.replace(link)


def _acquire(handle: int, root: Path, patience: float) -> None:
    deadline, is_first = time.monotonic() + patience, True
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = (root / LOCK).read_text(encoding="utf-8").strip() or "another process"
        if time.monotonic() >= deadline:
            raise RegistryLocked(
                f"The registry {root} is being changed ({holder}), for more than {patience:g} s. "
                "Wait for it to end, then try again."
            )
        if is_first:
            step(f"waiting for another writer ({holder})")
            is_first = False
        time.sleep(TICK)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return f"user {os.getuid()}"


def _sync_tree(folder: Path) -> None:
    """Sync every folder below; their files were synced when they were written."""
    for path, _, _ in os.walk(folder):
        sync_folder(Path(path))
