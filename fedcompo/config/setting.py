"""Declare a setting (default, explanation, checks), and check the values of many."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, field
from enum import StrEnum
from typing import Any

from fedcompo.errors import ConfigError

Scalar = bool | int | float | str
Check = tuple[Callable[[Any], bool], str]
"""A predicate of the value, and the demand for the error message."""
Companion = tuple[str, str, StrEnum]
"""Key of a text, key of a mode, and the only mode that needs the text and may have it."""

POSITIVE: Check = (lambda value: value > 0, "must be > 0")
NOT_NEGATIVE: Check = (lambda value: value >= 0, "must be >= 0")
FRACTION: Check = (lambda value: 0 <= value < 1, "must be in [0, 1)")
NAMES: Check = (
    lambda value: all(names_of(value)),
    'must be names joined by commas, a name with a comma in double quotes: a,"b, c"',
)


def setting(default: Scalar, description: str, *checks: Check, numeric: bool = False) -> Any:
    """Declare a setting: its default, a sentence that explains it, the checks of its value.

    Args:
        default: Its type is the setting's.
        description: For people.
        checks: Of the value.
        numeric: Whether a text may also be given as a number.
    """
    metadata = {"help": description, "checks": checks, "numeric": numeric}
    return field(default=default, metadata=metadata)


def names_of(value: str) -> tuple[str, ...]:
    """Split a list of names at its commas; those within double quotes are a name's own.

    A list that is none, such as one with a single quote mark, is one empty name.
    """
    if not value.strip():
        return ()
    try:
        parts = next(csv.reader([value], skipinitialspace=True))
    except csv.Error:
        return ("",)
    return ("",) if value.count('"') % 2 else tuple(part.strip() for part in parts)


def check_all(
    known: Mapping[str, Field[Any]], values: Mapping[str, Scalar], companions: Iterable[Companion]
) -> dict[str, Any]:
    """Convert and check values, one by one and together.

    Args:
        known: Declared settings by key.
        values: Values by key.
        companions: Settings that need each other; checked where both are valid alone.

    Returns:
        Values by field name.

    Raises:
        ConfigError: Lists all faults.
    """
    checked, faults, faulty = {}, [], set()
    for key, value in values.items():
        try:
            checked[key] = check_one(key, known, value)
        except ValueError as error:
            faults.append(str(error))
            faulty.add(key)
    for key, mode_key, mode in companions:
        text, chosen = (checked.get(k, known[k].default) for k in (key, mode_key))
        if faulty & {key, mode_key} or bool(text) == (chosen == mode):
            continue
        faults.append(
            f"`{key}` is {text!r}, but `{mode_key}` is {chosen}: only {mode} makes use of it."
            if text
            else f"`{mode_key}` is {mode}, but `{key}` is empty: {known[key].metadata['help']}"
        )
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        raise ConfigError(
            f"{len(faults)} setting(s) cannot be used:\n{listed}\n"
            "`fedcompo settings` lists all settings with their defaults."
        )
    return {known[key].name: value for key, value in checked.items()}


def check_one(key: str, known: Mapping[str, Field[Any]], value: Any) -> Any:
    """Convert one value to its setting's type and check its range; raises ``ValueError``."""
    if key not in known:
        near = difflib.get_close_matches(key.replace("_", "-"), known, 1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ValueError(f"`{key}` is no setting.{hint}")
    expected = type(known[key].default)
    if issubclass(expected, StrEnum):
        choices = [str(choice) for choice in expected]
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"`{key}` must be one of {', '.join(choices)}, got {value!r}.{hint}")
        return expected(value)
    whole = isinstance(value, float) and value.is_integer()
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1023 else float("inf")
    elif expected is int and whole:
        value = int(value)
    elif known[key].metadata["numeric"] and type(value) in (int, float):
        value = str(value)
    if type(value) is not expected:
        raise ValueError(
            f"`{key}` must be of type {expected.__name__}, got {value!r} ({type(value).__name__})."
        )
    if isinstance(value, float) and not abs(value) < float("inf"):
        raise ValueError(f"`{key}` must be finite, got {value}.")
    for passes, demand in known[key].metadata["checks"]:
        if not passes(value):
            raise ValueError(f"`{key}` {demand}, got {value!r}.")
    return value
