"""Divide a client's training images into shards, each of which trains a task vector of its own.

Every shard has its share of each class, and all images of a group (a patient) are in one shard. So
what is known of a patient leaves exactly when that shard is removed; and the others stay as they
are. All shards are tested on the same images, those of the client.

Which image is in which shard is written to a map, a CSV file that only its owner can read::

    shard,sample,group
    0,train/cat/4711.png,patient-17
    test,train/cat/4712.png,patient-3

A *sample* is an image's file, seen from the client's folder or table, or else the SHA-256 of its
content. The map is read again in the next run. So images stay where they are when others are
deleted, new ones are dealt to the smaller shards, and those drawn as test images (``test``) stay
test images. Images with the same content go the same way. The map never leaves the client.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import count as numbers
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fedcompo.data.catalogue import Catalogue
from fedcompo.data.client_data import Share, drawn_aside
from fedcompo.data.draws import cap_members, frozen_generator
from fedcompo.data.sources.columns import GROUP, called, pick
from fedcompo.errors import DataError
from fedcompo.storage.files import replaced, write_private

COLUMNS = ["shard", "sample", "group"]
TEST = "test"
"""What the map says of an image that was drawn as a test image."""
Places = Mapping[str, str]
"""The map: a shard's number, or ``test``, by sample."""


def maps_beside(registry: Path) -> Path:
    """Folder of a simulation's maps, beside its registry, where the audit finds them."""
    return registry.with_name(f"{registry.name}.shards")


def dealt(
    share: Share, shards: int, *, seed: int, cap: int, needed: int, file: Path
) -> tuple[Share, Tensor]:
    """Deal a client's training images to shards, as its map says; write the map.

    Args:
        share: What the client owns, as it is drawn without shards.
        shards: How many, at least 2.
        seed: Seed of the run; decides the order in which images are dealt.
        cap: Training images a class, at most; 0: all.
        needed: Images of each class that a shard needs when it is first dealt.
        file: The map.

    Returns:
        What the client owns, with the test images of the map; and the shard of each training image,
        (count,), int64.

    Raises:
        DataError: If a shard gets too few images; if the map cannot be read, or is of other shards
            or images; if several columns may be that of the groups.
    """
    catalogue, samples, groups = share.catalogue, _samples(share), _groups(share.catalogue)
    known = _known(file, shards, {*samples.values()})
    tests = np.concatenate(share.test).tolist() if catalogue.is_test is None else []
    drawn = dict.fromkeys((samples[i] for i in tests), TEST)
    share = _as_known(share, known or drawn, samples, cap=cap, seed=seed)
    train = np.concatenate(share.train).tolist()
    placed = {i: int(known[samples[i]]) for i in train if known.get(samples[i], TEST) != TEST}
    order = frozen_generator(seed, "shards", share.name).permutation(len(train))
    units = _together([train[place] for place in order], samples, groups)
    place = _deal(units, catalogue.classes, shards, placed)
    if not known:
        _check_enough(share, units, shards, place, needed)
    places = {**(known or drawn), **{samples[i]: str(place[i]) for i in train}}
    _write(file, places, {samples[i]: groups[i] for i in samples})
    return share, torch.tensor([place[i] for i in train])


def _together(
    images: Sequence[int], samples: Mapping[int, str], groups: Sequence[str]
) -> list[list[int]]:
    """Join images of one group, and those with the same content; the largest unit comes first."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    _, content = np.unique([samples[i] for i in images], return_inverse=True)
    named = [f"group {groups[i]}" if groups[i] else f"sample {samples[i]}" for i in images]
    _, group = np.unique(named, return_inverse=True)
    count = len(images)
    edges = coo_array((np.ones(count), (content, count + group)), shape=(2 * count, 2 * count))
    _, unit_of = connected_components(edges, directed=False)
    units: dict[int, list[int]] = {}
    for i, unit in zip(images, unit_of[content], strict=True):
        units.setdefault(unit, []).append(i)
    return sorted(units.values(), key=len, reverse=True)


def needed_for(least: int, *, aside: float) -> int:
    """Return how many images of a class leave ``least`` to train on, and at least one."""
    least = max(1, least)
    of_one_class = (torch.zeros(images, dtype=torch.int64) for images in numbers(least))
    return next(
        len(labels)
        for labels in of_one_class
        if int((~drawn_aside(labels, share=aside, seed=0, client="")).sum()) >= least
    )


def _deal(
    units: Iterable[Sequence[int]],
    classes: NDArray[np.str_],
    shards: int,
    placed: Mapping[int, int],
) -> dict[int, int]:
    """Deal what belongs together to the shard that has fewest images of its classes.

    What has a place keeps it, and draws what belongs to it there.
    """
    place, counts = dict(placed), [Counter[str]() for _ in range(shards)]
    for i, shard in placed.items():
        counts[shard][str(classes[i])] += 1
    for unit in units:
        own = Counter(str(classes[i]) for i in unit if i not in place)
        there = [place[i] for i in unit if i in place]

        def full(shard: int, own: Counter[str] = own) -> tuple[int, int, int]:
            alike = sum(n * counts[shard][name] for name, n in own.items())
            return alike, counts[shard].total(), shard

        shard = min(there) if there else min(range(shards), key=full)
        counts[shard].update(own)
        for i in unit:
            place.setdefault(i, shard)
    return place


def _check_enough(
    share: Share, units: Sequence[Sequence[int]], shards: int, place: Mapping[int, int], needed: int
) -> None:
    """Refuse shards with too few images of a class; the error says how many there could be."""
    classes = share.catalogue.classes

    def fewest(place: Mapping[int, int], shards: int) -> tuple[int, str]:
        there = Counter((str(classes[i]), shard) for i, shard in place.items())
        return min((there[name, s], name) for name in share.classes for s in range(shards))

    if (found := fewest(place, shards))[0] >= needed:
        return
    parts = Counter(name for unit in units for name in {str(classes[i]) for i in unit})
    images = Counter(str(classes[i]) for i in place)
    bound = min(min(parts[name], images[name] // needed) for name in share.classes)
    fitting = (k for k in range(min(bound, shards - 1), 1, -1))
    most = next((k for k in fitting if fewest(_deal(units, classes, k, {}), k)[0] >= needed), 1)
    raise DataError(
        f"Client {share.name!r}: of {shards} shards, one would have {found[0]} training images of "
        f"class {found[1]!r}, and needs {needed} (`min-images`, and those kept aside, `aside`). "
        f"Its images allow {most} shard(s), as those of a `{GROUP}` stay together: set `shards` "
        f"to {most}, or add images.",
        told=f"`shards` is {shards}, and the client's images allow {most}",
    )


def _as_known(
    share: Share, known: Places, samples: Mapping[int, str], *, cap: int, seed: int
) -> Share:
    """Choose training and test images as the map says; images that it does not know train."""
    catalogue, train, test = share.catalogue, [], []
    for own, drawn in zip(share.classes, share.test, strict=True):
        members = np.flatnonzero(catalogue.classes == own)
        where = np.array([known.get(samples[i], "") for i in members.tolist()])
        marked = np.isin(members, drawn) if catalogue.is_test is not None else where == TEST
        old, fresh = members[~marked & (where != "")], members[~marked & (where == "")]
        draw = frozen_generator(seed, "subset", own)
        if cap:
            old = cap_members(old, cap, draw=draw)
            room = cap - len(old)
            fresh = cap_members(fresh, room, draw=draw) if room else fresh[:0]
        train.append(np.sort(np.concatenate([old, fresh])))
        test.append(members[marked])
    return replace(share, train=train, test=test)


def _samples(share: Share) -> dict[int, str]:
    """Name images for people and for the next run, by index: all files, or those of the classes."""
    catalogue = share.catalogue
    if catalogue.file is None:
        own = np.flatnonzero(np.isin(catalogue.classes, share.classes))
        return {i: _digest(catalogue, i) for i in own.tolist()}
    home = Path(catalogue.source)
    home = home if home.is_dir() else home.parent
    files = ((i, catalogue.file(i)) for i in range(len(catalogue.classes)))
    return {i: str(f.relative_to(home) if f.is_relative_to(home) else f) for i, f in files}


def _digest(catalogue: Catalogue, index: int) -> str:
    """SHA-256 of an example that has no file of its own."""
    try:
        content = catalogue.open(index)
        data = content.tobytes() if isinstance(content, Image.Image) else bytes(content)
    except Exception as error:  # Pillow's plugins raise errors of every kind
        raise DataError(
            f"{catalogue.describe(index)} of {catalogue.source} cannot be read: {error}",
            told="an image cannot be read",
        ) from error
    return f"sha256:{sha256(data).hexdigest()}"


def _groups(catalogue: Catalogue) -> Sequence[str]:
    """The group of each image; empty: none."""
    columns = [*catalogue.columns]
    there, source = called(GROUP, columns), catalogue.source
    column = pick(GROUP, there, chosen={}, columns=columns, source=source, needed=False)
    if not column:
        return [""] * len(catalogue.classes)
    return [str(value).strip() for value in catalogue.columns[column]]


def _known(file: Path, shards: int, there: set[str]) -> dict[str, str]:
    """Read what a map says of the samples that are there; empty if there is no map yet."""
    try:
        text = file.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"The map of shards {file} cannot be read: {error}.") from error
    known: dict[str, str] = {}
    rows = csv.reader(io.StringIO(text, newline=""))
    header = next(rows, [])
    for line, row in enumerate(rows, start=2):
        where, sample = row[:2] if len(row) == len(COLUMNS) else ("", "")
        in_range = where == TEST or (where.isdecimal() and int(where) < shards)
        if header != COLUMNS or not in_range or sample in known:
            raise DataError(
                f"{file}, row {line}, is {row}, expected {', '.join(COLUMNS)}: a shard below "
                f"{shards} or {TEST!r}, and a sample, each once. Restore the map from a copy; "
                "without it, images are dealt anew, and removing a shard may miss some.",
                told="its map of shards is damaged",
            )
        known[sample] = where
    if known and not known.keys() & there:
        raise DataError(
            f"None of the images of the map of shards {file} is there: it is of other images, or "
            "their paths have changed. Correct the paths here or in the map; move it away if this "
            "client has never had these shards.",
            told="its map of shards is of other images",
        )
    return {sample: where for sample, where in known.items() if sample in there}


def _write(file: Path, places: Places, groups: Mapping[str, str]) -> None:
    """Replace a map, unless it says the same; only this user can read it."""
    rows = sorted((where, sample, groups.get(sample, "")) for sample, where in places.items())
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    data = text.getvalue().encode("utf-8", "surrogateescape")
    if file.exists() and file.read_bytes() == data:
        return
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with replaced(file) as temporary:
        write_private(temporary, data)
