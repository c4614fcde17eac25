"""The images of one client, ready for its backbone.

A source of data (:mod:`fedcompo.data.sources`) yields a number of clients. Each client owns one
class or more and loads only its own images::

    source -> catalogue (classes, no pixels) -> this client's classes -> train / test -> images

Where a source does not say who its clients are, its classes are dealt to them, each class to one
client, or its images (:mod:`fedcompo.data.partition`). An error names the damaged image or
ill-formed source. Texts are dealt and split like images; the rest of fedcompo treats them as images
with a single row of bytes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.data import CLASSES, DataConfig
from fedcompo.data.catalogue import Catalogue
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
from fedcompo.data.partition import client_names as client_names
from fedcompo.data.partition import names_in, part_for
from fedcompo.data.sources.kinds import catalogue_of, own_catalogue, own_clients
from fedcompo.data.sources.labels import NO_LABEL
from fedcompo.errors import DataError
from fedcompo.method.images import Images, part_of
from fedcompo.report.pictures import UNLABELLED, Facts

SMALLEST_SET_ASIDE = 5
"""Images of a class below which :func:`set_aside` takes none of it."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Images and labels of one client for training, or for testing."""

    images: Images
    """(count, channels, size, size), of texts (count, 1, 1, length); uint8, read when asked for."""
    labels: Tensor
    """(count,), int64, index into the client's classes."""

    def part(self, which: Tensor) -> Split:
        """Choose examples by indices or bools; nothing is read yet."""
        return Split(part_of(self.images, which), self.labels[which])


@dataclass(frozen=True)
class ClientData:
    """All that one client owns."""

    name: str
    """``client-<partition>``, or as the source itself calls the client."""
    classes: tuple[str, ...]
    """Sorted names of the classes that the client owns, at least one."""
    train: Split
    """Images to train on, at least one a class; grouped by class."""
    test: Split
    """Images to test on, at least one; grouped by class."""
    facts: Facts = field(default_factory=dict)
    """What whoever reads the results should know of the images."""
    shards: Tensor | None = None
    """(count,), int64, the shard of each training image; None: they are not dealt to shards."""

    def shard(self, number: int) -> ClientData:
        """Return what one shard trains on; the test images are the client's, as are the facts."""
        assert self.shards is not None
        facts = {} if number else self.facts
        return replace(self, train=self.train.part(self.shards == number), facts=facts)


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

    def read(self, preprocessing: Preprocessing, *, cache: Path | None = None) -> ClientData:
        """Read the images; raises ``DataError`` if one cannot be used.

        Those of files are kept in the folder ``cache``, for other processes; None: they are not.
        """
        catalogue, chosen = self.catalogue, np.concatenate([*self.train, *self.test])
        kept, held, facts = decode(
            catalogue, self.train, self.test, preprocessing, client=self.name, cache=cache
        )
        found = dict(facts)
        of_none = [name for name in catalogue.names if name.casefold() in NO_LABEL]
        unlabelled = {UNLABELLED: np.isin(catalogue.classes, of_none)}
        for what, befallen in {**catalogue.marks, **unlabelled}.items():
            if count := int(befallen[chosen].sum()):
                found[what] = count
                logger.warning(
                    "Client %r: %d of %d images in %s %s.",
                    *(self.name, count, len(chosen), catalogue.source, what),
                )
        splits = Split(kept, self.labels), Split(held, _labels(self.test))
        return ClientData(self.name, self.classes, *splits, found)


def load_client_data(
    config: DataConfig,
    preprocessing: Preprocessing,
    *,
    partition: int,
    seed: int,
    cache: Path | None = None,
) -> ClientData:
    """Load the images of one client of a source: :func:`client_share`, read.

    Raises:
        DataError: If the source or one of its images cannot be used, or the client does not exist.
    """
    share = client_share(config, partition=partition, seed=seed)
    return share.read(preprocessing, cache=cache)


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
    own = own_clients(config.data)
    names = names_in(config, own)
    if not 0 <= partition < len(names):
        raise DataError(
            f"There is no client {partition}: `data` {config.data!r} yields {len(names)} clients, "
            f"0 to {len(names) - 1}. Start as many clients as the data has, or change `num-tasks`."
        )
    name = names[partition]
    catalogue = catalogue_of(config.data, name if own else "")
    if own:
        classes = draw_classes(catalogue.names, config.num_classes, seed=seed)
    elif config.rule != CLASSES:
        catalogue = part_for(name, catalogue, config, seed=seed)
        classes = catalogue.names
    else:
        classes = deal_classes(
            catalogue.names,
            config.num_tasks,
            num_classes=config.num_classes,
            seed=seed,
            source=catalogue.source,
        )[partition]
    return _share(catalogue, classes, client=name, seed=seed, cap=config.images_per_class)


def load_folder(
    data: str | Path,
    preprocessing: Preprocessing,
    *,
    seed: int,
    images_per_class: int = 0,
    client: str | None = "",
    cache: Path | None = None,
) -> ClientData:
    """Load what one client owns: :func:`folder_share`, read.

    Raises:
        DataError: If the source or one of its images cannot be used.
    """
    share = folder_share(data, seed=seed, images_per_class=images_per_class, client=client)
    return share.read(preprocessing, cache=cache)


def folder_share(
    data: str | Path, *, seed: int, images_per_class: int = 0, client: str | None = ""
) -> Share:
    """List what one client owns; in a deployment each node has its own folder or file.

    Args:
        data: Folder with ``train/<class>/*`` and perhaps ``test/<class>/*``, or ``<class>/*``; or
            a file that lists images or holds them; or a source of another kind.
        seed: Seed of the run. It draws subsets, and test images if the source marks none.
        images_per_class: Keep at most this many training images a class; 0: all.
        client: The client's name; empty: that of the folder or file; None: the same, and all that
            a manifest lists, whoever owns it.

    Raises:
        DataError: If the source cannot be used.
    """
    name, catalogue = own_catalogue(str(data), client)
    return _share(catalogue, catalogue.names, client=name, seed=seed, cap=images_per_class)


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
    return split.part(~aside), split.part(aside)


def drawn_aside(labels: Tensor, *, share: float, seed: int, client: str) -> Tensor:
    """Whether each image is kept aside, (count,), bool; see :func:`set_aside`."""
    aside = torch.zeros(len(labels), dtype=torch.bool)
    for label in np.unique(labels.numpy()) if share else ():
        members = np.flatnonzero(labels.numpy() == label)
        if len(members) >= SMALLEST_SET_ASIDE:
            draw = frozen_generator(seed, "aside", client, str(label))
            aside[split_members(members, share=share, draw=draw)[1]] = True
    return aside


def _share(
    catalogue: Catalogue, classes: tuple[str, ...], *, client: str, seed: int, cap: int
) -> Share:
    """Split the images of some classes of a catalogue."""
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
    return Share(client, catalogue, classes, train, test)


def _labels(members: list[Indices]) -> Tensor:
    """Return the label of each image, (count,), given the images of each class."""
    return torch.arange(len(members)).repeat_interleave(torch.tensor([*map(len, members)]))
