"""Where pre-trained weights came from, and their license, as far as timm knows it.

What is not known stays empty. A file may hold any weights, whatever its architecture is called. The
license in a folder that timm wrote is that of timm's own weights of the architecture, also when
the folder's are others: it counts in timm's own repositories alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{1,60}")
"""An identifier; other text is for people, and not repeated."""


@dataclass(frozen=True)
class Origin:
    """Names of the hub for a backbone's weights."""

    hub: str = ""
    """Repository they were loaded from, such as ``timm/vit_base_patch16_224.augreg_in21k``."""
    license: str = ""
    """Identifier of their license, as timm gives it."""

    @classmethod
    def of(cls, cfg: Mapping[str, Any], *, from_hub: bool) -> Origin:
        """Read timm's configuration of weights that it loaded.

        Args:
            cfg: The configuration.
            from_hub: Whether they are the hub's, not those of a local folder.
        """
        hub = str(cfg.get("hf_hub_id") or "").partition("@")[0] if from_hub else ""
        hub = hub if REPOSITORY.fullmatch(hub) else ""
        named = str(cfg.get("license") or "").lower() if hub.startswith("timm/") else ""
        known = LICENSE.fullmatch(named) and named != "unknown"
        return cls(hub, named if known else "")

    @classmethod
    def parse(cls, values: object) -> Origin:
        """Rebuild from JSON; what is no name stays empty."""
        given = values if isinstance(values, Mapping) else {}
        names = {"hf_hub_id": given.get("hub"), "license": given.get("license")}
        return cls.of(names, from_hub=True)
