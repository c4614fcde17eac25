"""Reads and writes recipes: one TOML file each, which every composed folder holds."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from fedcompo.composition.settings import UNLIMITED
from fedcompo.config.run import all_settings
from fedcompo.config.scenario import toml_value
from fedcompo.config.setting import NOT_NEGATIVE, check_one, setting
from fedcompo.errors import ConfigError
from fedcompo.export.recipe import CAPS, SHA256, Group, Negation, Recipe

LARGEST = 4 << 20
"""Bytes of a recipe; about 30,000 members."""
OF_RUNS = "coefficients", "align-samples", "ridge", "seed"
"""Settings of a run that decide how its contributions are composed."""
DIGEST = setting("", "SHA-256 of a contribution's tensors; empty: any.", SHA256)
WEIGHT = setting(0.0, "A client's coefficient.")
CAP = setting(
    0,
    "Number of images; 0: all.",
    NOT_NEGATIVE,
    (lambda value: value <= UNLIMITED, "must be at most 2**62"),
)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        ConfigError: If it cannot be read, is too large, is no TOML, or says what cannot be; with
            all faults at once.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ConfigError(f"{path} is no recipe: it has more than {LARGEST} bytes.")
        table = tomllib.loads(data.decode())
    except OSError as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"The recipe {path} is no valid TOML: {error}.") from error
    faults: list[str] = []
    recipe = _recipe(table, faults)
    if faults := faults or [*recipe.contradictions()]:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        raise ConfigError(f"The recipe {path} cannot be used:\n{listed}")
    return recipe


def recipe_text(recipe: Recipe) -> str:
    """Return a recipe as TOML; what has its default is left out, but for the dtype."""
    lines = [*_scalars(recipe), *_pairs(recipe.settings)]
    for title in ("members", "fisher", "weights"):
        table = dict(sorted((getattr(recipe, title) or {}).items()))
        lines += ["", f"[{title}]", *_pairs(table)] if table else []
    for group in recipe.groups:
        lines += ["", "[[groups]]", *_scalars(group)]
        lines += [f"weights = {{{', '.join(_pairs(group.weights))}}}"] if group.weights else []
    if recipe.negated is not None:
        lines += ["", "[negated]", *_scalars(recipe.negated)]
    return "\n".join([*lines, ""])


def _recipe(table: Mapping[str, Any], faults: list[str]) -> Recipe:
    settings = {key: all_settings()[key] for key in OF_RUNS} | dict.fromkeys(CAPS, CAP)
    tables = "members", "fisher", "weights", "groups", "negated"
    given = _checked(table, _declared(Recipe) | settings, faults, apart=tables)
    members, groups = table.get("members"), table.get("groups", [])
    if isinstance(members, list) and all(isinstance(client, str) for client in members):
        members = dict.fromkeys(members, "")
    if not isinstance(groups, list):
        faults.append("Each of the `groups` is headed by [[groups]], in two pairs of brackets.")
        groups = []
    negated = table.get("negated")
    return Recipe(
        **{key.replace("-", "_"): v for key, v in given.items() if key not in settings},
        settings={key: v for key, v in given.items() if key in settings},
        members=_by_client(members, DIGEST, "members", faults) or {},
        fisher=_by_client(table.get("fisher"), DIGEST, "fisher", faults) or {},
        weights=_by_client(table.get("weights"), WEIGHT, "weights", faults),
        groups=tuple(_group(own, f"groups[{i}].", faults) for i, own in enumerate(groups)),
        negated=None
        if negated is None
        else Negation(**_checked(negated, _declared(Negation), faults, "negated.", needs="client")),
    )


def _group(table: Any, where: str, faults: list[str]) -> Group:
    given = _checked(table, _declared(Group), faults, where, apart=("weights",), needs="pattern")
    weights = table.get("weights") if isinstance(table, dict) else None
    group = Group(**given, weights=_by_client(weights, WEIGHT, f"{where}weights", faults))
    if isinstance(table, dict) and not table.keys() & {"weights", "scale"}:
        faults.append(f"`{where}weights` and `{where}scale` are missing: give one of them.")
    return group


def _by_client(
    table: Any, kind: Field[Any], where: str, faults: list[str]
) -> dict[str, Any] | None:
    """Check a table of one value for each client; None: there is no table."""
    if table is None:
        return None
    if isinstance(table, dict) and not table:
        faults.append(f"`{where}` names nobody.")
    known = dict.fromkeys(table, kind) if isinstance(table, dict) else {}
    return _checked(table, known, faults, f"{where}.")


def _checked(
    table: Any,
    known: Mapping[str, Field[Any]],
    faults: list[str],
    where: str = "",
    *,
    apart: Collection[str] = (),
    needs: str = "",
) -> dict[str, Any]:
    """Return the right values of a table, but for keys ``apart``; note what is wrong.

    ``where`` stands before the keys in the text of a fault; ``needs`` is a key that must be there.
    """
    if not isinstance(table, dict):
        faults.append(f"`{where.rstrip('.')}` must be a table, got {table!r}.")
        return {}
    if needs and needs not in table:
        faults.append(f"`{where}{needs}` is missing.")
    named = {f"{where}{key}": known.get(key, WEIGHT) for key in (*known, *apart)}
    checked = {}
    for key in (key for key in table if key not in apart):
        try:
            checked[key] = check_one(f"{where}{key}", named, table[key])
        except ValueError as error:
            faults.append(str(error))
    return checked


def _declared(kind: type) -> dict[str, Field[Any]]:
    """The single values of a table, by key."""
    return {f.name.replace("_", "-"): f for f in fields(kind) if "help" in f.metadata}


def _scalars(value: Recipe | Group | Negation) -> Iterator[str]:
    """Write the single values that are given."""
    own = {key: (getattr(value, f.name), f.default) for key, f in _declared(type(value)).items()}
    return _pairs({key: v for key, (v, default) in own.items() if v != default or key == "dtype"})


def _pairs(table: Mapping[str, Any] | None) -> Iterator[str]:
    for key, value in (table or {}).items():
        bare = key.replace("-", "").replace("_", "").isalnum() and key.isascii()
        yield f"{key if bare else toml_value(key)} = {toml_value(value)}"
