"""Images in one ``.npz`` file, as raw pixels or as packed JPEG files.

Its members::

    labels   (count,)                     integers; (count, 1) and one-hot (count, classes) too
    split    (count,)                     0 train, 1 test; without a 1, test images are drawn
    names    (classes,)                   text by label; if missing, the label is the name
    images   (count, height, width[, 3])  uint8; or instead of it:
    jpeg     (bytes,)                     uint8, image i is jpeg[offsets[i]:offsets[i + 1]]
    offsets  (count + 1,)                 integers

Instead of ``images``, ``labels`` and ``split`` there may be a pair for each part, as MedMNIST
(``train_images``, ``train_labels``, ``val_images``, ...) or Keras (``x_train``, ``y_train``, ...)
call them. Pixels of an uncompressed file are read when they are asked for, those of a compressed
one stay in memory.
"""

from __future__ import annotations

import logging
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from PIL import Image

from fedcompo.data.catalogue import KEPT_BYTES, Catalogue, class_name, version_of
from fedcompo.data.labels import MULTI_LABEL
from fedcompo.data.splits import TEST, TRAIN, WORDS, divided
from fedcompo.errors import DataError

logger = logging.getLogger(__name__)
Array = NDArray[Any]
Opener = Callable[[int], Image.Image | bytes]
UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""Errors of NumPy on files that are no npz, are damaged, or hold pickled objects."""
PAIRS = {
    (f"{word}_images", f"{word}_labels"): part for part, words in WORDS.items() for word in words
} | {(f"x_{word}", f"y_{word}"): part for part, words in WORDS.items() for word in words}
"""Members of the images and labels of a part, as MedMNIST and as Keras call them."""
ALONE = ("split", "names", "offsets")
"""Members that are read where they are needed."""


@dataclass(frozen=True)
class Pixels:
    """A member of uint8, in memory or where it lies in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[int, int], Array]
    """Return the bytes from start to stop, as if there were one dimension."""
    in_memory: int = 0
    """Bytes."""


def npz_catalogue(path: Path) -> Catalogue:
    """List the images of an npz file.

    Args:
        path: The file; see above for its members.

    Raises:
        DataError: If the file is missing, damaged or no npz; if members are missing, have a wrong
            type or contradict each other; if images have several labels or none.
    """
    version = version_of([path])
    members, pixels = _read(path)
    openers, counts, labels = [], [], []
    parts = [
        *(("", "images", "labels") for _ in [0] if "labels" in members),
        *((part, images, own) for (images, own), part in PAIRS.items() if images in pixels),
    ]
    for _, images, own in parts:
        if images in pixels:
            opener, count = _raw_pictures(pixels[images], path)
        else:
            opener, count = _packed_pictures(pixels["jpeg"], members["offsets"], path)
        openers.append(opener)
        counts.append(count)
        labels.append(_labels(members[own], own, count, path))
    if (in_memory := sum(member.in_memory for member in pixels.values())) > KEPT_BYTES:
        logger.warning(
            "%s is compressed: %d MB of pixels are held in memory, and read again for each client. "
            "Saved by numpy.savez, they stay on disk.",
            *(path, in_memory // 10**6),
        )
    starts = np.cumsum([0, *counts])

    def open_picture(index: int) -> Image.Image | bytes:
        part = int(np.searchsorted(starts, index, side="right")) - 1
        return openers[part](index - int(starts[part]))

    if "split" in members:
        split = _flat(members["split"], "split", "iub", counts[0], path)
        if (alien := split[(split != 0) & (split != 1)]).size:
            raise DataError(f"`split` in {path} must be 0 (train) or 1 (test), got {alien[0]}.")
        is_test, marks = divided(np.where(split == 1, TEST, TRAIN))
    else:
        is_test, marks = divided(np.repeat([part for part, *_ in parts], counts))
    return Catalogue(
        source=str(path),
        classes=_class_names(members, np.concatenate(labels), path),
        is_test=is_test,
        open=open_picture,
        version=version,
        marks=marks,
        in_memory=in_memory,
    )


def _read(path: Path) -> tuple[dict[str, Array], dict[str, Pixels]]:
    """Read the members that are small, and find those that hold pixels."""
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("it is no zip archive, or cut short")
        with np.load(path, allow_pickle=False) as archive:
            present = {*archive.files}
            pairs = [pair for pair in PAIRS if present.intersection(pair)]
            large = present & {"images", "jpeg", *(images for images, _ in pairs)}
            small = present & {"labels", *ALONE, *(labels for _, labels in pairs)}
            layout = _layout_fault(present, pairs)
            members = {} if layout else {name: archive[name] for name in sorted(small)}
            pixels = {} if layout else {name: _pixels(path, archive, name) for name in large}
        alien = next((name for name, m in members.items() if not isinstance(m, np.ndarray)), None)
        if alien:
            raise ValueError(f"its member {alien!r} is no array")
    except UNREADABLE as error:
        raise DataError(
            f"{path.absolute()} cannot be read as an npz file ({error}). Expected a file saved by "
            "numpy.savez, without Python objects. Check the path in `data`, or save it again."
        ) from error
    if layout:
        raise DataError(f"{path} {layout}; members found: {', '.join(sorted(present)) or 'none'}.")
    return members, pixels


def _layout_fault(present: set[str], pairs: Sequence[tuple[str, str]]) -> str:
    """Say what is wrong with the names of members; empty: nothing."""
    if pairs and not present & {"images", "jpeg", "labels"}:
        half = next((pair for pair in pairs if not present.issuperset(pair)), None)
        return f"must hold `{half[0]}` and `{half[1]}`" if half else ""
    layouts = [layout for layout in ({"images"}, {"jpeg", "offsets"}) if layout <= present]
    if len(layouts) == 1 and "labels" in present and not pairs:
        return ""
    return (
        "must hold `labels` and either `images` or `jpeg` with `offsets`, or images and labels of "
        "each part as `train_images`, `train_labels` or `x_train`, `y_train`"
    )


def _pixels(path: Path, archive: NpzFile, name: str) -> Pixels:
    """Find where a member's pixels lie; read it if it is compressed, or of another order."""
    entry = archive.zip.getinfo(f"{name}.npy") if archive.zip else None
    if entry is not None and entry.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as file:
            file.seek(entry.header_offset)
            lengths = struct.unpack("<26xHH", file.read(30))  # of the name and of what is extra
            file.seek(sum(lengths), 1)
            old = npy.read_magic(file) == (1, 0)
            header = npy.read_array_header_1_0 if old else npy.read_array_header_2_0
            shape, in_columns, dtype = header(file)
            begin = file.tell()
        if not in_columns and not dtype.hasobject:

            def read(start: int, stop: int) -> Array:
                return np.fromfile(path, np.uint8, count=stop - start, offset=begin + start)

            return Pixels(name, shape, dtype, read)
    array = np.ascontiguousarray(archive[name])
    content = array.reshape(-1)
    return Pixels(name, array.shape, array.dtype, lambda a, b: content[a:b], array.nbytes)


def _raw_pictures(images: Pixels, path: Path) -> tuple[Opener, int]:
    """Return the function that opens image i, and the number of images."""
    shape = images.shape
    fits = len(shape) in (3, 4) and shape[3:] in ((), (1,), (3,))
    expected = "uint8 of shape (count, height, width) or (count, height, width, 3)"
    if len(shape) == 4 and shape[1] in (1, 3):
        expected += ", channels last"
    elif len(shape) in (4, 5):
        expected += ", no volumes, of which you can save slices"
    _require(images.dtype == np.uint8 and fits, images.name, images, expected, path)
    if 0 in shape:
        raise DataError(f"{path} holds no images: `{images.name}` has shape {shape}.")
    one = shape[1:3] if shape[3:] == (1,) else shape[1:]
    size = int(np.prod(one))

    def open_picture(index: int) -> Image.Image:
        return Image.fromarray(images.read(index * size, (index + 1) * size).reshape(one))

    return open_picture, shape[0]


def _packed_pictures(jpeg: Pixels, offsets: Array, path: Path) -> tuple[Opener, int]:
    """Return the function that opens image i of ``jpeg``, and the number of images."""
    fits = jpeg.dtype == np.uint8 and len(jpeg.shape) == 1
    _require(fits, "jpeg", jpeg, "uint8 of shape (bytes,)", path)
    fits = offsets.dtype.kind in "iu" and offsets.ndim == 1
    _require(fits, "offsets", offsets, "integers of shape (count + 1,)", path)
    bounds, total = offsets.astype(np.int64), jpeg.shape[0]
    if len(bounds) < 2:
        raise DataError(f"{path} holds no images: `offsets` has shape {offsets.shape}.")
    if bounds[0] < 0 or bounds[-1] > total or (np.diff(bounds) < 0).any():
        raise DataError(
            f"`offsets` in {path} must ascend from 0 to at most {total}, the length of `jpeg`; "
            f"got {bounds.min()}..{bounds.max()}. The file is damaged or was packed wrongly."
        )
    return lambda i: jpeg.read(int(bounds[i]), int(bounds[i + 1])).tobytes(), len(bounds) - 1


def _labels(values: Array, name: str, count: int, path: Path) -> Array:
    """Return the label of each image, (count,), int64; refuse none and several."""
    if values.ndim == 2 and values.shape[1] != 1:
        single = np.isin(values, (0, 1)).all() and (values.sum(axis=1) == 1).all()
        if not single:
            raise DataError(
                f"`{name}` in {path} has shape {values.shape}, and not one 1 in each row. "
                f"{MULTI_LABEL}",
                told="images have several labels",
            )
        values = values.argmax(axis=1)
    elif values.ndim == 2:
        values = values[:, 0]
    labels = _flat(values, name, "iu", count, path)
    if unlabelled := int((labels < 0).sum()):
        raise DataError(
            f"`{name}` in {path} are negative for {unlabelled} of {count} images (the smallest is "
            f'{labels.min()}), which most programs write for "no label". Take these images out, or '
            "number the classes from 0.",
            told=f"{unlabelled} images have no label",
        )
    return labels


def _flat(values: Array, name: str, kinds: str, count: int, path: Path) -> Array:
    """Check that a member has one integer an image."""
    fits = values.dtype.kind in kinds and values.shape == (count,)
    _require(fits, name, values, f"integers of shape ({count},), one an image", path)
    return values.astype(np.int64)


def _require(fits: bool, name: str, values: Array | Pixels, expected: str, path: Path) -> None:
    if not fits:
        raise DataError(
            f"`{name}` in {path} must be {expected}, got {values.dtype} of shape {values.shape}."
        )


def _class_names(members: Mapping[str, Array], labels: Array, path: Path) -> NDArray[np.str_]:
    """Return the class name of each image, (count,)."""
    if "names" not in members:
        return labels.astype(np.str_)
    names = members["names"]
    fits = names.dtype.kind == "U" and names.ndim == 1
    _require(fits, "names", names, "text of shape (classes,), as of numpy.array(a_list)", path)
    if labels.max() >= len(names):
        raise DataError(
            f"`labels` in {path} reach {labels.max()}, but `names` has {len(names)} "
            f"entries: expected 0..{len(names) - 1}."
        )
    normal = [class_name(str(name), source=str(path)) for name in names]
    twice = next((name for name in normal if normal.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"`names` in {path} holds {twice!r} twice. Give each class its own name.")
    return np.array(normal)[labels]
