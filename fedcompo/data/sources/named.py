"""A data set that needs no file and no network: scikit-learn's digits."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedcompo.data.catalogue import Catalogue
from fedcompo.data.draws import frozen_generator, split_members

DIGITS_SEED = 0
"""Seed of the split of digits; fixed, so that all runs are tested on the same images."""
DIGITS_TEST_SHARE = 0.25


@functools.cache  # the file takes longer to read than a small model to train on it
def digits_catalogue() -> Catalogue:
    """List scikit-learn's 1797 handwritten digits, 8 x 8 pixels, classes "0" to "9".

    A fixed 25 % of each class are test images.
    """
    images, labels = _digits()
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # (count, 8, 8)
    classes = labels.astype(np.int64).astype(np.str_)
    is_test = np.zeros(len(classes), dtype=bool)
    for name in np.unique(classes):
        draw = frozen_generator(DIGITS_SEED, "split", str(name))
        members = np.flatnonzero(classes == name)
        is_test[split_members(members, share=DIGITS_TEST_SHARE, draw=draw)[1]] = True
    return Catalogue(
        source="digits",
        classes=classes,
        is_test=is_test,
        open=lambda index: Image.fromarray(pixels[index]),
    )


def _digits() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Read scikit-learn's file of digits; to import it as well takes a second."""
    package = find_spec("sklearn")
    for folder in package.submodule_search_locations or () if package else ():
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")  # (count, 64 pixels and the label)
            return table[:, :-1], table[:, -1]
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return images, labels
