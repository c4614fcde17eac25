"""Names of clients: they become folders, so they must be plain."""

from __future__ import annotations

import unicodedata

from fedcompo.errors import ContributionError

LONGEST = 64
RESERVED = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10))}


def check_client_name(name: str) -> str:
    """Return the name if it can safely name a folder.

    Raises:
        ContributionError: If it is empty, longer than 64 characters, starts with a dot, is reserved
            on some system, or holds anything but letters, digits, spaces within, and ``-_.``.
    """
    faults = []
    if not 0 < len(name) <= LONGEST:
        faults.append(f"it has {len(name)} characters, expected 1 to {LONGEST}")
    if name != unicodedata.normalize("NFKC", name):
        faults.append("it is not in Unicode's compatible composed form (NFKC)")
    if bad := sorted({c for c in name if not (c.isalnum() or c in " -_.")}):
        faults.append(f"it holds {', '.join(map(repr, bad))}")
    if name[:1] in (".", " ", "-") or name[-1:] in (".", " "):
        faults.append("it starts or ends with a dot, a space or a hyphen")
    if name.split(".")[0].lower() in RESERVED:
        faults.append("some systems reserve it")
    if faults:
        raise ContributionError(
            f"{name[:80]!r} cannot be a client's name: {'; '.join(faults)}. "
            "Use letters, digits, spaces within, hyphens, underscores and dots."
        )
    return name
