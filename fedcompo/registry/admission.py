"""Checks a contribution before the registry changes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from fedcompo.config.choices import Statistics
from fedcompo.errors import ContributionError, FileFormatError
from fedcompo.method.contribution import (
    AnyStatistics,
    Contribution,
    check_statistics,
    counts_of,
)
from fedcompo.method.deltas import Weights
from fedcompo.method.statistics import FeatureSums
from fedcompo.names import check_client_name, check_distinct
from fedcompo.storage.files import CARD, CONTENT, FISHER, sync

PIECE = 1 << 22
"""Bytes copied at a time."""


def stage_contribution(source: Contribution | Path, folder: Path) -> Contribution:
    """Copy a contribution to a new folder and check every byte of the copy.

    Args:
        source: A contribution, or the folder of one; of that, only its own files are taken.
        folder: Folder of the copy; must not exist.

    Returns:
        The staged contribution, streamed.

    Raises:
        FileFormatError: If a file is missing, truncated or altered.
    """
    if isinstance(source, Contribution):
        source.save(folder)
    else:
        folder.mkdir(parents=True)
        for name in (CONTENT, FISHER, CARD):
            if (source / name).is_file():
                _copy(source / name, folder / name)
    try:
        staged = Contribution.open(folder, check=True)
    except FileFormatError as error:
        if isinstance(source, Path):  # name the file that will still be there
            raise FileFormatError(str(error).replace(str(folder), str(source))) from error
        raise
    if staged.fisher is None:  # the card names none, so that one is not its own
        (folder / FISHER).unlink(missing_ok=True)
    return staged


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as original, target.open("xb") as copy:
        shutil.copyfileobj(original, copy, PIECE)
        sync(copy)


def check_contribution(
    contribution: Contribution,
    *,
    theta_shapes: Weights,
    base: str,
    num_features: int,
    statistics: Statistics,
    members: Iterable[str],
) -> None:
    """Refuse a contribution that cannot be composed with the others.

    Args:
        contribution: With its tensors in memory, or streamed.
        theta_shapes: The target weights; only their shapes matter.
        base: Fingerprint of the pre-trained weights.
        num_features: Width of the backbone's features.
        statistics: What the others describe their features by.
        members: Names that the contribution's name must differ from.

    Raises:
        BackboneMismatch: If it was trained on other pre-trained weights.
        ContributionError: If its name, task vector, head, statistics or Fisher cannot be used.
    """
    owner = f"client {contribution.client!r}"
    _check_statements(contribution, owner)
    check_distinct(check_client_name(contribution.client), members)
    contribution.task_vector.check(theta_shapes, base=base, owner=owner)
    contribution.head.check(contribution.head.classes, num_features, owner)
    classes = contribution.head.classes
    if not classes or list(classes) != sorted(set(classes)):
        raise ContributionError(f"{owner} names the classes {classes}, expected sorted, each once.")
    check_statistics(contribution.statistics, classes, num_features, owner)
    _check_counts(contribution, owner)
    check_kind(contribution.statistics, statistics, owner)
    if contribution.fisher is not None:
        contribution.fisher.check(theta_shapes, owner=owner)


def check_kind(own: AnyStatistics, expected: Statistics, owner: str) -> None:
    """Refuse mixtures beside sums, and sums beside mixtures; raises ``ContributionError``."""
    actual = Statistics.SUMS if isinstance(own, FeatureSums) else Statistics.MIXTURES
    if actual is not expected:
        raise ContributionError(
            f"{owner} describes its features by {actual}, the others by {expected}. Train it with "
            f"`statistics = {expected}`, or train all of them anew with `statistics = {actual}` "
            "into a new registry."
        )


def _check_statements(contribution: Contribution, owner: str) -> None:
    """Refuse names and settings of the wrong type: JSON can hold any."""
    lineage = contribution.lineage
    lists = (
        (contribution.client, lineage.method),
        contribution.head.classes,
        lineage.anchored_by,
        lineage.aligned_with,
        lineage.ensemble,
    )
    if not all(isinstance(names, tuple) and all(map(_is_text, names)) for names in lists):
        raise ContributionError(f"{owner} has names of classes or clients that are no text.")
    if not isinstance(contribution.settings, dict):
        raise ContributionError(f"{owner} has settings that are no table of names and values.")


def _check_counts(contribution: Contribution, owner: str) -> None:
    """Refuse numbers of examples that nobody can have."""
    counts = [contribution.num_examples, *counts_of(contribution.statistics).values()]
    if not all(type(count) is int and count >= 1 for count in counts):
        raise ContributionError(
            f"{owner} names {counts} examples, in all and by class; expected whole numbers from 1."
        )


def _is_text(name: object) -> bool:
    """Whether a value is text; half of a surrogate pair, which JSON can hold, is not."""
    return isinstance(name, str) and name.encode("utf-8", "replace").decode() == name
