"""The images of one client, ready for its backbone.

A source of data (``digits``, ``folder:<path>``, ``npz:<path>``, ``text:<path>``, ``cifar100``)
yields a number of clients. Each client owns one class or more and loads only its own images::

    source -> catalogue (classes, no pixels) -> this client's classes -> train / test -> tensors

Classes of a source are dealt to the clients, each class to one client; only the folders of
``folder:`` may share classes. An error names the damaged image or ill-formed source. Texts are
dealt and split like images; the rest of fedcompo treats them as images with a single row of bytes.
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
from fedcompo.config.data import DataConfig
from fedcompo.data.catalogue import Catalogue, read_once
from fedcompo.data.decoding import decode
from fedcompo.data.draws import (
    Indices,
    cap_members,
    deal_classes,
    draw_classes,
    frozen_generator,
    split_members,
)
from fedcompo.data.folders import client_folders, folder_catalogue
from fedcompo.data.named import cifar100_catalogue, digits_catalogue
from fedcompo.data.npz import npz_catalogue
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
TEST_SHARE = 0.2
"""Share of each class that becomes test images where the source does not mark them."""
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


@dataclass(frozen=True)
class Share:
    """Which examples of a source are one client's: listed and split, not read yet."""

    name: str
    catalogue: Catalogue
    classes: tuple[str, ...]
    """Sorted."""
    train: list[Indices]
    """Indices of the training images of each class, at least one."""
    test: list[Indices]
    """Indices of the test images of each class; of all together, at least one."""

    @property
    def labels(self) -> Tensor:
        """Label of each training image, (count,), grouped by class."""
        return _labels(self.train)

    def read(self, preprocessing: Preprocessing) -> ClientData:
        """Read the images; raises ``DataError`` if one cannot be used."""
        kept, held, facts = decode(
            self.catalogue, self.train, self.test, preprocessing, client=self.name
        )
        splits = Split(kept, self.labels), Split(held, _labels(self.test))
        return ClientData(self.name, self.classes, *splits, facts)


def client_names(source: DataConfig) -> tuple[str, ...]:
    """Name the clients that a source yields: sub-folders of ``folder:``, else ``num_tasks``.

    Raises:
        DataError: If the source is unknown, or a ``folder:`` that cannot be read.
    """
    kind, rest = _parse(source.data)
    if kind == "folder":
        return tuple(client_folders(Path(rest).expanduser()))
    return tuple(f"client-{partition}" for partition in range(source.num_tasks))


def load_client_data(
    config: DataConfig, preprocessing: Preprocessing, *, partition: int, seed: int
) -> ClientData:
    """Load the images of one client of a source: :func:`client_share`, read.

    Raises:
        DataError: If the source or one of its images cannot be used, or the client does not exist.
    """
    return client_share(config, partition=partition, seed=seed).read(preprocessing)


def client_share(config: DataConfig, *, partition: int, seed: int) -> Share:
    """List the images of one client of a source.

    Args:
        config: The source, and how it is dealt.
        partition: Number of the client, from 0.
        seed: Seed of the run. It deals classes, draws subsets, and draws test images where the
            source does not mark them. Test images of ``digits`` are the same for all seeds.

    Raises:
        DataError: If the source cannot be used, or the client does not exist.
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
    else:
        catalogue = read_once(FILES[kind], path) if kind in FILES else NAMED[kind]()
        classes = deal_classes(
            catalogue.names,
            config.num_tasks,
            num_classes=config.num_classes,
            seed=seed,
            source=catalogue.source,
        )[partition]
    return _share(catalogue, classes, client=name, seed=seed, cap=config.images_per_class)


def load_folder(
    path: Path,
    preprocessing: Preprocessing,
    *,
    seed: int,
    images_per_class: int = 0,
) -> ClientData:
    """Load the folder of one client, which has its name: :func:`folder_share`, read.

    Raises:
        DataError: If the folder or one of its images cannot be used.
    """
    return folder_share(path, seed=seed, images_per_class=images_per_class).read(preprocessing)


def folder_share(path: Path, *, seed: int, images_per_class: int = 0) -> Share:
    """List the folder of one client, which has its name; in a deployment each node has its own.

    Args:
        path: Folder with ``train/<class>/*`` and perhaps ``test/<class>/*``.
        seed: Seed of the run. It draws subsets, and test images if there is no ``test``.
        images_per_class: Keep at most this many training images a class; 0: all.

    Raises:
        DataError: If the folder cannot be used.
    """
    path = Path(path).expanduser().absolute()
    catalogue = folder_catalogue(path, client=path.name)
    return _share(catalogue, catalogue.names, client=path.name, seed=seed, cap=images_per_class)


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


def _share(
    catalogue: Catalogue, classes: tuple[str, ...], *, client: str, seed: int, cap: int
) -> Share:
    """Split the images of some classes of a catalogue."""
    classes = tuple(sorted(classes))
    parts = [_split_class(catalogue, own, client=client, seed=seed) for own in classes]
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
    return Share(client, catalogue, classes, train, test)


def _split_class(catalogue: Catalogue, own: str, *, client: str, seed: int) -> list[Indices]:
    """Return indices of the training and of the test images of one class."""
    members = np.flatnonzero(catalogue.classes == own)
    if catalogue.is_test is None:
        if len(members) < 2:
            raise DataError(
                f"Client {client!r}: class {own!r} in {catalogue.source} has 1 image, "
                f"{catalogue.describe(int(members[0]))}. Test images must be drawn, so at least 2 "
                "are needed: add images, take the class out, or say which images are for testing.",
                told=f"class {own!r} has 1 image, and needs at least 2",
            )
        return split_members(members, share=TEST_SHARE, draw=frozen_generator(seed, "split", own))
    tests = catalogue.is_test[members]
    if tests.all():
        raise DataError(
            f"Client {client!r}: class {own!r} in {catalogue.source} has test images but no "
            "training images. Add training images, or take its test images out.",
            told=f"class {own!r} has test images but no training images",
        )
    return [members[~tests], members[tests]]


def _labels(members: list[Indices]) -> Tensor:
    """Return the label of each image, (count,), given the images of each class."""
    return torch.arange(len(members)).repeat_interleave(torch.tensor([*map(len, members)]))
