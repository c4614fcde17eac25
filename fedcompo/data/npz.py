"""Images in one ``.npz`` file, as raw pixels or as packed JPEG files.

Its members::

    labels   (count,)                     integers
    split    (count,)                     0 train, 1 test; if missing, test images are drawn
    names    (classes,)                   text by label; if missing, the label is the name
    images   (count, height, width[, 3])  uint8; or instead of it:
    jpeg     (bytes,)                     uint8, image i is jpeg[offsets[i]:offsets[i + 1]]
    offsets  (count + 1,)                 integers
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedcompo.data.catalogue import Catalogue, class_name, version_of
from fedcompo.errors import DataError

Array = NDArray[Any]
Opener = Callable[[int], Image.Image | bytes]
UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""Errors of NumPy on files that are no npz, are damaged, or hold pickled objects."""


def npz_catalogue(path: Path) -> Catalogue:
    """List the images of an npz file.

    Args:
        path: The file; see above for its members.

    Raises:
        DataError: If the file is missing, damaged or no npz; if members are missing, have a wrong
            type or contradict each other.
    """
    version = version_of([path])
    members = _read(path)
    if "images" in members:
        open_picture, count = _raw_pictures(members["images"], path)
    else:
        open_picture, count = _packed_pictures(members["jpeg"], members["offsets"], path)
    labels = _flat(members, "labels", "iu", count, path).astype(np.int64)
    if unlabelled := int((labels < 0).sum()):
        raise DataError(
            f"`labels` in {path} are negative for {unlabelled} of {count} images (the smallest is "
            f'{labels.min()}), which most programs write for "no label". Take these images out, or '
            "number the classes from 0."
        )
    split = None
    if "split" in members:
        split = _flat(members, "split", "iub", count, path).astype(np.int64)
        if (alien := split[(split != 0) & (split != 1)]).size:
            raise DataError(f"`split` in {path} must be 0 (train) or 1 (test), got {alien[0]}.")
    classes = _class_names(members, labels, path)
    return Catalogue(
        source=str(path),
        classes=classes,
        is_test=None if split is None else split == 1,
        open=open_picture,
        version=version,
    )


def _read(path: Path) -> dict[str, Array]:
    """Read each known member once."""
    known = ("images", "jpeg", "offsets", "labels", "split", "names")
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("it is no zip archive, or cut short")
        with np.load(path, allow_pickle=False) as archive:
            members = {name: archive[name] for name in known if name in archive.files}
            contents = ", ".join(archive.files) or "none"
        alien = next((name for name, m in members.items() if not isinstance(m, np.ndarray)), None)
        if alien:
            raise ValueError(f"its member {alien!r} is no array")
    except UNREADABLE as error:
        raise DataError(
            f"{path.absolute()} cannot be read as an npz file ({error}). Expected a file saved by "
            "numpy.savez, without Python objects. Check the path in `data`, or save it again."
        ) from error
    layouts = ({"images"}, {"jpeg", "offsets"})
    present = [layout for layout in layouts if layout <= members.keys()]
    if len(present) != 1 or "labels" not in members:
        raise DataError(
            f"{path} must hold `labels` and either `images` or `jpeg` with `offsets`; members "
            f"found: {contents}."
        )
    return members


def _raw_pictures(images: Array, path: Path) -> tuple[Opener, int]:
    """Return the function that opens image i of ``images``, and the number of images."""
    fits = images.ndim in (3, 4) and images.shape[3:] in ((), (1,), (3,))
    expected = "uint8 of shape (count, height, width) or (count, height, width, 3)"
    _require(images.dtype == np.uint8 and fits, "images", images, expected, path)
    if not images.size:
        raise DataError(f"{path} holds no images: `images` has shape {images.shape}.")
    if images.shape[3:] == (1,):
        images = images[..., 0]
    return lambda index: Image.fromarray(images[index]), len(images)


def _packed_pictures(jpeg: Array, offsets: Array, path: Path) -> tuple[Opener, int]:
    """Return the function that opens image i of ``jpeg``, and the number of images."""
    fits = jpeg.dtype == np.uint8 and jpeg.ndim == 1
    _require(fits, "jpeg", jpeg, "uint8 of shape (bytes,)", path)
    fits = offsets.dtype.kind in "iu" and offsets.ndim == 1
    _require(fits, "offsets", offsets, "integers of shape (count + 1,)", path)
    bounds = offsets.astype(np.int64)
    if len(bounds) < 2:
        raise DataError(f"{path} holds no images: `offsets` has shape {offsets.shape}.")
    if bounds[0] < 0 or bounds[-1] > len(jpeg) or (np.diff(bounds) < 0).any():
        raise DataError(
            f"`offsets` in {path} must ascend from 0 to at most {len(jpeg)}, the length of `jpeg`; "
            f"got {bounds.min()}..{bounds.max()}. The file is damaged or was packed wrongly."
        )

    return lambda index: jpeg[bounds[index] : bounds[index + 1]].tobytes(), len(bounds) - 1


def _flat(members: dict[str, Array], name: str, kinds: str, count: int, path: Path) -> Array:
    """Check that a member has one integer an image."""
    values = members[name]
    fits = values.dtype.kind in kinds and values.shape == (count,)
    _require(fits, name, values, f"integers of shape ({count},), one an image", path)
    return values


def _require(fits: bool, name: str, values: Array, expected: str, path: Path) -> None:
    if not fits:
        raise DataError(
            f"`{name}` in {path} must be {expected}, got {values.dtype} of shape {values.shape}."
        )


def _class_names(members: dict[str, Array], labels: Array, path: Path) -> NDArray[np.str_]:
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
