"""Which column of a table says what: by its name, or as `data` chooses after a ``#``.

Such as ``manifest:scans.csv#label=diagnosis`` or ``hf:uoft-cs/cifar100#label=fine_label``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from fedcompo.errors import DataError
from fedcompo.names import did_you_mean
from fedcompo.report.twins import few

SPELLINGS = {
    "path": "file filename file_name file_path filepath image image_file image_name image_path "
    "img img_path picture",
    "label": "class class_name classname category target diagnosis y",
    "split": "set subset partition part",
    "client": "client_id site hospital centre center institution node",
    "group": "patient patient_id person person_id subject subject_id case_id",
}
"""Other names of columns, in upper or lower case; blanks and hyphens count as underscores."""
CHOICE = re.compile(r"\w+=[^,#=]+(?:,\w+=[^,#=]+)*")
Choices = tuple[tuple[str, str], ...]
"""What `data` chooses, such as the column of a role."""
logger = logging.getLogger(__name__)
Column = TypeVar("Column")
GROUP = "group"
"""Role of the column that says which images belong together, such as a patient's."""


def with_choices(text: str) -> tuple[str, Choices]:
    """Split ``<path>#role=column,role=column`` at its last ``#``."""
    place, mark, chosen = text.rpartition("#")
    if not mark or not CHOICE.fullmatch(chosen):
        return text, ()
    pairs = (pair.partition("=") for pair in chosen.split(","))
    return place, tuple((role, value) for role, _, value in pairs)


def check_roles(choices: Choices, roles: Sequence[str], *, source: str) -> dict[str, str]:
    """Return the choices by role; refuse unknown roles."""
    if unknown := [(role, value) for role, value in choices if role not in roles]:
        role, value = unknown[0]
        raise DataError(
            f"`data` chooses #{role}={value} of {source}, expected one of {', '.join(roles)}."
            + did_you_mean(role, roles, lambda near: f"#{near}={value}")
        )
    return dict(choices)


def called(role: str, columns: Sequence[str]) -> list[str]:
    """Return the columns that have the name of a role, or else all that are called alike."""
    plain = {column: re.sub(r"[\s-]+", "_", column.strip().casefold()) for column in columns}
    exact = [column for column in columns if plain[column] == role]
    return exact or [column for column in columns if plain[column] in SPELLINGS[role].split()]


def pick(
    role: str,
    candidates: Sequence[str],
    *,
    chosen: Mapping[str, str],
    columns: Sequence[str],
    source: str,
    needed: bool = True,
) -> str:
    """Return the column of a role: the chosen one, or the only candidate.

    Args:
        role: Such as ``label``.
        candidates: Columns that may have it.
        chosen: Columns that `data` chooses, by role.
        columns: All columns, for messages.
        source: Where they are, for messages.
        needed: Whether there must be one; else the result may be empty.

    Raises:
        DataError: If there is none or more than one, or the chosen one does not exist.
    """
    if column := chosen.get(role):
        if column not in columns:
            raise DataError(
                f"{source} has no column {column!r}; columns found: {few([*columns])}."
                + did_you_mean(column, columns, lambda near: f"#{role}={near}")
            )
        return column
    if len(candidates) == 1:
        if candidates[0] != role:
            logger.info("%s: the column %r is the %s.", source, candidates[0], role)
        return candidates[0]
    if not candidates and not needed:
        return ""
    what = f"{len(candidates)} columns that may be the {role}: " if candidates else ""
    listed = few([*map(repr, candidates or columns)])
    raise DataError(
        f"{source} has {what or f'no column that is surely the {role}; columns found: '}{listed}. "
        f"Choose it by a # at the end of `data`: #{role}=<column>."
    )


def with_group(
    columns: Mapping[str, Column], chosen: Mapping[str, str], source: str
) -> dict[str, Column]:
    """Return the columns, and the one that `data` chooses for the groups under that name too."""
    if GROUP not in chosen:
        return dict(columns)
    column = pick(GROUP, (), chosen=chosen, columns=[*columns], source=source)
    return {**columns, GROUP: columns[column]}
