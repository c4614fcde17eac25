"""Settings of a simulation, from a scenario file and from the command line.

A scenario is a TOML file of run-config keys at the top level::

    data = "folder:images"    # relative to where you stand, not to this file
    kind = "lora"
    rank = 16

Later sources win: the preset, the file, then ``--set key=value``, then options such as ``--seed``.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from fedcompo.config.presets import with_preset
from fedcompo.config.run import RunConfig, all_settings
from fedcompo.config.setting import Scalar
from fedcompo.errors import ConfigError

PATH_SETTINGS = ("output", "checkpoint", "reference", "registry", "owners")
PATH_SOURCES = {
    "data": ("folder:", "manifest:", "npz:", "text:", "hf:"),
    "backbone": ("local-dir:",),
}
ELSEWHERE = "not-told"


def settings_of(
    file: Path | None, assignments: Iterable[str], options: Mapping[str, Scalar]
) -> dict[str, Scalar]:
    """Collect the settings of a run, check them and make every path absolute.

    Args:
        file: The scenario, or None for the defaults.
        assignments: ``key=value`` each, as on the command line; they win over the file.
        options: Settings that have an option, such as ``--seed``; they win over all.

    Raises:
        ConfigError: With all faults of all sources at once.
    """
    values: dict[str, Scalar] = read_scenario(file) if file else {}
    faults: list[str] = []
    for assignment in assignments:
        try:
            key, value = parse_assignment(assignment)
            values[key] = value
        except ConfigError as error:
            faults.append(str(error))
    values = with_preset({**values, **options})
    try:
        RunConfig.parse(values)
    except ConfigError as error:
        faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
    return with_absolute_paths(values, Path.cwd())


def read_scenario(file: Path) -> dict[str, Scalar]:
    """Read a scenario file; its keys and values are checked later.

    Raises:
        ConfigError: If it cannot be read, is no TOML, or holds more than keys and scalars.
    """
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The scenario {file} cannot be read: {error.strerror}. Check the path."
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"The scenario {file} is no valid TOML: {error}") from error
    faults = [
        f"`[{key}]` is a table; settings stand at the top level, without tables."
        if isinstance(value, dict)
        else f"`{key}` must be one text, number or true/false, got {value!r}."
        for key, value in values.items()
        if not isinstance(value, Scalar)
    ]
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        raise ConfigError(f"The scenario {file} cannot be used:\n{listed}")
    return values


def parse_assignment(assignment: str) -> tuple[str, Scalar]:
    """Split ``key=value``. The value is read as a TOML scalar, or else as text.

    For a setting that is a text, an unquoted number stays text (``output=2026``).

    Raises:
        ConfigError: If there is no key or no ``=``.
    """
    key, equals, text = (part.strip() for part in assignment.partition("="))
    if not key or not equals:
        raise ConfigError(f"`{assignment}` is not of the form key=value.")
    known = all_settings().get(key)
    wants_text = known is not None and isinstance(known.default, str)
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return key, text
    value = parsed.get("value")
    if len(parsed) != 1 or not isinstance(value, Scalar):
        return key, text
    return key, text if wants_text and not isinstance(value, str) else value


def with_absolute_paths(values: Mapping[str, Scalar], where: Path) -> dict[str, Scalar]:
    """Make every path among the settings absolute, as seen from the folder ``where``.

    Flower's processes run in other folders, where a relative path would name another file.
    """
    return _with_paths(values, lambda path: _absolute(path, where))


def without_paths(values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Make every path among the settings a word that says no more than that there is one."""
    return _with_paths(values, lambda path: ELSEWHERE)


def on_hub(place: str) -> bool:
    """Tell whether ``hf:<place>`` names a data set on the hub; else it is the path of a folder."""
    return not (place.startswith(("/", ".", "~")) or Path(place.partition("#")[0]).is_dir())


def _with_paths(values: Mapping[str, Scalar], changed: Callable[[str], str]) -> dict[str, Scalar]:
    resolved = dict(values)
    for key in PATH_SETTINGS:
        if path := resolved.get(key):
            resolved[key] = changed(str(path))
    for key, prefixes in PATH_SOURCES.items():
        value = str(resolved.get(key, ""))
        source = next((prefix for prefix in prefixes if value.startswith(prefix)), None)
        if source and value != source and not (source == "hf:" and on_hub(value[3:])):
            resolved[key] = source + changed(value.removeprefix(source))
    return resolved


def as_toml(values: Mapping[str, Scalar]) -> str:
    """Write settings as a scenario file."""
    return "".join(f"{key} = {toml_value(value)}\n" for key, value in values.items())


def scenario_name(file: Path | None, values: Mapping[str, Scalar]) -> str:
    """Return the name of a run's folder: that of its scenario, or else of its data."""
    if file:
        return file.stem
    data = str(values.get("data", all_settings()["data"].default))
    kind, _, place = data.partition(":")
    if kind in ("manifest", "hf"):
        place = place.partition("#")[0]  # without its choices
    return Path(place).stem or kind or "run"


def _absolute(path: str, where: Path) -> str:
    # normpath, not resolve: a link that the user named stays the name the user knows.
    return os.path.normpath(where / Path(path).expanduser())


def toml_value(value: Scalar) -> str:
    """Write a value as TOML; what cannot be seen in a text stands as its number."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # A JSON string is a TOML string, but for one character that TOML wants escaped.
        text = json.dumps(str(value), ensure_ascii=False)
        return "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in text)
    return repr(value)
