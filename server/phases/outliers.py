"""Leave out clients whose features would outweigh everybody else's in the joint head."""

from __future__ import annotations

from collections.abc import Collection

from fedcompo.composition.totals import check_alike
from fedcompo.errors import ContributionError
from fedcompo.method.statistics import FeatureSums
from fedcompo.registry.registry import Registry
from server.exchange.checks import too_large
from server.phases.roster import Roster


def leave_out_strange(
    roster: Roster, coming: Collection[str], registry: Registry | None = None
) -> None:
    """Compare the features of the clients that come with all that are described, and with members.

    Args:
        roster: Knows their statistics.
        coming: Who may be left out.
        registry: Which they are to join; None: none.
    """
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
