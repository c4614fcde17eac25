"""Texts in one file of JSON lines (``.jsonl``), one a line.

Its fields::

    text    the text to classify; UTF-8
    label   name of its class
    split   train or test; all texts have it, or none has it and test texts are drawn

Such as ``{"text": "A fine day.", "label": "weather", "split": "train"}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedcompo.backbone.preprocessing import Modality
from fedcompo.data.catalogue import Catalogue, class_name, version_of
from fedcompo.errors import DataError

ENDING = ".jsonl"
SPLITS = ("train", "test")


def text_catalogue(path: Path) -> Catalogue:
    """List the texts of a file.

    Args:
        path: The file; see above for its fields.

    Raises:
        DataError: If the file is missing, damaged or of another kind; if a field is missing, or has
            a wrong type or value.
    """
    if path.suffix != ENDING:
        raise DataError(
            f"{path} must end in {ENDING} and hold JSON lines, got {path.suffix or 'no ending'!r}."
        )
    version = version_of([path])
    texts: list[bytes] = []
    classes: list[str] = []
    splits: list[str | None] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for where, fields in _rows(file, path):
                texts.append(_text(fields, where))
                classes.append(class_name(_field(fields, "label", where), source=where))
                splits.append(_split(fields, where))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path.absolute()} cannot be read as UTF-8 text ({error}). Check the path in `data`, "
            "or save the file again."
        ) from error
    if not texts:
        raise DataError(f"{path} holds no texts.")
    unsaid = [split is None for split in splits]
    if any(unsaid) and not all(unsaid):
        raise DataError(
            f"Text {unsaid.index(True) + 1} of {path} has no `split`, others have. Say of every "
            "text whether it is for train or test, or of none."
        )
    return Catalogue(
        source=str(path),
        classes=np.array(classes),
        is_test=None if unsaid[0] else np.array([split == "test" for split in splits]),
        open=lambda index: texts[index],
        modality=Modality.TEXTS,
        which=lambda index: f"text {index + 1}",
        version=version,
    )


def _rows(file: Iterator[str], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield file and line of each text, for messages, and its fields."""
    for number, line in enumerate(file, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}, is no JSON ({error}). Expected one object a line.") from None
        if not isinstance(fields, dict):
            raise DataError(f"{where}, is no JSON object, got {line.strip()[:40]!r}.")
        yield where, fields


def _field(fields: dict[str, Any], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        actual = f"got {value!r}" if name in fields else f"its fields are {', '.join(fields)}"
        raise DataError(f"{where}, must have `{name}`, a text; {actual}.")
    return value


def _text(fields: dict[str, Any], where: str) -> bytes:
    text = _field(fields, "text", where)
    if not text.strip():
        raise DataError(f"{where}, is empty. Take it out, or write its text.")
    if "\0" in text:
        raise DataError(f"{where}, holds a NUL character, which fills texts up. Take it out.")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}, is no valid Unicode ({error.reason}).") from None


def _split(fields: dict[str, Any], where: str) -> str | None:
    if (value := fields.get("split")) is None:
        return None
    if value not in SPLITS:
        raise DataError(f"`split` in {where}, must be train or test, got {value!r}.")
    return str(value)
