"""Folders of images, told apart by where the images lie.

::

    <clients>/<client>/train/<class>/*     a folder a client, and perhaps .../test/<class>/*
    <clients>/<client>/<class>/*           the same, test images are drawn
    <data set>/train/<class>/*             a single data set, and perhaps .../test/<class>/*
    <data set>/<class>/*                   the same, test images are drawn

Beside ``train``, a folder ``val``, ``valid`` or ``validation`` holds the test images if there is no
``test``, and else more training images. Other folders beside ``train`` are not read, which the log
of the client says.

Files that operating systems create (``.DS_Store``, ``Thumbs.db``) are ignored. Everything else in a
class folder must be an image.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedcompo.data.catalogue import Catalogue, class_name, version_of
from fedcompo.data.sources.splits import TEST, TRAIN, VALIDATION, divided, part_called
from fedcompo.data.tasks import task_of
from fedcompo.errors import DataError
from fedcompo.report.pictures import DEALT
from fedcompo.report.twins import few

LEFT_BEHIND = (
    *("thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found"),
    *("$recycle.bin", "system volume information"),
)
TASKS_APART = (
    " Each task of a client is a member of its own: give it a folder, or a node, that is called "
    "'<client>.task-0', '<client>.task-1' and so on."
)
logger = logging.getLogger(__name__)


def client_folders(path: Path) -> dict[str, Path]:
    """Find the clients' folders.

    Args:
        path: Folder with one sub-folder a client, or a data set; files beside them are ignored.

    Returns:
        Folder of each client by its name, sorted by name; empty: the path is a single data set.

    Raises:
        DataError: If the path cannot be read, holds no sub-folder, or could be read as both.
    """
    folders = _folders(path)
    if not folders:
        raise DataError(
            f"Folder {path} holds no folders. Expected one a client, each with train/<class>/* or "
            "<class>/*; or the class folders of one data set."
        )
    deep, flat = _by_content(folders)
    if TRAIN in deep:
        if strange := [name for name in folders if not part_called(name)]:
            raise DataError(
                f"Folder {path} holds 'train' like a data set, and {few([*map(repr, strange)])} "
                "like clients. Move out what does not belong there, or rename the client 'train'."
            )
        return {}
    if deep and all(map(part_called, folders)):
        raise DataError(
            f"Folder {path} holds {few([*map(repr, folders)])}, which are called as the parts of "
            "one data set, and none of them is 'train'. Rename the part to train on 'train', and "
            "that to test on 'test'; if these are clients, rename them."
        )
    _check_depth(path, deep, flat, expected="folders of clients, or class folders")
    return {} if flat else folders


def data_set(path: Path) -> Catalogue:
    """List the images of a single data set, whose classes are dealt to clients."""
    catalogue = folder_catalogue(path)
    marks = {**catalogue.marks, DEALT: np.ones(len(catalogue.classes), dtype=np.bool_)}
    return replace(catalogue, marks=marks)


def folder_catalogue(path: Path, *, client: str = "") -> Catalogue:
    """List the images of one client, or of a data set.

    Args:
        path: Folder with ``train/<class>/*`` and perhaps ``test/<class>/*``, or ``<class>/*``.
        client: The client's name, for messages.

    Returns:
        Training images, then the others, each sorted by class and file name.

    Raises:
        DataError: If folders are missing, empty, misspelt or in the wrong place.
    """
    try:
        parts = _parts(path)
        members = {folder: _classes(folder) for folder in parts}
    except DataError as error:
        whose = f"Client {client!r}: " if client else ""
        raise DataError(f"{whose}{error}", told=error.told) from error.__cause__
    files: list[str] = []
    classes: list[str] = []
    own_parts: list[str] = []
    for folder, part in parts.items():
        for name, own in members[folder].items():
            files += own
            classes += [name] * len(own)
            own_parts += [part] * len(own)
    is_test, marks = divided(own_parts)
    return Catalogue(
        source=str(path),
        classes=np.array(classes),
        is_test=is_test,
        open=lambda index: Path(files[index]).read_bytes(),
        which=files.__getitem__,
        file=lambda index: Path(files[index]),
        version=version_of(files),
        marks=marks,
    )


def _parts(path: Path) -> dict[Path, str]:
    """Return the folders of class folders, and what each is for; log which are not read."""
    folders = _folders(path)
    deep, flat = _by_content(folders)
    if flat and TRAIN not in folders:
        _check_depth(path, deep, flat, expected="class folders")
        if word := next(filter(part_called, flat), ""):
            raise DataError(
                f"{path} holds class folders and {word!r}, which holds images itself: is it a "
                "class, or a part? Put the class folders into a folder 'train', or rename it.",
                told="a class folder is called as a part of a data set is",
            )
        return {path: TRAIN}
    if TRAIN in flat:
        raise DataError(
            f"{folders[TRAIN]} holds images, but no class folders. Expected train/<class>/*; if "
            "'train' is a class itself, put all class folders into a folder 'train'.",
            told="the folder 'train' holds images, but no class folders",
        )
    for name in folders:
        near = difflib.get_close_matches(name.lower(), (TRAIN, TEST), 1, 0.7)
        if near and name != near[0] and near[0] not in folders:
            raise DataError(
                f"{path} holds a folder {name!r}. Rename it {near[0]!r} if that is what it is, or "
                "take it out; it is not read under this name.",
                told=f"a folder should be called {near[0]!r}",
            )
    if TRAIN not in folders:
        present = ", ".join(map(repr, folders)) or "none"
        tasks = any(task_of(name) is not None for name in folders)
        raise DataError(
            f"{path} has no folder 'train'; folders found: {present}. Expected train/<class>/* and "
            "perhaps test/<class>/*, or class folders that hold the images."
            + (TASKS_APART if tasks else ""),
            told="there is no folder 'train'",
        )
    parts = {
        folder: part
        for part in (TRAIN, VALIDATION, TEST)
        for name, folder in folders.items()
        if name == part or part == VALIDATION == part_called(name)
    }
    if unread := [name for name, folder in folders.items() if folder not in parts]:
        logger.warning("Folders in %s that are not read: %s.", path, few(unread))
    return parts


def _folders(path: Path) -> dict[str, Path]:
    """List the folders in a folder, by name."""
    return {name: Path(one) for name, one in _entries(path).items() if one.is_dir()}


def _by_content(folders: Mapping[str, Path]) -> tuple[list[str], list[str]]:
    """Return the names of the folders that hold folders, and of those that hold only files."""
    deep, flat = list[str](), list[str]()
    for name, folder in folders.items():
        try:
            with os.scandir(folder) as entries:
                kinds = [entry.is_dir() for entry in entries if not left_behind(entry.name)]
        except OSError:
            continue  # who reads it says what is wrong
        if kinds:
            (deep if any(kinds) else flat).append(name)
    return deep, flat


def _check_depth(path: Path, deep: list[str], flat: list[str], *, expected: str) -> None:
    """Refuse folders of which some hold images and others hold folders."""
    if deep and flat:
        raise DataError(
            f"{path} must hold {expected}, but there are files in {few([*map(repr, flat)])} and "
            f"folders in {few([*map(repr, deep)])}. Let all class folders lie equally deep.",
            told="some folders hold images, others hold folders",
        )


def _classes(folder: Path) -> dict[str, list[str]]:
    """List the files of each class, by class name."""
    classes: dict[str, list[str]] = {}
    entries = _entries(folder)
    if folder.name != TRAIN and entries and not any(one.is_dir() for one in entries.values()):
        raise DataError(
            f"{folder} holds files, but no class folders. Expected {folder.name}/<class>/*; if "
            "these images have no labels, take the folder out: then test images are drawn.",
            told=f"the folder {folder.name!r} holds files, but no class folders",
        )
    for name, entry in entries.items():
        if not entry.is_dir():
            raise DataError(
                f"{entry.path} lies beside the class folders. Move it into the folder of its "
                "class, or take it out.",
                told="there are files beside the class folders",
            )
        members = [*_entries(Path(entry.path)).values()]
        if nested := next((one.path for one in members if one.is_dir()), None):
            raise DataError(
                f"class {name!r} holds the folder {nested}. Expected image files only; move them "
                "up into the class folder.",
                told="a class folder holds a folder",
            )
        if not members:
            raise DataError(
                f"class {name!r} is empty; {entry.path} holds no image. Add images or take the "
                "folder out.",
                told="a class folder is empty",
            )
        classes[name] = [one.path for one in members]
    if not classes:
        drawn = "" if folder.name == TRAIN else "; without this folder, test images are drawn"
        raise DataError(f"{folder} holds no images. Expected {folder.name}/<class>/*{drawn}.")
    return classes


def left_behind(name: str) -> bool:
    """Tell whether a file is hidden, or one that operating systems create."""
    return name.startswith(".") or name.lower() in LEFT_BEHIND


def _entries(folder: Path) -> dict[str, os.DirEntry[str]]:
    """List a folder by name in NFC, sorted, without the files that operating systems create."""
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"Folder {folder.absolute()} cannot be read ({error.strerror}). Check the path, and "
            "that you may read it.",
            told="a folder cannot be read",
        ) from error
    named: dict[str, os.DirEntry[str]] = {}
    for entry in entries:
        if left_behind(entry.name):
            continue
        plain = entry.name.isascii() and entry.name.isprintable()  # of very many, nearly all
        name = entry.name if plain else class_name(entry.name, source=str(folder))
        if name in named:
            raise DataError(
                f"Folder {folder} holds two entries named {name!r}, spelt with different Unicode "
                f"characters ({named[name].name!a}, {entry.name!a}). Merge or rename them."
            )
        named[name] = entry
    return dict(sorted(named.items()))
