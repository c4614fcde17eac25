"""Texts in one file of JSON lines (``.jsonl``), one a line; a text is read when it is asked for.

Its fields::

    text    the text to classify; UTF-8
    label   name of its class
    split   train, test or validation; all have it, or none has it and test texts are drawn

Such as ``{"text": "A fine day.", "label": "weather", "split": "train"}``.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedcompo.config.choices import Modality
from fedcompo.data.catalogue import Catalogue, class_name, version_of
from fedcompo.data.sources.labels import MULTI_LABEL
from fedcompo.data.sources.splits import split_of
from fedcompo.errors import DataError

ENDING = ".jsonl"


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
    starts = array("q")  # where each text's line begins
    names: dict[str, str] = {}  # each once
    classes: list[str] = []
    splits: list[str] = []
    try:
        with path.open("rb") as file:
            for start, where, fields in _rows(file, path):
                starts.append(start)
                _text(fields, where)
                name = class_name(_field(fields, "label", where), source=where)
                classes.append(names.setdefault(name, name))
                split = "" if fields.get("split") is None else str(fields["split"])
                splits.append(names.setdefault(split, split))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path.absolute()} cannot be read as UTF-8 text ({error}). Check the path in `data`, "
            "or save the file again."
        ) from error
    if not starts:
        raise DataError(f"{path} holds no texts.")

    def which(index: int) -> str:
        return f"text {index + 1}"

    is_test, marks = split_of(splits, source=str(path), which=which)

    def read(index: int) -> bytes:
        with path.open("rb") as file:
            file.seek(starts[index])
            fields: dict[str, str] = json.loads(file.readline().decode("utf-8-sig"))
        return fields["text"].encode()

    return Catalogue(
        source=str(path),
        classes=np.array(classes),
        is_test=is_test,
        open=read,
        modality=Modality.TEXTS,
        which=which,
        version=version,
        marks=marks,
    )


def _rows(file: Iterable[bytes], path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield where each text's line begins, its file and line for messages, and its fields."""
    end = 0
    for number, content in enumerate(file, start=1):
        start, end = end, end + len(content)
        where, line = f"{path}, line {number}", content.decode("utf-8-sig")
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}, is no JSON ({error}). Expected one object a line.") from None
        if not isinstance(fields, dict):
            raise DataError(f"{where}, is no JSON object, got {line.strip()[:40]!r}.")
        yield start, where, fields


def _field(fields: dict[str, Any], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        if isinstance(value, list) and name == "label":
            raise DataError(f"{where}, lists labels, {value!r}. {MULTI_LABEL}")
        actual = f"got {value!r}" if name in fields else f"its fields are {', '.join(fields)}"
        raise DataError(f"{where}, must have `{name}`, a text; {actual}.")
    return value


def _text(fields: dict[str, Any], where: str) -> None:
    """Refuse what is no text."""
    text = _field(fields, "text", where)
    if not text.strip():
        raise DataError(f"{where}, is empty. Take it out, or write its text.")
    if "\0" in text:
        raise DataError(f"{where}, holds a NUL character, which fills texts up. Take it out.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}, is no valid Unicode ({error.reason}).") from None
