"""Who may have which class: a table that an operator keeps in the registry's folder.

``owners.toml`` is read at every change; whoever is a member already stays. A class that it does not
name is open to everybody::

    cat = ["hospital-a", "hospital-b"]
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedcompo.data.tasks import whole_of
from fedcompo.errors import ConfigError, ContributionError

OWNERS = "owners.toml"
Owners = Mapping[str, list[str]]
"""The only clients that may have a class, by class."""


def read_owners(path: Path) -> Owners:
    """Read a table; raises ``ConfigError`` if it is missing, or is none."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        if wrong := [name for name, clients in table.items() if not isinstance(clients, list)]:
            raise ValueError(f'{wrong[0]!r} needs a list of clients, such as ["hospital-a"]')
    except (OSError, ValueError) as error:
        raise ConfigError(f"The owners of classes in {path} cannot be read: {error}.") from error
    return table


def owners_in(registry: Path) -> Owners:
    """Read the table of a registry; empty if it has none."""
    return read_owners(registry / OWNERS) if (registry / OWNERS).exists() else {}


def check_owner(client: str, classes: Iterable[str], owners: Owners) -> None:
    """Raise ``ContributionError`` if a client has a class that belongs to others alone.

    What a client may have, its shards may.
    """
    for name in classes:
        if {client, whole_of(client)}.isdisjoint(owners.get(name, [client])):
            raise ContributionError(
                f"Client {client!r} claims the class {name!r}, which {OWNERS} keeps for others. "
                "Give the class another name, or ask the operator to add the client there."
            )
