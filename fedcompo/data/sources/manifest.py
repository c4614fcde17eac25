"""Images that a table lists: CSV or Parquet, one row an image.

Its columns, by name or as :mod:`fedcompo.data.sources.columns` finds them::

    path     file of the image, seen from the table's folder
    label    name of its class
    split    train, test or validation; all rows have it, or none has it and test images are drawn
    client   who owns the image; without this column, the classes are dealt to clients
    group    images that belong together, such as a patient's; one shard has them all
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedcompo.data.catalogue import Catalogue, class_name, version_of
from fedcompo.data.sources.columns import (
    GROUP,
    Choices,
    called,
    check_roles,
    pick,
    with_group,
)
from fedcompo.data.sources.labels import MULTI_LABEL, class_names
from fedcompo.data.sources.splits import split_of
from fedcompo.data.sources.tables import Table, Where, read_table
from fedcompo.errors import DataError
from fedcompo.report.twins import few

NEEDED, OPTIONAL = ("path", "label"), ("split", "client")
PRESENCE = {"0", "1", "0.0", "1.0", "-1", "-1.0", ""}
"""What a column of one finding's presence holds; -1: uncertain, empty: not told."""


def manifest_catalogue(path: Path, choices: Choices = ()) -> Catalogue:
    """List the images of a table.

    Args:
        path: The table, see above.
        choices: Names of its columns, by role.

    Raises:
        DataError: If the table cannot be read; if a column is missing or ambiguous; if rows have no
            label or several, name files that do not exist, or repeat each other.
    """
    source = str(path)
    table, where = read_table(path)
    chosen = check_roles(choices, (*NEEDED, *OPTIONAL, GROUP), source=source)
    names = _columns(table, chosen, source)
    table = with_group(table, chosen, source)
    cells, labels = table[names["path"]], table[names["label"]]
    files = [path.parent / cell.strip().replace("\\", "/") for cell in cells]
    clients = _clients(table.get(names["client"]), where, source)
    _check_files(files, cells, where, source)
    _check_once(files, labels, clients, where, source)
    is_test, marks = split_of(table.get(names["split"]), source=source, which=where)
    others = table.keys() - {names[role] for role in NEEDED}
    return Catalogue(
        source=source,
        classes=class_names(labels, source=source, which=where),
        is_test=is_test,
        open=lambda index: files[index].read_bytes(),
        which=lambda index: f"{where(index)}, {files[index]}",
        file=files.__getitem__,
        version=version_of([path, *files]),
        marks=marks,
        clients=clients,
        columns={name: np.array(table[name]) for name in sorted(others)},
    )


def _columns(table: Table, chosen: dict[str, str], source: str) -> dict[str, str]:
    """Find the column of each role; an optional one may be empty."""
    columns = [*table]
    if "label" not in chosen and not called("label", columns):
        findings = [
            name
            for name, cells in table.items()
            if {"1", "1.0"} & {*cells} and {*cells} <= PRESENCE
        ]
        if len(findings) > 1:
            raise DataError(
                f"{source} has no column of labels, but one for the presence of each of "
                f"{few([*map(repr, findings)])}. {MULTI_LABEL}"
            )
    return {
        role: pick(
            role,
            called(role, columns),
            chosen=chosen,
            columns=columns,
            source=source,
            needed=role in NEEDED,
        )
        for role in (*NEEDED, *OPTIONAL)
    }


def _clients(cells: Sequence[str] | None, where: Where, source: str) -> NDArray[np.str_] | None:
    """Return the name of each image's client, (count,); None: the table does not say."""
    if cells is None:
        return None
    if empty := [where(row) for row, cell in enumerate(cells) if not cell.strip()]:
        raise DataError(
            f"{len(empty)} of {len(cells)} rows in {source} name no client: {few(empty)}. Name it, "
            "or take the rows or the column out."
        )
    known = {cell: class_name(cell.strip(), source=source) for cell in {*cells}}
    return np.array([known[cell] for cell in cells])


def _check_files(files: Sequence[Path], cells: Sequence[str], where: Where, source: str) -> None:
    """Refuse paths that are no files."""
    faulty = [row for row, file in enumerate(files) if not (cells[row].strip() and _is_file(file))]
    if faulty:
        shown = few([f"{where(row)} ({cells[row]!r})" for row in faulty])
        raise DataError(
            f"{len(faulty)} of {len(files)} images in {source} are no files: {shown}. Paths are "
            "seen from the table's folder. Correct them, or take the rows out; images are never "
            "skipped.",
            told=f"{len(faulty)} images are missing",
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long: a text in place of a path
        return False


def _check_once(
    files: Sequence[Path],
    labels: Sequence[str],
    clients: NDArray[np.str_] | None,
    where: Where,
    source: str,
) -> None:
    """Refuse an image that a client has twice."""
    seen: dict[tuple[Path, str], int] = {}
    again = []
    for row, file in enumerate(files):
        first = seen.setdefault((file, "" if clients is None else str(clients[row])), row)
        if labels[first] != labels[row]:
            raise DataError(
                f"{source} gives the image {file} the labels {labels[first]!r} and "
                f"{labels[row]!r} ({where(first)}, {where(row)}). {MULTI_LABEL}",
                told="an image has several labels",
            )
        if first != row:
            again.append(f"{where(first)} and {where(row)}")
    if again:
        raise DataError(
            f"{len(again)} of {len(files)} images in {source} are listed twice: {few(again)}. Take "
            "out all but one row of each.",
            told=f"{len(again)} images are listed twice",
        )
