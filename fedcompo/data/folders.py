"""Folders of images: ``<clients>/<client>/train/<class>/*`` and optionally ``.../test/...``.

Without ``test``, a folder ``val``, ``valid`` or ``validation`` holds the test images. What is not
read is named in the log of the client, which stays there.

Files that operating systems create (``.DS_Store``, ``Thumbs.db``) are ignored. Everything else in a
class folder must be an image.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fedcompo.data.catalogue import Catalogue, class_name, version_of
from fedcompo.errors import DataError

LEFT_BEHIND = ("thumbs.db", "desktop.ini", "__macosx")
VALIDATION = ("val", "valid", "validation")
"""Folders that stand in for a missing ``test``, in upper or lower case."""
logger = logging.getLogger(__name__)


def client_folders(path: Path) -> dict[str, Path]:
    """Find the clients' folders.

    Args:
        path: Folder with one sub-folder a client; files beside them are ignored.

    Returns:
        Folder of each client by its name, sorted by name.

    Raises:
        DataError: If the path cannot be read or holds no sub-folder.
    """
    folders = {name: entry for name, entry in _entries(path).items() if entry.is_dir()}
    if not folders:
        raise DataError(
            f"Folder {path} holds no clients. Expected one sub-folder a client, each with "
            "train/<class>/* and perhaps test/<class>/*."
        )
    if "train" in folders:
        raise DataError(
            f"Folder {path} holds 'train': it looks like the folder of one client. Expected one "
            f"sub-folder a client; give the folder above it: folder:{path.absolute().parent}"
        )
    return folders


def folder_catalogue(path: Path, *, client: str) -> Catalogue:
    """List the images of one client.

    Args:
        path: The client's own folder, with ``train/<class>/*`` and perhaps ``test/<class>/*``.
        client: The client's name, for messages.

    Returns:
        Training images, then test images, each sorted by class and file name. Without a ``test``
        or validation folder, no image is marked as a test image.

    Raises:
        DataError: If folders are missing, empty, misspelt or in the wrong place.
    """
    folders = {name: entry for name, entry in _entries(path, client).items() if entry.is_dir()}
    for name in folders:
        near = difflib.get_close_matches(name.lower(), ("train", "test"), 1, 0.7)
        if near and name != near[0] and near[0] not in folders:
            raise DataError(
                f"Client {client!r}: {path} holds a folder {name!r}. Rename it {near[0]!r} if that "
                "is what it is, or take it out; only 'train' and 'test' are read.",
                told=f"a folder should be called {near[0]!r}",
            )
    if "train" not in folders:
        present = ", ".join(map(repr, folders)) or "none"
        raise DataError(
            f"Client {client!r}: {path} has no folder 'train'; folders found: {present}. Expected "
            "train/<class>/* and perhaps test/<class>/*.",
            told="there is no folder 'train'",
        )
    test = _test_folder(folders, path, client)
    files: list[Path] = []
    classes: list[str] = []
    is_test: list[bool] = []
    for part in ("train", test):
        for name, members in _classes(folders[part], client).items() if part else ():
            files += members
            classes += [name] * len(members)
            is_test += [part == test] * len(members)
    return Catalogue(
        source=str(path),
        classes=np.array(classes),
        is_test=np.array(is_test) if test else None,
        open=lambda index: files[index].read_bytes(),
        which=files.__getitem__,
        version=version_of(files),
    )


def _test_folder(folders: Iterable[str], path: Path, client: str) -> str:
    """Choose the folder of test images, or none (empty); log which folders are not read."""
    stand_ins = [name for name in folders if name.lower() in VALIDATION]
    if "test" not in folders and len(stand_ins) > 1:
        found = " and ".join(map(repr, stand_ins))
        raise DataError(
            f"Client {client!r}: {path} has no folder 'test', but {found}. Rename the one that "
            "holds the test images 'test'."
        )
    test = "test" if "test" in folders else next(iter(stand_ins), "")
    if test != "test" and test:
        logger.warning("Client %r: %s has no 'test'; %r holds its test images.", client, path, test)
    if unread := [name for name in folders if name not in ("train", test)]:
        listed = ", ".join(map(repr, unread))
        logger.warning("Client %r: folders in %s that are not read: %s.", client, path, listed)
    return test


def _classes(folder: Path, client: str) -> dict[str, list[Path]]:
    """List the files of each class in ``train`` or ``test``, by class name."""
    classes: dict[str, list[Path]] = {}
    for name, entry in _entries(folder, client).items():
        if not entry.is_dir():
            raise DataError(
                f"Client {client!r}: {entry} lies beside the class folders. Move it into the "
                "folder of its class, or take it out.",
                told="there are files beside the class folders",
            )
        files = list(_entries(entry, client).values())
        nested = next((file for file in files if file.is_dir()), None)
        if nested:
            raise DataError(
                f"Client {client!r}: class {name!r} holds the folder {nested}. Expected image "
                "files only; move them up into the class folder.",
                told="a class folder holds a folder",
            )
        if not files:
            raise DataError(
                f"Client {client!r}: class {name!r} is empty; {entry} holds no image. Add images "
                "or take the folder out.",
                told="a class folder is empty",
            )
        classes[name] = files
    if not classes:
        raise DataError(
            f"Client {client!r}: {folder} holds no images. Expected {folder.name}/<class>/*"
            + (
                f"; without a folder {folder.name!r}, test images are drawn."
                if folder.name != "train"
                else "."
            )
        )
    return classes


def left_behind(entry: Path) -> bool:
    """Tell whether a file is hidden, or one that operating systems create."""
    return entry.name.startswith(".") or entry.name.lower() in LEFT_BEHIND


def _entries(folder: Path, client: str = "") -> dict[str, Path]:
    """List a folder by name in NFC, sorted, without the files that operating systems create."""
    whose = f"Client {client!r}: folder" if client else "Folder"
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"{whose} {folder.absolute()} cannot be read ({error.strerror}). Check the path, and "
            "that you may read it.",
            told="a folder cannot be read",
        ) from error
    named: dict[str, Path] = {}
    for entry in sorted(entries):
        if left_behind(entry):
            continue
        name = class_name(entry.name, source=str(folder))
        if name in named:
            raise DataError(
                f"{whose} {folder} holds two entries named {name!r}, spelt with different Unicode "
                f"characters ({named[name].name!a}, {entry.name!a}). Merge or rename them."
            )
        named[name] = entry
    return dict(sorted(named.items()))
