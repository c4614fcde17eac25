"""Whether a client runs software that this server can add up with its own."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping
from typing import Any

from fedcompo.errors import ContributionError

PACKAGES = ("fedcompo", "torch", "timm")
"""What a client's figures depend on."""


@functools.cache
def version(package: str) -> str:
    """Installed version of a package; looked up once, because that reads a file."""
    return importlib.metadata.version(package)


def of_this_process() -> dict[str, str]:
    """Installed versions by package."""
    return {package: version(package) for package in PACKAGES}


def check_versions(client: str, stated: Mapping[str, Any]) -> str:
    """Compare a client's versions with the server's.

    Args:
        client: Its name.
        stated: Versions by package.

    Returns:
        What should be known of them; empty: they are the same.

    Raises:
        ContributionError: If its fedcompo is of another release, which may mean something else by
            the same numbers.
    """
    own = of_this_process()
    theirs = {package: str(stated.get(package, "unknown")) for package in PACKAGES}
    if _release(theirs["fedcompo"]) != _release(own["fedcompo"]):
        raise ContributionError(
            f"Client {client!r} runs fedcompo {theirs['fedcompo']}, this server {own['fedcompo']}. "
            "Install the same release on both."
        )
    differing = [
        f"{package} {theirs[package]} (here {own[package]})"
        for package in PACKAGES
        if theirs[package].partition("+")[0] != own[package].partition("+")[0]
    ]
    return f"{client} runs {', '.join(differing)}." if differing else ""


def _release(text: str) -> tuple[str, ...]:
    """``1.2`` of ``1.2.3``."""
    return tuple(text.split(".")[:2])
