"""Check one client's examples before a run, in seconds: what cannot be read, and how fast it goes.

All files are looked up; then headers are read in random order, pixels of some files, and contents
of test files as long as a training file, each for as long as there is time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fedcompo.backbone.preprocessing import Modality, Preprocessing
from fedcompo.data.catalogue import Catalogue
from fedcompo.data.client_data import Share
from fedcompo.data.draws import Indices, frozen_generator
from fedcompo.data.pictures import kind_of, opened_picture
from fedcompo.report.pictures import WIDE
from fedcompo.report.twins import few


@dataclass(frozen=True)
class Checked:
    """What was found in one client's examples."""

    size: int
    """Bytes of its files; 0: they are none, or one file of all clients."""
    headers: int
    """Number of examples of which at least the header was read."""
    read: int
    """Number of examples that were read whole."""
    rate: float
    """Examples read and resized a second, by one process; infinite: none was read."""
    unreadable: tuple[str, ...]
    """Names of the examples that cannot be read, each with the reason."""
    repeated: int
    """Number of test files that are training files too, of those that were compared."""


@dataclass(frozen=True)
class Amount:
    """What one client owns: its images and classes."""

    train: int
    aside: int
    """Of the training images, those kept aside."""
    test: int
    classes: int
    rate: float
    """Images read a second; infinite: no time."""


def check_examples(share: Share, preprocessing: Preprocessing | None, *, seconds: float) -> Checked:
    """Check the examples of one client.

    Args:
        share: Which they are.
        preprocessing: Input of the backbone, to which those that are read whole are resized.
        seconds: Time for each of the three steps, at most; infinite: check all examples.
    """
    catalogue = share.catalogue
    train, test = np.concatenate(share.train), np.concatenate(share.test)
    draw = frozen_generator(0, "check", share.name)
    order = draw.permutation(np.concatenate([train, test])).tolist()
    faults: dict[int, str] = {}
    lengths: dict[int, int] = {}
    file = catalogue.file
    for index in order:
        try:
            if file:
                lengths[index] = Path(file(index)).stat().st_size
        except OSError as error:
            faults[index] = error.strerror or str(error)
    headers = 0
    for index in _in_time(order, seconds if lengths else 0.0):
        headers += 1
        if index not in faults and (fault := _fault_in_header(catalogue, index)):
            faults[index] = fault
    read, spent = 0, 0.0
    for index in _in_time([i for i in order if i not in faults], seconds):
        began = time.perf_counter()
        if fault := _fault(catalogue, index, preprocessing):
            faults[index] = fault
        read, spent = read + 1, spent + time.perf_counter() - began
    return Checked(
        size=sum(lengths.values()),
        headers=max(headers, read),
        read=read,
        rate=read / spent if spent else float("inf"),
        unreadable=tuple(f"{catalogue.describe(i)}: {faults[i]}" for i in sorted(faults)),
        repeated=_repeated(catalogue, train, test, lengths, seconds),
    )


def fault_of(checked: Checked, share: Share) -> str:
    """Say what cannot be read, and what to do; empty if nothing is known."""
    if not checked.unreadable:
        return ""
    listed = few([*checked.unreadable], between="\n  - ")
    return (
        f"Client {share.name!r}: {len(checked.unreadable)} of {checked.headers} examples looked at "
        f"in {share.catalogue.source} cannot be read:\n  - {listed}\nRepair them, save them as PNG "
        "with 8 bits a channel, or take them out; images are never skipped."
    )


def _in_time(indices: Sequence[int], seconds: float) -> Iterator[int]:
    """Yield the indices, as long as there is time; the first in any case, unless there is none."""
    until = time.perf_counter() + seconds
    for index in indices if seconds > 0 else ():
        yield index
        if time.perf_counter() > until:
            return


def _fault_in_header(catalogue: Catalogue, index: int) -> str:
    if catalogue.file is None or catalogue.modality is Modality.TEXTS:
        return ""
    try:
        with Image.open(catalogue.file(index)):
            return ""
    except UnidentifiedImageError:
        return _fault(catalogue, index, None)  # it is no picture, or one that Pillow does not know
    except Exception as error:  # Pillow's plugins raise errors of every kind
        return str(error) or type(error).__name__


def _fault(catalogue: Catalogue, index: int, preprocessing: Preprocessing | None) -> str:
    """Read an example whole, and resize it; returns why that cannot be done."""
    fits = preprocessing is not None and preprocessing.modality == catalogue.modality
    seen = preprocessing if fits else None

    def read() -> None:
        example = catalogue.open(index)
        if catalogue.modality is Modality.PICTURES:
            picture = opened_picture(example) if isinstance(example, bytes) else example
            if seen:
                seen.reduce(picture)
            picture.load()
            if kind_of(picture) in WIDE.values():  # which a run scales first, by all pictures
                return
            example = picture
        if seen:
            seen.prepare(example)

    return _reason_of(read)


def _reason_of(read: Callable[[], object]) -> str:
    """Why something cannot be read; empty if it can."""
    try:
        read()
    except Exception as error:  # of Pillow's decoders, of every kind
        return str(error) or type(error).__name__
    return ""


def _repeated(
    catalogue: Catalogue,
    train: Indices,
    test: Indices,
    lengths: dict[int, int],
    seconds: float,
) -> int:
    """Count test files whose content a training file has too; only equally long ones are read."""
    known: dict[int, list[int]] = {}
    for index in map(int, train):
        if index in lengths:
            known.setdefault(lengths[index], []).append(index)
    suspects = [int(i) for i in test if known.get(lengths.get(int(i), -1))]
    digest = lru_cache(maxsize=None)(lambda index: _digest(catalogue, index))
    return sum(
        any(digest(own) == digest(index) for own in known[lengths[index]])
        for index in _in_time(suspects, seconds)
    )


def _digest(catalogue: Catalogue, index: int) -> bytes:
    try:
        content = catalogue.open(index)
    except Exception:  # told of above
        return index.to_bytes(8, "big")
    return sha256(content).digest() if isinstance(content, bytes) else index.to_bytes(8, "big")
