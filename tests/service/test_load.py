"""A few clients publish and compose at once while one is removed; the benchmark takes 64."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from registry_builders import registry_of

from fedcompo.service.access import Audience
from fedcompo.service.limits import Limits
from fedcompo.service.server import Server, Settings


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("service_load")


def test_publishing_and_composing_at_once_while_one_leaves(script, tmp_path, capsys):
    load = script.Load(tmp_path, clients=8, rounds=2)
    registry = registry_of(tmp_path / "registry", script.contribution(0))
    settings = Settings(
        registry.path,
        load.authority.credential.certificate,
        load.authority.issue_server(["localhost"]),
        port=0,
        audience=Audience.MEMBERS,
        least=1,
        limits=Limits(grace=5.0),
    )
    with Server(settings) as server:
        seconds = script.run(load, f"localhost:{server.port}")
    script.check(load, registry)
    assert {what: len(times) for what, times in load.seconds.items()} == {
        "publish": 7,
        "compose": 14,
        "remove": 1,
    }
    figures = {what: script.summary(times) for what, times in load.seconds.items()}
    script.report(
        {
            "clients": 8,
            "seconds": seconds,
            "resident_before": 1,
            "resident_peak": 2,
            "calls": figures,
        }
    )
    assert "8 clients" in capsys.readouterr().out
