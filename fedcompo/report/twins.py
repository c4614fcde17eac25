"""Classes whose names differ only in what a reader hardly sees: case, blanks, Unicode form."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping

from fedcompo.names import number

SHOWN = 5
"""Number of groups, of spellings and of clients that a note lists; it counts the rest."""
BLANK = ("Zs", "Zl", "Zp", "Cc", "Cf")
"""Unicode's categories of blanks, and of control and format characters."""
FILLERS = {*"\u034f\u115f\u1160\u17b4\u17b5\u2800", *map(chr, range(0xFE00, 0xFE10))}
"""What else nobody sees: fillers, and selectors of a glyph's variant."""

Spellings = dict[str, list[str]]
"""The spellings of what may be one class, each with the clients that use it."""


def twins(owned: Mapping[str, Iterable[str]]) -> list[Spellings]:
    """Find classes that may be one, spelt differently; they are given by client.

    Returns:
        Groups of two spellings or more that have the same :func:`key`; all in order.
    """
    groups: dict[str, Spellings] = {}
    for client, classes in sorted(owned.items()):
        for name in sorted(set(classes)):
            groups.setdefault(key(name), {}).setdefault(name, []).append(client)
    return [dict(sorted(group.items())) for _, group in sorted(groups.items()) if len(group) > 1]


def key(name: str) -> str:
    """Fold case and compatible forms (NFKC), and drop blanks, control and format characters."""
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", name).casefold())
    return unicodedata.normalize("NFKC", "".join(c for c in folded if not _unseen(c)))


def note_on(groups: list[Spellings]) -> str:
    """Write a note on twins that says what to do; empty if there are none."""
    if not groups:
        return ""
    listed = few(
        [few([f"{visible(s)} ({few(who)})" for s, who in group.items()]) for group in groups], "; "
    )
    return (
        "Classes whose names differ only in case, blanks, invisible characters or Unicode form "
        f"count as different classes, and lower the accuracy if they are one: {listed}. "
        "If they are one, let these clients spell it alike and train again, members of a registry "
        "with `replace = true`."
    )


def visible(name: str) -> str:
    """Quote a name; characters that are hard to see or to tell apart stand as their numbers."""
    seen = "".join(c for c in name if not _unseen(c))
    loose = not unicodedata.is_normalized("NFC", seen)  # accents may stand by themselves

    def hidden(c: str) -> bool:
        compatible = unicodedata.is_normalized("NFKC", c)
        unseen = not c.isprintable() or c in FILLERS
        return unseen or not compatible or bool(loose and unicodedata.combining(c))

    return f"'{''.join(number(c) if hidden(c) else c for c in name)}'"


def _unseen(c: str) -> bool:
    return unicodedata.category(c) in BLANK or c in FILLERS


def few(texts: list[str], between: str = ", ") -> str:
    """Join the first texts, and say how many more there are."""
    more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return between.join([*texts[:SHOWN], *more])
