"""Fixtures of all federations in this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from round_runs import draw_images


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder for each client."""
    return draw_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> Path:
    """Where clients keep what they keep between rounds."""
    monkeypatch.setenv("FEDCOMPO_STATE", str(tmp_path / "state"))
    return tmp_path / "state"
