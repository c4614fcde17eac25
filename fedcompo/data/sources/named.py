"""A data set that needs no file and no network: scikit-learn's digits."""

from __future__ import annotations

import functools

import numpy as np
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
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # (count, 8, 8)
    classes = labels.astype(np.str_)
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
