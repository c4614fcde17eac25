"""What each client weighs in the joint head; who would outweigh all others is left out."""

from __future__ import annotations

from collections.abc import Collection

from fedcompo.composition.claims import capped
from fedcompo.composition.settings import CompositionSettings
from fedcompo.composition.totals import check_alike
from fedcompo.errors import ContributionError
from fedcompo.method.contribution import AnyStatistics, counts_of
from fedcompo.method.statistics import FeatureSums
from fedcompo.registry.registry import Registry
from server.exchange.checks import too_large
from server.phases.roster import Roster


def leave_out_strange(
    roster: Roster, coming: Collection[str], registry: Registry | None = None
) -> None:
    """Compare the features of those coming with all that are described, and with members."""
    described = roster.participants.described
    sums = {c: described[c].statistics for c in roster.parties}
    squares = {c: own.mean_square for c, own in sums.items() if isinstance(own, FeatureSums)}
    reasons = too_large("second moment of the features", squares)
    if registry is not None and registry.clients and squares:
        total = registry.total_statistics()
        for client in {*coming} & sums.keys():
            members = map(registry.contribution, registry.clients)
            try:
                check_alike(client, sums[client], total, members)
            except ContributionError as error:
                reasons[client] = str(error)
    for client in reasons.keys() & {*coming}:
        roster.leave_out(client, reasons[client])


def weighed(
    roster: Roster, settings: CompositionSettings
) -> tuple[CompositionSettings, dict[str, AnyStatistics]]:
    """Return the settings with their caps, and the statistics of all clients of the run, capped."""
    described = roster.participants.described
    stated = {client: described[client].statistics for client in roster.parties}
    settings = settings.with_caps(map(counts_of, stated.values()))
    cap = settings.class_cap
    if lower := sorted(c for c, own in stated.items() if max(counts_of(own).values()) > cap):
        roster.exchange.books.note(
            f"{', '.join(lower)} weigh by {cap} images of a class, not by all that they state, "
            "which are more than `max-count-ratio` allows."
        )
    return settings, {client: capped(own, cap) for client, own in stated.items()}
