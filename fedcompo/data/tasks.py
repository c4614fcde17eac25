"""What a client contributes in parts: each part is a member of its own, by a name of its own.

A *member* sends one contribution. A client with three tasks is three members, ``<client>.task-0``
to ``<client>.task-2``: each is its part of one task. A client, or a member, with four shards is
four members, ``<client>.shard-0`` to ``<client>.shard-3``: each is made of a part of its images
(:mod:`fedcompo.data.shards`). Each member can be added and removed alone, or all of them under the
client's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from fedcompo.errors import ContributionError
from fedcompo.names import MANY

TASK = re.compile(r"(?:(?P<client>.+)\.)?task-(?P<task>[0-9]+)")
SHARD = re.compile(r"(?P<whole>.+)\.shard-(?P<shard>0|[1-9][0-9]*)")


def member_name(client: str, task: int) -> str:
    """Name the member that holds a client's part of a task.

    Example:
        >>> member_name("client-0", 2)
        'client-0.task-2'
    """
    return f"{client}.task-{task}"


def shard_name(whole: str, shard: int | None) -> str:
    """Name the member that is a shard of a client, or of its part of a task; None: the whole.

    Example:
        >>> shard_name("client-0", 1), shard_name("client-0", None)
        ('client-0.shard-1', 'client-0')
    """
    return whole if shard is None else f"{whole}.shard-{shard}"


@lru_cache(maxsize=MANY)  # the checks of each member ask it of all others
def whole_of(member: str) -> str:
    """Name what a member is a shard of; one whose name says no shard is whole.

    Example:
        >>> whole_of("client-0.task-2.shard-1"), whole_of("client-0.task-2")
        ('client-0.task-2', 'client-0.task-2')
    """
    found = SHARD.fullmatch(member)
    return found["whole"] if found else member


@lru_cache(maxsize=MANY)
def shard_of(member: str) -> int | None:
    """Return the number of a member's shard; None if its name says none."""
    found = SHARD.fullmatch(member)
    return int(found["shard"]) if found else None


def check_whole(name: str) -> str:
    """Return the name of a client; raises ``ContributionError`` if it is that of a shard."""
    if (whole := whole_of(name)) != name:
        raise ContributionError(
            f"{name!r} cannot be a client's name: it names a shard of the client {whole!r} "
            "(`shards`). Choose a name that does not end so.",
            told="a name that ends in .shard-<number> is that of a shard, and no client's",
        )
    return name


def client_of(member: str) -> str:
    """Name the client of a member; one whose name says neither task nor shard is its own client.

    Example:
        >>> client_of("client-0.task-2"), client_of("client-0.shard-1"), client_of("client-0")
        ('client-0', 'client-0', 'client-0')
    """
    whole = whole_of(member)
    found = TASK.fullmatch(whole)
    return (found["client"] or whole) if found else whole


def task_of(member: str) -> int | None:
    """Return the number of a member's task; None if its name says none."""
    found = TASK.fullmatch(whole_of(member))
    return int(found["task"]) if found else None


def members_of(name: str, members: Iterable[str]) -> tuple[str, ...]:
    """Return the member of this name, or else all members of the client of this name, in order."""
    members = tuple(members)
    if name in members:
        return (name,)
    own = [member for member in members if name in (client_of(member), whole_of(member))]
    return tuple(sorted(own, key=lambda m: (task_of(m) or 0, shard_of(m) or 0, m)))


def one_of_each(members: Iterable[str]) -> tuple[str, ...]:
    """Return one member for all shards of a whole: the first. They share their test images.

    Example:
        >>> one_of_each(["a.shard-10", "a.shard-2", "b"])
        ('a.shard-2', 'b')
    """
    first: dict[str, str] = {}
    for member in sorted(members, key=lambda member: shard_of(member) or 0):
        first.setdefault(whole_of(member), member)
    return tuple(sorted(first.values()))


def arrivals_of(members: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Group members by their arrival: those of a task come together, any other comes alone.

    Returns:
        Members by the arrival's name: ``task-<number>``, by number, then the others by name.

    Example:
        >>> arrivals_of(["b.task-1", "a.task-1", "b.task-0"])
        {'task-0': ('b.task-0',), 'task-1': ('a.task-1', 'b.task-1')}
    """
    tasks: dict[int, list[str]] = {}
    alone: dict[str, tuple[str, ...]] = {}
    for member in sorted(members):
        if (task := task_of(member)) is None:
            alone[member] = (member,)
        else:
            tasks.setdefault(task, []).append(member)
    return {f"task-{task}": tuple(tasks[task]) for task in sorted(tasks)} | alone
