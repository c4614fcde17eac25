"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets and weights; tests that need it are skipped where there is none."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FEDCOMPO_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set FEDCOMPO_DATA to a folder that has it")
    return folder
