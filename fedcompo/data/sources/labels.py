"""One label an image: names of classes out of a table, and what is no single label."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

import numpy as np
from numpy.typing import NDArray

from fedcompo.data.catalogue import class_name
from fedcompo.errors import DataError
from fedcompo.report.twins import few

MULTI_LABEL = (
    "Several labels an image are not supported: they need a closed-form head and statistics by "
    "label instead of by class, training with binary cross-entropy, and mean AUC and average "
    "precision in place of accuracy. Keep one label an image, such as the main finding, or the "
    "images that have only one."
)
NO_LABEL = ("", "-1", "-1.0", "nan", "<na>", "null")
"""What programs write for an image without a label, in upper or lower case."""


def class_names(
    labels: Sequence[str], *, source: str, which: Callable[[int], object]
) -> NDArray[np.str_]:
    """Normalise the label of each image, (count,), to the name of its class.

    Args:
        labels: The label of each image.
        source: Where they stand, for messages.
        which: Names an image by its index, for messages.

    Raises:
        DataError: If images have no label or several, or if a name cannot be used.
    """
    stripped, inverse = np.unique([label.strip() for label in labels], return_inverse=True)
    kinds = [str(label) for label in stripped]
    missing = np.array([label.casefold() in NO_LABEL for label in kinds])[inverse]
    if missing.any():
        shown = few([str(which(int(index))) for index in np.flatnonzero(missing)])
        raise DataError(
            f"{missing.sum()} of {len(missing)} images in {source} have no label: {shown}. Label "
            "them or take them out; images are never skipped.",
            told=f"{missing.sum()} images have no label",
        )
    known = {*kinds}
    several = np.array([_is_list(label, known) for label in kinds])[inverse]
    if several.any():
        first = int(several.argmax())
        raise DataError(
            f"{several.sum()} of {len(several)} images in {source} have several labels, such as "
            f"{which(first)}: {labels[first]!r}. {MULTI_LABEL}",
            told="images have several labels",
        )
    return np.array([class_name(label, source=source) for label in kinds])[inverse]


def _is_list(label: str, known: Set[str]) -> bool:
    """Tell whether a label lists labels: ``a|b``, ``[a, b]``, or others of the data with commas."""
    if "|" in label or (label.startswith("[") and label.endswith("]")):
        return True
    return any(
        separator in label and all(part.strip() in known for part in label.split(separator))
        for separator in ",;"
    )
