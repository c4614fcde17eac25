"""Data sets that go by a name: scikit-learn's digits, and CIFAR-100 from the network."""

from __future__ import annotations

import functools
import importlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fedcompo.data.catalogue import Catalogue, class_name
from fedcompo.data.draws import generator, split_members
from fedcompo.errors import DataError

DIGITS_SEED = 0
"""Seed of the split of digits: its own, so that all runs are tested on the same images."""
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
        draw = generator(DIGITS_SEED, "split", str(name))
        members = np.flatnonzero(classes == name)
        is_test[split_members(members, share=DIGITS_TEST_SHARE, draw=draw)[1]] = True
    return Catalogue(
        source="digits",
        classes=classes,
        is_test=is_test,
        open=lambda index: Image.fromarray(pixels[index]),
        describe=lambda index: f"image {index} (class {str(classes[index])!r})",
    )


def cifar100_catalogue() -> Catalogue:
    """List CIFAR-100, by Flower Datasets or, if that is not installed, by torchvision.

    Raises:
        DataError: If neither is installed, or if the images cannot be fetched.
    """
    library, fetch = _cifar_library()
    try:
        names, labels, pictures = fetch(library)
    except Exception as error:  # network, disk and hub errors of three libraries
        raise DataError(
            f"CIFAR-100 could not be loaded by {library.__name__} "
            f"({type(error).__name__}: {error}). Check the network and try again. {CIFAR_ADVICE}"
        ) from error
    normal = np.array([class_name(name, source="cifar100") for name in names])
    train, test = labels
    classes = normal[np.array([*train, *test], dtype=np.int64)]

    def open_picture(index: int) -> Image.Image:
        part, row = (0, index) if index < len(train) else (1, index - len(train))
        picture: Image.Image = pictures[part](row)
        return picture

    return Catalogue(
        source="cifar100",
        classes=classes,
        is_test=np.arange(len(classes)) >= len(train),
        open=open_picture,
        describe=lambda index: f"image {index} (class {str(classes[index])!r})",
    )


def _cifar_library() -> tuple[Any, Any]:
    """Return the library that is installed, and the function that fetches with it."""
    for name, fetch in (
        ("flwr_datasets", _with_flower),
        ("torchvision.datasets", _with_torchvision),
    ):
        try:
            return importlib.import_module(name), fetch
        except ImportError:
            continue
    raise DataError(
        "`data` is cifar100, but neither flwr-datasets nor torchvision is installed. Install one: "
        f'pip install "fedcompo[cifar]". {CIFAR_ADVICE}'
    )


def _with_flower(library: Any) -> tuple[Any, Any, Any]:
    """Return class names, (train, test) labels, and for each part a function that opens a row."""
    federated = library.FederatedDataset(
        dataset="uoft-cs/cifar100", partitioners={"train": 1}, shuffle=False
    )
    parts = [federated.load_split(part) for part in ("train", "test")]
    names = parts[0].features["fine_label"].names
    labels = [list(part["fine_label"]) for part in parts]
    return names, labels, [lambda row, part=part: part[row]["img"] for part in parts]


def _with_torchvision(library: Any) -> tuple[Any, Any, Any]:
    """Do the same with torchvision, which checks the files it fetched by their MD5 sums."""
    root = Path(torch.hub.get_dir()).parent / "fedcompo"
    kept = root / library.CIFAR100.base_folder
    if not kept.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        # Clients of a simulation may fetch at the same time: each to its own folder, one wins.
        with tempfile.TemporaryDirectory(dir=root) as folder:
            library.CIFAR100(folder, download=True)
            try:
                (Path(folder) / kept.name).rename(kept)
            except OSError:
                if not kept.is_dir():
                    raise
    try:
        parts = [library.CIFAR100(str(root), train=train) for train in (True, False)]
    except RuntimeError as error:
        raise RuntimeError(f"{kept} is damaged; delete it to fetch it anew") from error
    labels = [part.targets for part in parts]
    return parts[0].classes, labels, [lambda row, part=part: part[row][0] for part in parts]
