"""Data sets known by name: scikit-learn's digits, and CIFAR-100 from the network."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

from fedcompo.data.catalogue import Catalogue, class_name
from fedcompo.data.draws import frozen_generator, split_members
from fedcompo.errors import DataError

DIGITS_SEED = 0
"""Seed of the split of digits; fixed, so that all runs are tested on the same images."""
DIGITS_TEST_SHARE = 0.25
CIFAR_ADVICE = (
    "CIFAR-100 is fetched from the network once. Where there is none, save it as an npz file and "
    "set `data` to npz:<path>."
)


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


def cifar100_catalogue() -> Catalogue:
    """List CIFAR-100, which Flower Datasets fetches from the Hugging Face hub.

    Raises:
        DataError: If flwr-datasets is not installed, or if the images cannot be fetched.
    """
    try:
        from flwr_datasets import FederatedDataset
    except ImportError as error:
        raise DataError(
            "`data` is cifar100, but flwr-datasets is not installed. Install it: "
            f'pip install "fedcompo[cifar]". {CIFAR_ADVICE}'
        ) from error
    try:
        federated = FederatedDataset(
            dataset="uoft-cs/cifar100", partitioners={"train": 1}, shuffle=False
        )
        train, test = (federated.load_split(part) for part in ("train", "test"))
        names = train.features["fine_label"].names
        labels = [*train["fine_label"], *test["fine_label"]]
    except Exception as error:  # network, disk and hub errors of three libraries
        raise DataError(
            f"CIFAR-100 could not be loaded by flwr-datasets ({type(error).__name__}: {error}). "
            f"Check the network and try again. {CIFAR_ADVICE}"
        ) from error
    first_test = len(train["fine_label"])
    classes = np.array([class_name(name, source="cifar100") for name in names])[labels]

    def open_picture(index: int) -> Image.Image:
        part, row = (train, index) if index < first_test else (test, index - first_test)
        picture: Image.Image = part[row]["img"]
        return picture

    return Catalogue(
        source="cifar100",
        classes=classes,
        is_test=np.arange(len(classes)) >= first_test,
        open=open_picture,
    )
