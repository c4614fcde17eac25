"""Which images are for training and which for testing, in the words that data sets use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedcompo.errors import DataError
from fedcompo.report.pictures import JOINED, STAND_IN

TRAIN, TEST, VALIDATION = "train", "test", "validation"
WORDS = {
    TRAIN: ("train", "training", "trn"),
    TEST: ("test", "testing", "tst"),
    VALIDATION: ("val", "valid", "validation", "dev"),
}
"""What a part is called, in upper or lower case."""

Marks = dict[str, NDArray[np.bool_]]


def part_called(word: str) -> str:
    """Return the part that a word stands for, or an empty text."""
    return next((part for part, words in WORDS.items() if word.strip().casefold() in words), "")


def split_of(
    cells: Sequence[str] | None, *, source: str, which: Callable[[int], object]
) -> tuple[NDArray[np.bool_] | None, Marks]:
    """Decide which images are test images, given what a table says of each; see :func:`divided`.

    Args:
        cells: A word for each, or an empty text for all; None: the table does not say.
        source: Where they stand, for messages.
        which: Names an image by its index, for messages.

    Raises:
        DataError: If a word is unknown, or some have none.
    """
    if cells is None or not any(map(str.strip, cells)):
        return None, {}
    parts = [*map(part_called, cells)]
    if "" in parts:
        first = parts.index("")
        known = ", ".join(word for words in WORDS.values() for word in words)
        raise DataError(
            f"The split of {parts.count('')} of {len(parts)} rows in {source} is unknown, such as "
            f"{cells[first]!r} in {which(first)}. Expected one of {known}, in all rows or none."
        )
    return divided(parts)


def divided(parts: Iterable[str]) -> tuple[NDArray[np.bool_] | None, Marks]:
    """Decide which images are test images, given the part of each.

    Validation images are test images where there are no others, and else training images: what a
    run needs to validate on, it keeps aside of the training images itself (``aside``).

    Returns:
        Whether each is a test image, (count,); None: they must be drawn. Then what is to be noted.
    """
    own = np.array(list(parts))
    test, validation = own == TEST, own == VALIDATION
    if not validation.any():
        return (test if test.any() else None), {}
    return (test, {JOINED: validation}) if test.any() else (validation, {STAND_IN: validation})
