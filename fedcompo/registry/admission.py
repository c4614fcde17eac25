"""The one door: every contribution is checked here before anything changes.

A run and ``compose`` of folders call :func:`admit` for each contribution, and :func:`outliers` when
all are there. ``add`` and ``publish`` check the same before and after the running sum is written,
for which task vectors are rounded anyway. A run calls :func:`check_described` before, so that
nobody trains in vain. What a contribution may cost follows from
:data:`~fedcompo.registry.company.LIMITS`, not from what is sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from fedcompo.composition.fixed_point import rounded
from fedcompo.composition.lengths import Rounding, squared_near
from fedcompo.config.choices import Method, Statistics
from fedcompo.data.tasks import shard_of, whole_of
from fedcompo.errors import ContributionError
from fedcompo.method.contribution import AnyStatistics, Contribution, counts_of
from fedcompo.method.ranges import beyond
from fedcompo.method.statistics import FeatureSums
from fedcompo.method.task_vector import TaskVector
from fedcompo.names import check_class_names, check_client_name, check_distinct
from fedcompo.registry.company import LIMITS, Company, Known
from fedcompo.registry.owners import check_owner
from fedcompo.registry.removed import statistics_digest, vector_digest
from fedcompo.runtime import in_order
from fedcompo.storage.files import canonical


def admit(contribution: Contribution, company: Company, *, empty: bool = False) -> Known:
    """Refuse a contribution that cannot be composed with the others, or that costs too much.

    Returns:
        What the next ones are compared with.

    Raises:
        BackboneMismatch, ContributionError: As :func:`check_parts` and :func:`check_change` do.
    """
    _check_told(contribution, company)
    client, vector = contribution.client, contribution.task_vector
    vector.check_names(company.shapes, base=company.base, owner=f"client {client!r}")
    rounding = rounding_of(client, vector, company)
    digest = vector_digest(vector, rounding)
    known = Known(contribution.head.classes, math.sqrt(rounding.squared_norm), digest)
    check_change(client, known, company, empty=empty)
    return known


def check_parts(contribution: Contribution, company: Company) -> None:
    """Refuse what shows before the task vector is rounded.

    Raises:
        BackboneMismatch: If it was trained on other pre-trained weights.
        ContributionError: If its name, classes, task vector, head, statistics, counts, lineage,
            settings or Fisher cannot be used.
    """
    _check_told(contribution, company)
    owner = f"client {contribution.client!r}"
    contribution.task_vector.check(company.shapes, base=company.base, owner=owner)


def _check_told(contribution: Contribution, company: Company) -> None:
    """The same of all but the task vector."""
    client, classes = contribution.client, contribution.head.classes
    owner = f"client {client!r}"
    _check_statements(contribution, owner)
    check_described(client, classes, contribution.statistics, company)
    _check_total(contribution, owner)
    contribution.head.check(classes, company.num_features, owner)
    if contribution.fisher is not None:
        contribution.fisher.check(company.shapes, owner=owner)


def check_change(client: str, own: Known, company: Company, *, empty: bool) -> None:
    """Refuse a task vector that is another client's, or was that of one that was removed.

    Refuse one of zeros too, unless ``empty``: in a run a client may learn nothing; but nobody
    becomes a member, with a member's rights, by handing in nothing. Raises ``ContributionError``.
    """
    if not (own.norm or empty):
        raise ContributionError(
            f"The task vector of client {client!r} changes nothing: all of it is zero. Train it "
            "with a higher `learning-rate`, for more epochs, or with more classes."
        )
    for other, theirs in company.members.items():
        if other != client and own.norm and theirs.rounded_sha256 == own.rounded_sha256:
            raise ContributionError(
                f"Client {client!r} sent, byte for byte, the task vector of {other!r}: a copy of "
                "a contribution that is not its own."
            )
    if own.norm:
        company.removed.refuse(client, "task vector", own.rounded_sha256)


def outliers(newcomers: Iterable[str], company: Company) -> dict[str, str]:
    r"""Find newcomers whose :math:`\lVert\tau_c\rVert` exceeds a multiple of what is usual.

    The multiple is ``max-norm-ratio``; 0: none is refused. Members whose length is not known do not
    count.

    Args:
        newcomers: Clients of the company that may be refused.
        company: Everyone, the newcomers too.

    Returns:
        The reason to refuse the task vector, by client.
    """
    ratio, known = company.settings.max_norm_ratio, company.members
    norms = {client: own.norm for client, own in known.items() if own.norm is not None}
    usual = beyond(norms, ratio) if ratio else {}
    return {
        client: (
            f"The task vector of client {client!r} has norm {norms[client]:.3g}, more than "
            f"`max-norm-ratio` = {ratio:g} times the median {usual[client]:.3g} of the others'. "
            "Look at its data and its learning rate."
        )
        for client in newcomers
        if client in usual
    }


def check_described(
    client: str, classes: tuple[str, ...], statistics: AnyStatistics, company: Company
) -> None:
    """Refuse a name, classes or statistics that no joint head can be made of with the others.

    Raises:
        ContributionError: If the name could be another's; if classes are none, too many, not
            sorted, or badly named; if the statistics are those of another client that was removed;
            or as :func:`check_features` does.
    """
    owner = f"client {client!r}"
    check_distinct(check_client_name(client), company.members)
    _check_part(client, company.members)
    if not 0 < len(classes) <= LIMITS.classes or list(classes) != sorted(set(classes)):
        raise ContributionError(
            f"{owner} names {len(classes)} classes, {list(classes[:5])} …; expected 1 to "
            f"{LIMITS.classes}, sorted, each once."
        )
    check_owner(client, classes, company.owners)
    others = set().union(*(m.classes for name, m in company.members.items() if name != client))
    used = others.union(company.members[client].classes if client in company.members else ())
    check_class_names((name for name in classes if name not in used), owner)  # old ones stay
    if (size := sum(len(name.encode()) for name in classes)) > LIMITS.class_names:
        raise ContributionError(
            f"The names of the classes of {owner} have {size} bytes, expected at most "
            f"{LIMITS.class_names}. Use shorter names."
        )
    together, kind = len(others.union(classes)), company.settings.statistics
    most = LIMITS.drawn_classes if kind is Statistics.MIXTURES else LIMITS.all_classes
    if together > most:
        raise ContributionError(
            f"With {owner} there would be {together} classes in all, and with `statistics = {kind}`"
            f" there may be {most}. Use another registry"
            + (", with `statistics = sums`." if kind is Statistics.MIXTURES else ".")
        )
    check_features(statistics, classes, company.num_features, kind, owner)
    company.removed.refuse(client, "statistics", statistics_digest(statistics))


def _check_part(client: str, members: Iterable[str]) -> None:
    """Refuse the shard of a client that is there whole, and the whole of one there in shards."""
    own = whole_of(client)
    check_distinct(own, map(whole_of, members))
    for member in members:
        if whole_of(member) == own and (shard_of(member) is None) != (shard_of(client) is None):
            raise ContributionError(
                f"{client!r} cannot be added beside {member!r}: images would count twice. Remove "
                f"{member!r} first, or let the client take part as it did."
            )


def check_features(
    statistics: AnyStatistics,
    classes: tuple[str, ...],
    num_features: int,
    expected: Statistics,
    owner: str,
) -> None:
    """Refuse statistics of another kind, of other classes, or of no images.

    Raises:
        ContributionError: Says whose they are, and what was expected.
    """
    check_kind(statistics, expected, owner)
    if isinstance(statistics, FeatureSums):
        statistics.check(classes, num_features, owner)
        return
    if set(statistics) != set(classes):
        raise ContributionError(
            f"The statistics of {owner} describe the classes {sorted(statistics)}, expected "
            f"{list(classes)}."
        )
    for mixture in statistics.values():
        mixture.check(num_features, owner)
    if (most := max(own.weights.numel() for own in statistics.values())) > LIMITS.components:
        raise ContributionError(
            f"A mixture of {owner} has {most} components, and may have {LIMITS.components}."
        )


def check_kind(own: AnyStatistics, expected: Statistics, owner: str) -> None:
    """Refuse mixtures beside sums, and sums beside mixtures; raises ``ContributionError``."""
    actual = Statistics.SUMS if isinstance(own, FeatureSums) else Statistics.MIXTURES
    if actual is not expected:
        raise ContributionError(
            f"{owner} describes its features by {actual}, the others by {expected}. Train it with "
            f"`statistics = {expected}`, or train all of them anew with `statistics = {actual}` "
            "into a new registry."
        )


def rounding_of(client: str, vector: TaskVector, company: Company) -> Rounding:
    """Return the length of a task vector, and its digest where one is compared with.

    Without a digest the length is near that on the grid, by which a registry decides at last.
    Weights are read once, and checked.

    Raises:
        ContributionError: If it does not fit, or is far longer than the weights: its training
            diverged.
    """
    rounding = Rounding(client, hashed=company.removed.by_rounding)
    names, weights, owner = sorted(company.shapes), company.weights, f"client {client!r}"
    if company.removed.by_rounding:
        for name in names:
            own = vector.checked(name, weights[name], owner=owner)
            values = rounded(own, name, weights[name], owner=owner)
            rounding.update(name, values, weights[name])
        return rounding

    def length(name: str) -> tuple[str, float]:
        own = vector.checked(name, weights[name], owner=owner)
        return name, squared_near(own, name, weights[name], owner=owner)

    for name, squared in in_order(length, names):
        rounding.lengthen(name, squared, weights[name])
    return rounding


def _check_statements(contribution: Contribution, owner: str) -> None:
    """Refuse names, lineage and settings that are no such thing, or too long: JSON can hold any."""
    lineage, settings = contribution.lineage, contribution.settings
    named = lineage.anchored_by, lineage.aligned_with, lineage.ensemble
    lists = ((contribution.client, lineage.method), contribution.head.classes, *named)
    if not all(isinstance(n, tuple) and all(isinstance(t, str) for t in n) for n in lists):
        raise ContributionError(f"{owner} has names of classes or clients that are no text.")
    if lineage.method not in list(Method) or max(map(len, named)) > LIMITS.lineage:
        raise ContributionError(
            f"{owner} has a lineage of the method {lineage.method[:80]!r} with up to "
            f"{max(map(len, named))} names a list, expected {Method.ITA} or {Method.IEL} and at "
            f"most {LIMITS.lineage}."
        )
    try:
        for name in lineage.shaped_by:
            check_client_name(name)
    except ContributionError as error:
        raise ContributionError(f"In the lineage of {owner}, {error}") from None
    if not isinstance(settings, dict) or not all(
        isinstance(value, str | int | float) for value in settings.values()
    ):
        raise ContributionError(f"{owner} has settings that are no table of names and values.")
    if (size := len(canonical(settings))) > LIMITS.settings:
        raise ContributionError(
            f"The settings of {owner} have {size} bytes, and may have {LIMITS.settings}."
        )


def _check_total(contribution: Contribution, owner: str) -> None:
    """Refuse a number of examples other than that of its classes together.

    Beside mixtures, which are older, it may differ.
    """
    stated, counted = contribution.num_examples, sum(counts_of(contribution.statistics).values())
    free = not isinstance(contribution.statistics, FeatureSums)
    right = type(stated) is int and 1 <= stated <= LIMITS.examples
    if not (right and (free or stated == counted)):
        raise ContributionError(
            f"{owner} names {str(stated)[:40]} examples in all, and {counted} by class; expected "
            f"the same number, at most {LIMITS.examples}."
        )
