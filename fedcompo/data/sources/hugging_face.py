"""Images of a Hugging Face data set: from the hub by name, or from a folder without a network.

A folder was written by ``save_to_disk``, or holds Parquet files as the hub does. The hub's library
keeps what it fetches, and tables of Parquet files, in its cache (``HF_HOME``).
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedcompo.data.catalogue import Catalogue, places, version_of
from fedcompo.data.sources.columns import (
    GROUP,
    Choices,
    called,
    check_roles,
    pick,
    with_group,
)
from fedcompo.data.sources.labels import MULTI_LABEL, class_names
from fedcompo.data.sources.splits import TEST, TRAIN, divided, part_called
from fedcompo.errors import DataError
from fedcompo.report.twins import few

ROLES = ("image", "label", GROUP, TRAIN, TEST, "config")
"""What `data` may choose: three columns, two parts, one of the configurations of a name."""
SAVED = ("dataset_dict.json", "state.json")
"""Files that ``save_to_disk`` writes."""
logger = logging.getLogger(__name__)
ADVICE = "Where there is no network, save it with save_to_disk and set `data` to hf:<folder>."


def saved_catalogue(place: str | Path, choices: Choices) -> Catalogue:
    """List the images of a data set.

    Args:
        place: A folder, or a name on the hub.
        choices: Its columns and parts, by role.

    Raises:
        DataError: If the library is not installed, the data set cannot be loaded, or a column is
            missing, ambiguous or of the wrong kind.
    """
    source = str(place) if isinstance(place, Path) else f"hf:{place}"
    chosen = check_roles(choices, ROLES, source=source)
    loaded = _loaded(place, chosen.get("config"), source)
    roles = _parts(loaded, chosen, source)
    parts = {name: loaded[name] for name in roles}
    first = next(iter(parts.values()))
    image, label = _columns(first.features, chosen, source)
    _check_parts(parts, (image, label), source)
    counts = [len(rows) for rows in parts.values()]
    at = places(counts)
    import datasets  # it is there

    as_files = datasets.Image(decode=False)
    encoded = [rows.select_columns([image]).cast_column(image, as_files) for rows in parts.values()]

    def which(index: int) -> str:
        part, row = at(index)
        return f"row {row} of {[*parts][part]!r}"

    def read(index: int) -> bytes:
        part, row = at(index)
        content: Mapping[str, Any] = encoded[part][row][image]
        if content is None:
            raise ValueError("it has no image")
        return content["bytes"] or Path(content["path"]).read_bytes()

    def texts(column: str) -> list[str]:
        return [text for rows in parts.values() for text in _texts(rows, column)]

    is_test, marks = divided(np.repeat([*roles.values()], counts))
    shared = [c for c in first.features if all(c in rows.features for rows in parts.values())]
    others = [c for c in shared if c not in (image, label) and _is_plain(first.features[c])]
    return Catalogue(
        source=source,
        classes=class_names(texts(label), source=source, which=which),
        is_test=is_test,
        open=read,
        which=which,
        version=version_of(
            [Path(f["filename"]) for rows in parts.values() for f in rows.cache_files]
        ),
        marks=marks,
        columns=with_group({name: np.array(texts(name)) for name in others}, chosen, source),
    )


hub_catalogue = functools.lru_cache(maxsize=1)(saved_catalogue)
"""The same of a name on the hub, which a process asks for again and again."""


def _loaded(place: str | Path, config: str | None, source: str) -> Mapping[str, Any]:
    """Load all parts of a data set, by name."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source} needs Hugging Face's library, which is not installed: "
            'pip install "fedcompo[datasets]".'
        ) from error
    advice = f"Check the name and the network. {ADVICE}"
    if isinstance(place, Path):
        advice = "Expected a folder of `save_to_disk`, or of Parquet files."
    try:
        if isinstance(place, Path) and any((place / name).is_file() for name in SAVED):
            loaded = datasets.load_from_disk(str(place))
        elif isinstance(place, Path):
            loaded = datasets.load_dataset("parquet", data_files=_parquet_files(place))
        else:
            loaded = datasets.load_dataset(place, config)
    except Exception as error:  # network, disk and hub errors of three libraries
        raise DataError(
            f"{source} cannot be loaded as a Hugging Face data set ({type(error).__name__}: "
            f"{error}). {advice}"
        ) from error
    return {TRAIN: loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)


def _parquet_files(folder: Path) -> dict[str, list[str]]:
    """Find Parquet files by part, as the hub calls them: ``train-0-of-1``, ``train/0``."""
    parts: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        start = re.split(r"\W", file.stem)[0]
        named = [word for word in (start, file.parent.name) if part_called(word)]
        part = named[0] if named else start if "-of-" in file.stem else TRAIN
        parts.setdefault(part, []).append(str(file))
    if not parts:
        raise FileNotFoundError(
            "it holds neither" if folder.is_dir() else "there is no such folder"
        )
    return parts


def _parts(loaded: Mapping[str, Any], chosen: Mapping[str, str], source: str) -> dict[str, str]:
    """Return the parts to read, and what each is for; log which are not read."""
    known = {name: part_called(name) for name, rows in loaded.items() if len(rows)}
    trains = [n for n, part in known.items() if part == TRAIN]
    trains = [chosen[TRAIN]] if TRAIN in chosen else trains
    tests = {n: part for n, part in known.items() if part not in ("", TRAIN) and n not in trains}
    parts = dict.fromkeys(trains, TRAIN) | ({chosen[TEST]: TEST} if TEST in chosen else tests)
    if TRAIN not in parts.values() or not {*parts} <= {*known}:
        raise DataError(
            f"{source} has the parts {few([*map(repr, known)])}, expected "
            f"{few([*map(repr, parts)]) or 'one for training'}. Choose them by a # at the end of "
            "`data`: #train=<part>,test=<part>."
        )
    if unread := [name for name in loaded if name not in parts]:
        logger.warning("%s: parts that are not read: %s.", source, few([*map(repr, unread)]))
    return parts


def _columns(features: Mapping[str, Any], chosen: Mapping[str, str], source: str) -> list[str]:
    """Find the columns of images and of labels by the type of their features."""
    import datasets

    def of_type(kind: type) -> list[str]:
        return [name for name, feature in features.items() if isinstance(feature, kind)]

    columns = [*features]
    image = pick("image", of_type(datasets.Image), chosen=chosen, columns=columns, source=source)
    if not isinstance(features[image], datasets.Image):
        raise DataError(
            f"{source}: the column {image!r} is no column of images, but {features[image]}. Columns"
            f" of images: {few(of_type(datasets.Image)) or 'none'}. "
        )
    candidates = of_type(datasets.ClassLabel) or called("label", columns)
    label = pick("label", candidates, chosen=chosen, columns=columns, source=source)
    if isinstance(features[label], datasets.Sequence | datasets.List | list):
        raise DataError(f"{source}: the column {label!r} lists labels. {MULTI_LABEL}")
    if not _is_plain(features[label]):
        raise DataError(
            f"{source}: the column {label!r} is {features[label]}, expected classes, text or "
            "integers. Choose another by a # at the end of `data`: #label=<column>."
        )
    return [image, label]


def _check_parts(parts: Mapping[str, Any], needed: Sequence[str], source: str) -> None:
    """Refuse parts that lack a column of the first one, such as test images without labels."""
    for name, rows in parts.items():
        if missing := [column for column in needed if column not in rows.features]:
            raise DataError(
                f"{source}: the part {name!r} has no column {missing[0]!r}; columns found: "
                f"{few([*map(repr, rows.features)])}. Add it, or choose another part by a # at the "
                "end of `data`: #test=<part>; if there is no other, save the data set without it.",
                told="a part of the data set lacks a column",
            )


def _is_plain(feature: Any) -> bool:
    """Tell whether a column holds classes, text, integers or truth values."""
    dtype = str(getattr(feature, "dtype", ""))
    return dtype.startswith(("string", "large_string", "int", "uint", "bool"))


def _texts(rows: Any, column: str) -> list[str]:
    """Return a column as text; classes by name, what is missing as an empty text."""
    names = getattr(rows.features[column], "names", None)
    values = list(rows[column])
    if names is None:
        return ["" if value is None else str(value) for value in values]
    return ["" if value is None or value < 0 else names[value] for value in values]
