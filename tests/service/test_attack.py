"""Sixteen hostile members at a service, beside honest ones whose calls succeed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

CALLS = {"list", "fetch", "publish", "compose", "operator lists", "operator composes"}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("service_attack")


def test_a_short_attack_stops_nobody(script, tmp_path):
    figures = script.attack(tmp_path, seconds=0.5, quiet=0.0, hostile=2, backbone="tiny")
    assert set(figures["attack"]) == {*CALLS, "leave"}
    assert "operator composes" in script.report(figures)


@pytest.mark.slow
def test_an_attack_of_sixteen_stops_nobody_and_fills_no_memory(script, tmp_path):
    figures = script.attack(tmp_path, seconds=120.0, quiet=20.0, hostile=16, backbone="vit-ti")
    said = script.report(figures)
    assert set(figures["attack"]) == {*CALLS, "leave"}, said
    assert figures["resident_peak"] < figures["resident_before"] + 2e9, said
    assert max(found["median"] for found in figures["attack"].values()) < 60, said
