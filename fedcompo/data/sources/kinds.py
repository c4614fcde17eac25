"""The sources of data by name, and the catalogue of each.

Some sources say themselves who the clients are: a folder of clients' folders, a manifest with a
column of clients. Of all others, the classes are dealt to clients.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from fedcompo.config.scenario import on_hub
from fedcompo.data.catalogue import Catalogue, read_once
from fedcompo.data.sources.columns import with_choices
from fedcompo.data.sources.folders import client_folders, data_set, folder_catalogue
from fedcompo.data.sources.hugging_face import SAVED, hub_catalogue, saved_catalogue
from fedcompo.data.sources.manifest import manifest_catalogue
from fedcompo.data.sources.named import digits_catalogue
from fedcompo.data.sources.npz import npz_catalogue
from fedcompo.data.sources.tables import CSV, PARQUET
from fedcompo.data.sources.text import text_catalogue
from fedcompo.errors import DataError
from fedcompo.report.twins import few

ALIASES = {"cifar100": "hf:uoft-cs/cifar100#image=img,label=fine_label"}
NAMED = {"digits": digits_catalogue}
FILES: dict[str, Callable[..., Catalogue]] = {
    "manifest": manifest_catalogue,
    "npz": npz_catalogue,
    "text": text_catalogue,
    "hf": saved_catalogue,
}
WITH_CHOICES = ("manifest", "hf")
"""Kinds of sources with columns to choose."""
KINDS = ("folder", *FILES)
SOURCES = ("digits", *(f"{kind}:<path>" for kind in KINDS), "hf:<name>", *ALIASES)
ENDINGS = {".npz": "npz", ".jsonl": "text"} | dict.fromkeys((*CSV, *PARQUET), "manifest")


def own_clients(data: str) -> tuple[str, ...]:
    """Name the clients that a source has of itself, sorted; none: its classes are to be dealt.

    Raises:
        DataError: If the source is unknown, or cannot be read.
    """
    kind, rest = parse(data)
    if kind == "folder":
        return tuple(client_folders(Path(rest).expanduser()))
    return catalogue_of(data).owners if kind == "manifest" else ()


def catalogue_of(data: str, client: str = "") -> Catalogue:
    """List the images of a source.

    Args:
        data: The source.
        client: One of :func:`own_clients`, whose images alone are listed; empty: all.

    Raises:
        DataError: If the source cannot be used.
    """
    kind, rest = parse(data)
    if kind in NAMED:
        return NAMED[kind]()
    place, choices = with_choices(rest) if kind in WITH_CHOICES else (rest, ())
    path = Path(place).expanduser()
    if kind == "folder" and client:
        own = path / client  # all are looked through only if a folder's name was brought into NFC
        folder = own if own.is_dir() else client_folders(path)[client]
        return folder_catalogue(folder, client=client)
    if kind == "folder":
        return data_set(path)
    if kind == "hf" and on_hub(place):
        return hub_catalogue(place, choices)
    whole = read_once(FILES[kind], path, *([choices] if kind in WITH_CHOICES else []))
    return whole.of_client(client) if client else whole


def own_catalogue(data: str, client: str | None = "") -> tuple[str, Catalogue]:
    """List the images of one client, which are its own: a folder or a file.

    Args:
        data: A source, or the path of one: its ending tells what it is.
        client: The client's name, which chooses its rows of a manifest; empty: not known; None:
            all rows are one client's.

    Returns:
        The client's name, or else that of the folder or file; and its images.

    Raises:
        DataError: If the source cannot be used, or has the images of several clients.
    """
    kind, rest = parse(_with_kind(data))
    if kind == "folder":
        path = Path(rest).expanduser().absolute()
        if path.is_file():
            raise DataError(
                f"{path} is a file, but of no kind that is read: expected a folder, or one of "
                f"{', '.join(ENDINGS)}. Save a table of a spreadsheet as CSV.",
                told="its data is a file of no kind that is read",
            )
        return client or path.name, folder_catalogue(path, client=client or path.name)
    whole = catalogue_of(f"{kind}:{rest}" if rest else kind)
    name = Path(with_choices(rest)[0]).stem or kind
    if whole.clients is None or client is None:
        return client or name, whole
    if client in whole.owners:
        return client, whole.of_client(client)
    if len(whole.owners) == 1:
        return client or whole.owners[0], whole
    raise DataError(
        f"{whole.source} lists images of {len(whole.owners)} clients, {few([*whole.owners])}, and "
        f"whose are to be read is {f'not known by {client!r}' if client else 'not said'}. Call the "
        "client by one of these names.",
        told="its manifest lists images of several clients, and not its own",
    )


def is_path(data: str) -> bool:
    """Whether it is the path of something that exists, perhaps with choices of columns."""
    return bool(data) and Path(with_choices(data)[0]).expanduser().exists()


def _with_kind(data: str) -> str:
    """Write a path as a source; what exists is a path, whatever it is called."""
    path = Path(with_choices(data)[0]).expanduser()
    if not is_path(data) and (data in (*NAMED, *ALIASES) or data.partition(":")[0] in KINDS):
        return data
    return f"{kind_of(path)}:{data}"


def parse(data: str) -> tuple[str, str]:
    """Split a source into its kind and, for those that have one, its path."""
    data = ALIASES.get(data, data)
    kind, _, rest = data.partition(":")
    if (data in NAMED) or (kind in KINDS and rest):
        return kind, rest
    if kind in KINDS:
        hint = f"{kind} needs a path: {kind}:<path>."
    elif near := difflib.get_close_matches(kind, (*KINDS, *NAMED, *ALIASES), 1, 0.7):
        more = f":{rest or '<path>'}" if near[0] in KINDS else ""
        hint = f"Did you mean {near[0] + more!r}?"
    elif data and Path(data).expanduser().exists():
        hint = f"Did you mean {kind_of(Path(data).expanduser()) + ':' + data!r}?"
    else:
        hint = "There is no such file or folder, either." if ":" not in data else ""
    raise DataError(f"`data` must be one of {', '.join(SOURCES)}, got {data!r}. {hint}".strip())


def kind_of(path: Path) -> str:
    """Return the kind of source that lies at a path: by its ending, and else a folder's."""
    if path.is_dir():
        return "hf" if any((path / name).is_file() for name in SAVED) else "folder"
    return ENDINGS.get(path.suffix.lower(), "folder")
