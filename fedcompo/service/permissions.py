"""Who may do what.

================  ==============================  ========
call              a client                        operator
================  ==============================  ========
List, Verify      yes                             yes
health            yes                             yes
reflection        yes                             yes
Publish           its own                         its own
Fetch             its own                         any
Compose           as the :class:`Audience` says   yes
Remove            its own                         any
================  ==============================  ========

"Its own" is the contribution that bears the name in the certificate. Nobody publishes in another's
name, operators neither: what comes by mail they add at the registry itself.

A model of one client alone is θ₀ plus that client's task vector, with a head fitted to its
statistics, and of two models of many the difference can be taken: whoever composes freely can work
out the task vectors, though Fisher, statistics and own head of a client are never sent. Where
members shall not see that of each other, let operators alone compose.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from fedcompo.service.access import Peer
from fedcompo.service.refusals import Code, Refused


class Audience(StrEnum):
    """Who may compose."""

    MEMBERS = "members"
    """Clients that are in the registry now, and operators."""
    EVERYONE = "everyone"
    """Whoever has a certificate of the authority."""
    OPERATORS = "operators"


def require_owner(peer: Peer, client: str, what: str) -> None:
    """Raise ``Refused`` unless the contribution is the caller's own, or an operator calls."""
    if peer.name != client and not peer.operator:
        raise Refused(
            Code.PERMISSION_DENIED,
            f"{peer.name} may {what} its own contribution alone, not that of {client!r}. "
            "Ask an operator.",
        )


def require_named(peer: Peer, client: object) -> None:
    """Raise ``Refused`` unless a contribution that is handed in bears the caller's name."""
    if client != peer.name:
        raise Refused(
            Code.PERMISSION_DENIED,
            f"The contribution is of client {str(client)[:80]!r}, but the certificate is of "
            f"{peer.name!r}. Everyone publishes in its own name.",
        )


def require_audience(peer: Peer, audience: Audience, members: Iterable[str]) -> None:
    """Raise ``Refused`` unless the caller may compose."""
    allowed = peer.operator or audience is Audience.EVERYONE
    if allowed or (audience is Audience.MEMBERS and peer.name in members):
        return
    whom = "clients that are in it" if audience is Audience.MEMBERS else "operators"
    raise Refused(
        Code.PERMISSION_DENIED,
        f"Of this registry {whom} may compose models; {peer.name} is none of them.",
    )
