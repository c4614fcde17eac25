"""The scenarios that come with the project hold settings that exist, with values that pass."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fedcompo.config.run import RunConfig

SCENARIOS = sorted((Path(__file__).resolve().parents[2] / "simulations").glob("*.toml"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_a_shipped_scenario_is_valid_and_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    RunConfig.parse(tomllib.loads(text))
    assert text.startswith("# ")


def test_the_digits_scenario_is_the_default():
    path = next(path for path in SCENARIOS if path.stem == "digits")
    assert RunConfig.parse(tomllib.loads(path.read_text(encoding="utf-8"))) == RunConfig()
