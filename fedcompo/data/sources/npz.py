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

import functools
import logging
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from fedcompo.data.catalogue import KEPT_BYTES, Catalogue, class_name, places, version_of
from fedcompo.data.sources.labels import MULTI_LABEL
from fedcompo.data.sources.splits import TEST, TRAIN, WORDS, divided
from fedcompo.errors import DataError

logger = logging.getLogger(__name__)
Array = NDArray[Any]
Member = Callable[[], Array]
"""Opens a member with pixels: the array in memory, or one mapped to where it lies in the file.

A mapping is opened for each image, so that pages once read do not stay, and a file that was cut
short meanwhile is an error.
"""
Opener = Callable[[int], Image.Image | bytes]
UNREADABLE = (
    *(OSError, EOFError, ValueError, RuntimeError, KeyError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
"""Errors of NumPy on files that are no npz, are damaged, or hold pickled objects."""
PAIRS = {
    pair: part
    for part, words in WORDS.items()
    for word in words
    for pair in ((f"{word}_images", f"{word}_labels"), (f"x_{word}", f"y_{word}"))
}
"""Members of the images and labels of a part, as MedMNIST and as Keras call them."""


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
    pairs = {pair: part for pair, part in PAIRS.items() if pair[0] in pixels}
    pairs = pairs or {("images" if "images" in pixels else "jpeg", "labels"): ""}
    openers, labels = [], []
    for images, name in pairs:
        if images == "jpeg":
            opener, count = _packed_pictures(pixels[images], members["offsets"], path)
        else:
            opener, count = _raw_pictures(images, pixels[images], path)
        openers.append(opener)
        labels.append(_labels(members[name], name, count, path))
    arrays = [member() for member in pixels.values()]
    in_memory = sum(array.nbytes for array in arrays if not isinstance(array, np.memmap))
    if in_memory > KEPT_BYTES:
        logger.warning(
            "%s is compressed: %d MB of pixels are held in memory, and read again for each client. "
            "Saved by numpy.savez, they stay on disk.",
            *(path, in_memory // 10**6),
        )
    counts = [*map(len, labels)]
    place = places(counts)

    def open_picture(index: int) -> Image.Image | bytes:
        part, row = place(index)
        return openers[part](row)

    own_parts = np.repeat([*pairs.values()], counts)
    if "split" in members:
        split = _flat(members["split"], "split", "iub", len(own_parts), path)
        if (alien := split[(split != 0) & (split != 1)]).size:
            raise DataError(f"`split` in {path} must be 0 (train) or 1 (test), got {alien[0]}.")
        own_parts = np.where(split == 1, TEST, TRAIN)
    is_test, marks = divided(own_parts)
    return Catalogue(
        source=str(path),
        classes=_class_names(members, np.concatenate(labels), path),
        is_test=is_test,
        open=open_picture,
        version=version,
        marks=marks,
        in_memory=in_memory,
    )


def _read(path: Path) -> tuple[dict[str, Array], dict[str, Member]]:
    """Read the members that are small, and find those that hold pixels."""
    try:
        with zipfile.ZipFile(path) as file, np.load(path, allow_pickle=False) as archive:
            present = {*archive.files}
            pairs = [pair for pair in PAIRS if present.intersection(pair)]
            large = present & {"images", "jpeg", *(images for images, _ in pairs)}
            small = present & {"labels", "split", "names", "offsets", *(own for _, own in pairs)}
            if fault := _layout_fault(present, pairs):
                found = ", ".join(sorted(present)) or "none"
                raise DataError(f"{path} {fault}; members found: {found}.")
            members = {name: archive[name] for name in sorted(small)}
            if alien := [name for name, m in members.items() if not isinstance(m, np.ndarray)]:
                raise ValueError(f"its member {alien[0]!r} is no array")
            pixels: dict[str, Member] = {}
            for name in sorted(large):
                mapped = _mapped(path, file.getinfo(f"{name}.npy"))
                pixels[name] = mapped or functools.partial(np.asarray, archive[name])
            return members, pixels
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(
            f"{path.absolute()} cannot be read as an npz file ({error}). Expected a file saved by "
            "numpy.savez, without Python objects. Check the path in `data`, or save it again."
        ) from error


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


def _mapped(path: Path, entry: zipfile.ZipInfo) -> Member | None:
    """Find where the array of a member lies in the file; None: it is compressed."""
    if entry.compress_type != zipfile.ZIP_STORED:
        return None
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        lengths = struct.unpack("<26xHH", file.read(30))  # of the name and of what is extra
        file.seek(sum(lengths), 1)
        old = npy.read_magic(file) == (1, 0)
        shape, in_columns, dtype = (
            npy.read_array_header_1_0 if old else npy.read_array_header_2_0
        )(file)
        begin, order = file.tell(), "F" if in_columns else "C"
    member = functools.partial(np.memmap, path, dtype, "r", begin, shape, order)
    member()  # refuses objects, and what is cut short
    return member


def _raw_pictures(name: str, images: Member, path: Path) -> tuple[Opener, int]:
    """Return the function that opens image i, and the number of images."""
    shape, dtype = images().shape, images().dtype
    fits = len(shape) in (3, 4) and shape[3:] in ((), (1,), (3,))
    expected = "uint8 of shape (count, height, width) or (count, height, width, 3)"
    if len(shape) == 4 and shape[1] in (1, 3):
        expected += ", channels last"
    elif len(shape) in (4, 5):
        expected += ", no volumes, of which you can save slices"
    _require(dtype == np.uint8 and fits, name, images(), expected, path)
    if 0 in shape:
        raise DataError(f"{path} holds no images: `{name}` has shape {shape}.")
    one = shape[1:3] if shape[3:] == (1,) else shape[1:]
    return lambda i: Image.fromarray(np.array(images()[i]).reshape(one)), shape[0]


def _packed_pictures(jpeg: Member, offsets: Array, path: Path) -> tuple[Opener, int]:
    """Return the function that opens image i of ``jpeg``, and the number of images."""
    fits = jpeg().dtype == np.uint8 and jpeg().ndim == 1
    _require(fits, "jpeg", jpeg(), "uint8 of shape (bytes,)", path)
    fits = offsets.dtype.kind in "iu" and offsets.ndim == 1
    _require(fits, "offsets", offsets, "integers of shape (count + 1,)", path)
    bounds, total = offsets.astype(np.int64), len(jpeg())
    if len(bounds) < 2:
        raise DataError(f"{path} holds no images: `offsets` has shape {offsets.shape}.")
    if bounds[0] < 0 or bounds[-1] > total or (np.diff(bounds) < 0).any():
        raise DataError(
            f"`offsets` in {path} must ascend from 0 to at most {total}, the length of `jpeg`; "
            f"got {bounds.min()}..{bounds.max()}. The file is damaged or was packed wrongly."
        )
    return lambda i: jpeg()[bounds[i] : bounds[i + 1]].tobytes(), len(bounds) - 1


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


def _require(fits: bool, name: str, values: Array, expected: str, path: Path) -> None:
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
