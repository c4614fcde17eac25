"""Several tasks of one client: each is a member of its own, named ``<client>.task-<number>``.

A *member* sends one contribution: one client's part of one task. So a client with three tasks is
three members. Each can be added and removed alone, or all of them under the client's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MEMBER = re.compile(r"(?:(?P<client>.+)\.)?task-(?P<task>[0-9]+)")


def member_name(client: str, task: int) -> str:
    """Name the member that holds a client's part of a task.

    Example:
        >>> member_name("client-0", 2)
        'client-0.task-2'
    """
    return f"{client}.task-{task}"


def client_of(member: str) -> str:
    """Name the client of a member; one whose name says no task is its own client.

    Example:
        >>> client_of("client-0.task-2"), client_of("client-0")
        ('client-0', 'client-0')
    """
    found = MEMBER.fullmatch(member)
    return (found["client"] or member) if found else member


def task_of(member: str) -> int | None:
    """Return the number of a member's task; None if its name says none."""
    found = MEMBER.fullmatch(member)
    return int(found["task"]) if found else None


def members_of(name: str, members: Iterable[str]) -> tuple[str, ...]:
    """Return the member of this name, or else all members of the client of this name, by task."""
    members = tuple(members)
    if name in members:
        return (name,)
    own = [member for member in members if client_of(member) == name]
    return tuple(sorted(own, key=lambda member: (task_of(member) or 0, member)))


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
