"""Sixteen hostile members at a service, beside honest ones whose calls succeed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("service_attack")


@pytest.mark.slow
def test_an_attack_of_sixteen_stops_nobody_and_fills_no_memory(script, tmp_path):
    figures = script.attack(tmp_path, seconds=120.0, quiet=20.0, hostile=16, backbone="vit-ti")
    said = script.report(figures)
    assert figures["resident_peak"] < figures["resident_before"] + 2e9, said
    assert max(found["median"] for found in figures["attack"].values()) < 60, said
