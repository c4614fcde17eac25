"""Keeps a house's proxies away from what stays on this machine.

Flower's HTTP client, httpx, reads all of these variables before it connects anywhere: one that it
cannot use ends it, even where it needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1,localhost,::1"


def past_loopback(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which proxies are left that Flower can use, and none for loopback.

    What is left out could not be used to reach the hub either, whose client is the same.
    """
    usable = {k: v for k, v in environment.items() if not _proxy(k) or not v or _usable(v)}
    for key in ("NO_PROXY", "no_proxy"):
        names = environment.get(key, "").replace("[", "").replace("]", "")  # not as in a URL
        usable[key] = ",".join(filter(None, [names, LOOPBACK]))
    return usable


def _proxy(key: str) -> bool:
    return key.lower().endswith("_proxy") and not key.lower().startswith("no_")


def _usable(value: str) -> bool:
    try:
        place = urlsplit(value if "://" in value else f"http://{value}")
        place.port  # noqa: B018  raises where it is no number
    except ValueError:
        return False
    socks = place.scheme in ("socks5", "socks5h") and find_spec("socksio") is not None
    return place.scheme in ("http", "https") or socks
