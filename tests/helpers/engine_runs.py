"""What tests that start Flower's real engine share: small settings, and a limit of time."""

from __future__ import annotations

import sys
from pathlib import Path

BIN = Path(sys.executable).parent
QUICK = {
    "num-tasks": 2,
    "num-classes": 4,
    "images-per-class": 12,
    "local-epochs": 1,
    "rank": 2,
    "fisher-examples": 6,
}
LIMIT = 300
"""Seconds after which a run has hung."""
