"""Check one client's examples before a run, in seconds: what cannot be read, and how fast it goes.

All files are looked up; then headers are read in random order, and examples whole, each for as long
as there is time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.choices import Modality
from fedcompo.data.catalogue import Catalogue
from fedcompo.data.client_data import Share
from fedcompo.data.decoding import Reader
from fedcompo.data.draws import frozen_generator
from fedcompo.data.pictures import opened_picture


@dataclass(frozen=True)
class Checked:
    """What was found in one client's examples."""

    size: int
    """Bytes of its files; 0: they are none, or one file of all clients."""
    headers: int
    """Number of examples of which at least the header was read."""
    read: int
    """Number of examples that were read whole, and resized."""
    seconds: float
    """How long that took, in one thread."""
    faults: dict[int, str]
    """Why examples cannot be read, with their names; by index."""


def check_examples(share: Share, preprocessing: Preprocessing | None, *, seconds: float) -> Checked:
    """Check the examples of one client.

    Args:
        share: Which they are.
        preprocessing: Input of the backbone, which reads such examples; None: read headers alone.
        seconds: Time for headers, and for whole examples, at most; infinite: check all.
    """
    catalogue, faults, size = share.catalogue, dict[int, str](), 0
    drawn = frozen_generator(0, "check", share.name)
    order = drawn.permutation(np.concatenate([*share.train, *share.test]))
    if catalogue.file:
        for index in order.tolist():
            with _noting(faults, catalogue, index):
                size += catalogue.file(index).stat().st_size
    of_files = catalogue.file and catalogue.modality is Modality.PICTURES
    headers = read = 0
    for index in _in_time(order.tolist(), seconds if of_files else 0):
        headers += 1
        with _noting(faults, catalogue, index):
            _read_header(catalogue, index)
    began = time.perf_counter()
    if preprocessing:
        reader = Reader(catalogue, order, "", preprocessing, 0)
        for row in _in_time(range(len(order)), seconds):
            read += 1
            if fault := reader.example(row, {}).fault:
                faults[int(order[row])] = fault
    spent = time.perf_counter() - began if read else 0.0
    return Checked(size, max(headers, read), read, spent, faults)


@contextmanager
def _noting(faults: dict[int, str], catalogue: Catalogue, index: int) -> Iterator[None]:
    """Note why an example cannot be read."""
    try:
        yield
    except Exception as error:  # Pillow's plugins raise errors of every kind
        reason = getattr(error, "strerror", "") or str(error) or type(error).__name__
        faults[index] = f"{catalogue.describe(index)}: {reason}"


def _in_time(values: Sequence[int], seconds: float) -> Iterator[int]:
    """Yield values as long as there is time; the first in any case, unless there is none."""
    until = time.perf_counter() + seconds
    for value in values if seconds > 0 else ():
        yield value
        if time.perf_counter() > until:
            return


def _read_header(catalogue: Catalogue, index: int) -> None:
    assert catalogue.file
    try:
        Image.open(catalogue.file(index)).close()
    except UnidentifiedImageError:  # it is no picture, or one that Pillow does not know
        opened_picture(cast(bytes, catalogue.open(index)))
