"""Deal the images of a source to clients that share classes (the setting ``partition``).

- *iid*: every client gets an equal share of the images, drawn at random.
- *dirichlet:alpha*: the images of each class are shared out in proportions drawn from a symmetric
  Dirichlet distribution, by flwr-datasets. At alpha = 0.1 a client has few classes, at 10 all of
  them evenly (Yurochkin et al., ICML 2019, arXiv 1905.12022).
- *column:name*: a client for each value of a column; its images are those with the value.

With ``clients-per-task`` the classes are cut into tasks first, and each task is dealt by itself.
The test images of a class go to the clients that train on it, in proportion to their training
images. So no client is tested on a class that it does not own, and each image has one client.
"""

from __future__ import annotations

import hashlib
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedcompo.config.data import CLASSES, COLUMN, IID, DataConfig
from fedcompo.data.catalogue import Catalogue
from fedcompo.data.draws import (
    Indices,
    cap_members,
    deal_classes,
    draw_classes,
    frozen_generator,
    split_class,
)
from fedcompo.data.sources.kinds import catalogue_of, own_clients
from fedcompo.data.tasks import member_name
from fedcompo.errors import DataError
from fedcompo.seeds import derive_seed

Part = tuple[Indices, Indices]
"""A member's training images and test images."""
FEWEST = 10
"""Training images below which the draw of a client's share is repeated, ten times at most."""
ADVICE = (
    "Set fewer clients (`num-tasks`, `clients-per-task`), keep more images, or set a larger alpha "
    "in `partition = dirichlet:<alpha>`."
)


def client_names(source: DataConfig) -> tuple[str, ...]:
    """Name the clients that a source yields: those it has of itself, else its parts.

    Raises:
        DataError: If the source is unknown or cannot be read, or cannot be cut this way.
    """
    return names_in(source, own_clients(source.data))


def names_in(source: DataConfig, own: tuple[str, ...]) -> tuple[str, ...]:
    """Name the clients, given those that the source has of itself."""
    if own and source.rule != CLASSES:
        raise DataError(
            f"`partition` is {source.partition!r}, but {source.data} says itself who its "
            "clients are. Leave `partition` out."
        )
    if source.rule == COLUMN:
        return values_of(catalogue_of(source.data), source)
    return own or member_names(source)


def member_names(config: DataConfig) -> tuple[str, ...]:
    """Name the members that a source is dealt to, task by task; not of ``column``."""
    if not config.clients_per_task:
        return tuple(f"client-{number}" for number in range(config.num_tasks))
    return tuple(
        member_name(f"client-{number}", task)
        for task in range(config.num_tasks)
        for number in range(config.clients_per_task)
    )


def values_of(catalogue: Catalogue, config: DataConfig) -> tuple[str, ...]:
    """Return the sorted values of the column that ``partition`` names: the clients' names.

    Raises:
        DataError: If there is no such column, or an image has no value in it.
    """
    values = tuple(str(value) for value in np.unique(_column(catalogue, config)))
    if not all(values):
        raise DataError(
            f"{catalogue.source} has images without a value in the column {config.option!r}, which "
            "names their client. Fill it in, or take these images out."
        )
    return values


def part_for(member: str, catalogue: Catalogue, config: DataConfig, *, seed: int) -> Catalogue:
    """Return the catalogue of a member's images alone.

    Args:
        member: One of the members' names.
        catalogue: The whole source.
        config: How it is dealt; not by ``classes``.
        seed: Seed of the run. The same seed gives the same parts in every process.

    Raises:
        DataError: If the source cannot be dealt this way.
    """
    if config.rule == COLUMN:
        kept = draw_classes(catalogue.names, config.num_classes, seed=seed)
        own = (_column(catalogue, config) == member) & np.isin(catalogue.classes, kept)
        if not own.any():
            raise DataError(f"Client {member!r}: no image of the classes kept (`num-classes`).")
        return catalogue.part(np.flatnonzero(own))
    train, test = _dealt(catalogue, config, seed)[member]
    part = catalogue.part(np.concatenate([train, test]))
    return replace(part, is_test=np.arange(len(train) + len(test)) >= len(train))


def _column(catalogue: Catalogue, config: DataConfig) -> NDArray[np.str_]:
    """Values of the column that ``partition`` names, (count,), written as clients' names are."""
    if config.option not in catalogue.columns:
        there = ", ".join(sorted(catalogue.columns)) or "none"
        raise DataError(
            f"`partition` names the column {config.option!r}, which {catalogue.source} does not "
            f"have; its columns: {there}."
        )
    values, inverse = np.unique(catalogue.columns[config.option], return_inverse=True)
    return np.array([unicodedata.normalize("NFC", str(value).strip()) for value in values])[inverse]


_KEPT: dict[str, dict[str, Part]] = {}
"""The last deal: a process asks for the parts of all its clients, phase after phase."""


def _dealt(catalogue: Catalogue, config: DataConfig, seed: int) -> dict[str, Part]:
    """Deal all images; returns indices of each member's, by name."""
    about = repr((config, seed, catalogue.source)).encode()
    marks = b"" if catalogue.is_test is None else catalogue.is_test.tobytes()
    key = hashlib.sha256(about + marks + catalogue.classes.tobytes()).hexdigest()
    if (dealt := _KEPT.get(key)) is None:
        _KEPT.clear()
        dealt = _KEPT[key] = _deal(catalogue, config, seed)
    return dealt


def _deal(catalogue: Catalogue, config: DataConfig, seed: int) -> dict[str, Part]:
    """Deal all images; raises ``DataError`` if a client would have none to train or to test on."""
    tasks = deal_classes(
        catalogue.names,
        config.num_tasks if config.clients_per_task else 1,
        num_classes=config.num_classes,
        seed=seed,
        source=catalogue.source,
    )
    clients = config.clients_per_task or config.num_tasks
    parts = [
        part
        for number, classes in enumerate(tasks)
        for part in _deal_task(catalogue, classes, clients, config, seed, f"task {number}")
    ]
    dealt = dict(zip(member_names(config), parts, strict=True))
    if empty := [member for member, part in dealt.items() if not all(map(len, part))]:
        member, (train, test) = empty[0], dealt[empty[0]]
        raise DataError(
            f"Client {member!r} gets {len(train)} training and {len(test)} test images of "
            f"{catalogue.source} by `partition = {config.partition}`; {len(empty)} of {len(dealt)} "
            f"clients lack the one or the other. {ADVICE}"
        )
    return dealt


def _deal_task(
    catalogue: Catalogue,
    classes: Sequence[str],
    clients: int,
    config: DataConfig,
    seed: int,
    task: str,
) -> list[Part]:
    """Deal the images of some classes to so many clients."""
    train: dict[str, Indices] = {}
    test: dict[str, Indices] = {}
    for name in classes:
        own, test[name] = split_class(catalogue, name, client="", seed=seed)
        draw = frozen_generator(seed, "subset", name)
        train[name] = cap_members(own, config.images_per_class, draw=draw)
    together = np.concatenate([train[name] for name in classes])
    order = frozen_generator(seed, "partition", task).permutation(together)
    if config.rule == IID:
        shares = np.array_split(order, clients)
    else:
        alpha, own_seed = float(config.option), derive_seed(seed, "data", "dirichlet", task)
        shares = _dirichlet(order, catalogue.classes[order], clients, alpha=alpha, seed=own_seed)
    tests = [
        in_proportion(
            frozen_generator(seed, "partition-test", name).permutation(test[name]),
            [int(np.isin(share, train[name]).sum()) for share in shares],
        )
        for name in classes
    ]
    return [
        (np.sort(share), np.sort(np.concatenate(tested)))
        for share, tested in zip(shares, zip(*tests, strict=True), strict=True)
    ]


def in_proportion(members: Indices, counts: Sequence[int]) -> list[Indices]:
    """Divide images in proportion to counts, as evenly as whole images allow.

    Args:
        members: Indices, (count,), in the order in which they are dealt.
        counts: Of each part, >= 0, not all 0.

    Returns:
        Indices of each part; none of a part whose count is 0.
    """
    ends = np.rint(np.cumsum(counts) / sum(counts) * len(members)).astype(int)
    return np.split(members, ends[:-1])


def _dirichlet(
    images: Indices, classes: NDArray[np.str_], clients: int, *, alpha: float, seed: int
) -> list[Indices]:
    """Divide images by flwr-datasets' ``DirichletPartitioner``."""
    try:
        from datasets import Dataset
        from flwr_datasets.partitioner import DirichletPartitioner
    except ImportError as error:
        raise DataError(
            "`partition = dirichlet` needs flwr-datasets, which is not installed. Install it: "
            'pip install "fedcompo[datasets]", or use `partition = iid`.'
        ) from error
    least = min(FEWEST, len(images) // clients)
    _, labels = np.unique(classes, return_inverse=True)
    partitioner = DirichletPartitioner(
        num_partitions=clients,
        partition_by="label",
        alpha=alpha,
        min_partition_size=least,
        shuffle=False,
        seed=seed,
    )
    partitioner.dataset = Dataset.from_dict({"image": images, "label": labels})
    try:
        with warnings.catch_warnings(action="ignore"):  # of each draw that is repeated
            return [
                np.array(partitioner.load_partition(number)["image"]) for number in range(clients)
            ]
    except ValueError as error:
        raise DataError(
            f"`partition = dirichlet:{alpha:g}` leaves one of {clients} clients with fewer than "
            f"{least} of {len(images)} training images, in eleven draws. {ADVICE}"
        ) from error
