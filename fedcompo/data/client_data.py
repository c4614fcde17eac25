"""The images of one client, ready for its backbone.

A source of data (``digits``, ``folder:<path>``, ``npz:<path>``, ``text:<path>``, ``cifar100``)
yields a number of clients. Each client owns one class or more and loads only its own images::

    source -> catalogue (classes, no pixels) -> this client's classes -> train / test -> tensors

Classes of a source are dealt to the clients, each class to one client. The folders of ``folder:``
may share classes, and so do clients under another ``partition``. An error names the damaged image
or ill-formed source. Texts are dealt and split like images; the rest of fedcompo treats them as
images with a single row of bytes.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.data import CLASSES, COLUMN, DataConfig
from fedcompo.data.catalogue import Catalogue, read_once
from fedcompo.data.decoding import decode
from fedcompo.data.draws import (
    Indices,
    cap_members,
    deal_classes,
    draw_classes,
    frozen_generator,
    split_class,
    split_members,
)
from fedcompo.data.folders import client_folders, folder_catalogue
from fedcompo.data.named import cifar100_catalogue, digits_catalogue
from fedcompo.data.npz import npz_catalogue
from fedcompo.data.partition import member_names, part_of, values_of
from fedcompo.data.text import ENDING, text_catalogue
from fedcompo.errors import DataError
from fedcompo.report.pictures import Facts

SOURCES = ("digits", "folder:<path>", "npz:<path>", "text:<path>", "cifar100")
NAMED: dict[str, Callable[[], Catalogue]] = {
    "digits": digits_catalogue,
    "cifar100": cifar100_catalogue,
}
FILES = {"npz": npz_catalogue, "text": text_catalogue}
PATHS = ("folder", *FILES)
SMALLEST_SET_ASIDE = 5
"""Images of a class below which :func:`set_aside` takes none of it."""
NO_LABEL = ("-1", "nan")
"""Names of classes that programs write for images without a label."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Images and labels of one client for training, or for testing."""

    images: Tensor
    """(count, channels, size, size), of texts (count, 1, 1, length); uint8."""
    labels: Tensor
    """(count,), int64, index into the client's classes."""


@dataclass(frozen=True)
class ClientData:
    """All that one client owns."""

    name: str
    """``client-<partition>``; for ``folder:`` the name of the client's folder."""
    classes: tuple[str, ...]
    """Sorted names of the classes that the client owns, at least one."""
    train: Split
    """Images to train on, at least one a class; grouped by class."""
    test: Split
    """Images to test on, at least one; grouped by class."""
    facts: Facts = field(default_factory=dict)
    """What whoever reads the results should know of the images."""


def client_names(source: DataConfig) -> tuple[str, ...]:
    """Name the clients that a source yields: sub-folders of ``folder:``, else its parts.

    Raises:
        DataError: If the source is unknown or cannot be read, or has no such parts.
    """
    kind, rest = _parse(source.data)
    if kind == "folder":
        if source.rule != CLASSES:
            raise DataError(
                f"`partition` is {source.partition!r}, but {source.data} has its clients already, "
                "a folder each. Leave `partition` out."
            )
        return tuple(client_folders(Path(rest).expanduser()))
    return (
        values_of(_catalogue(kind, rest), source) if source.rule == COLUMN else member_names(source)
    )


def load_client_data(
    config: DataConfig, preprocessing: Preprocessing, *, partition: int, seed: int
) -> ClientData:
    """Load the images of one client of a source.

    Args:
        config: The source, and how it is dealt.
        preprocessing: Input that the backbone expects.
        partition: Number of the client, from 0.
        seed: Seed of the run. It deals classes, draws subsets, and draws test images where the
            source does not mark them. Test images of ``digits`` are the same for all seeds.

    Raises:
        DataError: If the source or one of its images cannot be used, or the client does not exist.
    """
    kind, rest = _parse(config.data)
    names = client_names(config)
    if not 0 <= partition < len(names):
        raise DataError(
            f"There is no client {partition}: `data` {config.data!r} yields {len(names)} clients, "
            f"0 to {len(names) - 1}. Start as many clients as the data has, or change `num-tasks`."
        )
    path, name = Path(rest).expanduser(), names[partition]
    if kind == "folder":
        folder = client_folders(path)[name]
        catalogue = folder_catalogue(folder, client=name)
        classes = draw_classes(catalogue.names, config.num_classes, seed=seed)
    elif config.rule != CLASSES:
        catalogue = part_of(_catalogue(kind, rest), config, name, seed=seed)
        classes = catalogue.names
    else:
        catalogue = _catalogue(kind, rest)
        classes = deal_classes(
            catalogue.names,
            config.num_tasks,
            num_classes=config.num_classes,
            seed=seed,
            source=catalogue.source,
        )[partition]
    return _load_classes(
        catalogue, classes, preprocessing, client=name, seed=seed, cap=config.images_per_class
    )


def load_folder(
    path: Path,
    preprocessing: Preprocessing,
    *,
    seed: int,
    images_per_class: int = 0,
) -> ClientData:
    """Load the folder of one client, which has its name; in a deployment each node has its own.

    Args:
        path: Folder with ``train/<class>/*`` and perhaps ``test/<class>/*``.
        preprocessing: Input that the backbone expects.
        seed: Seed of the run. It draws subsets, and test images if there is no ``test``.
        images_per_class: Keep at most this many training images a class; 0: all.

    Raises:
        DataError: If the folder or one of its images cannot be used.
    """
    path = Path(path).expanduser().absolute()
    catalogue = folder_catalogue(path, client=path.name)
    return _load_classes(
        catalogue, catalogue.names, preprocessing, client=path.name, seed=seed, cap=images_per_class
    )


def set_aside(split: Split, *, share: float, seed: int, client: str) -> tuple[Split, Split]:
    """Keep some training images aside, drawn from each class.

    Args:
        split: The client's training images.
        share: Share of each class, in [0, 1); at least one image of a class that has
            :data:`SMALLEST_SET_ASIDE`, none of a smaller one, and never all. 0: none.
        seed: Seed of the run.
        client: The client's name; with seed and class it decides who is drawn.

    Returns:
        The images to train on, and those kept aside (perhaps none), both in the order of ``split``.
    """
    aside = drawn_aside(split.labels, share=share, seed=seed, client=client)
    return Split(split.images[~aside], split.labels[~aside]), Split(
        split.images[aside], split.labels[aside]
    )


def drawn_aside(labels: Tensor, *, share: float, seed: int, client: str) -> Tensor:
    """Whether each image is kept aside, (count,), bool; see :func:`set_aside`."""
    aside = torch.zeros(len(labels), dtype=torch.bool)
    for label in np.unique(labels.numpy()) if share else ():
        members = np.flatnonzero(labels.numpy() == label)
        if len(members) >= SMALLEST_SET_ASIDE:
            draw = frozen_generator(seed, "aside", client, str(label))
            aside[split_members(members, share=share, draw=draw)[1]] = True
    return aside


def _catalogue(kind: str, rest: str) -> Catalogue:
    """List the examples of a source that is dealt to clients."""
    return read_once(FILES[kind], Path(rest).expanduser()) if kind in FILES else NAMED[kind]()


def _parse(data: str) -> tuple[str, str]:
    """Split ``data`` into its kind and, for those that have one, its path."""
    kind, _, rest = data.partition(":")
    if (data in NAMED) or (kind in PATHS and rest):
        return kind, rest
    if kind in PATHS:
        hint = f"{kind} needs a path: {kind}:<path>."
    elif near := difflib.get_close_matches(kind, (*PATHS, *NAMED), 1):
        more = "" if near[0] in NAMED else f":{rest or '<path>'}"
        hint = f"Did you mean {near[0] + more!r}?"
    elif data and (path := Path(data).expanduser()).exists():
        text = "text" if path.suffix == ENDING else "npz"
        hint = f"Did you mean '{'folder' if path.is_dir() else text}:{data}'?"
    else:
        hint = ""
    raise DataError(f"`data` must be one of {', '.join(SOURCES)}, got {data!r}. {hint}".strip())


def _load_classes(
    catalogue: Catalogue,
    classes: tuple[str, ...],
    preprocessing: Preprocessing,
    *,
    client: str,
    seed: int,
    cap: int,
) -> ClientData:
    """Read the images of some classes of a catalogue."""
    classes = tuple(sorted(classes))
    parts = [split_class(catalogue, own, client=client, seed=seed) for own in classes]
    train = [
        cap_members(members, cap, draw=frozen_generator(seed, "subset", own))
        for own, (members, _) in zip(classes, parts, strict=True)
    ]
    test = [members for _, members in parts]
    if not sum(map(len, test)):
        raise DataError(
            f"Client {client!r}: no test image in {catalogue.source} for any of its classes "
            f"({', '.join(classes)}). Add test images, or leave out which images are test images: "
            "then they are drawn."
        )
    for own in set(classes) & set(NO_LABEL):
        count = int((catalogue.classes == own).sum())
        logger.warning(
            "Client %r: %d images in %s have the class %r, which often means that they have none; "
            "it is trained as a class. Take them out if so.",
            *(client, count, catalogue.source, own),
        )
    kept, held, facts = decode(catalogue, train, test, preprocessing, client=client)
    return ClientData(
        name=client,
        classes=classes,
        train=Split(kept, _labels(train)),
        test=Split(held, _labels(test)),
        facts=facts,
    )


def _labels(members: list[Indices]) -> Tensor:
    """Return the label of each image, (count,), given the images of each class."""
    return torch.arange(len(members)).repeat_interleave(torch.tensor([*map(len, members)]))
