"""The engine of this very process; that its bits are Flower's is shown in ``test_simulation``."""

from __future__ import annotations

import json
import logging
import os

import pytest
import torch
from app_runs import QUICK
from cli_runs import run
from flwr.common.logger import FLOWER_LOGGER

from clients.local import LocalClient
from fedcompo import simulate
from fedcompo.errors import ConfigError, LaunchError
from fedcompo.registry.registry import Registry


def state_of_this_process():
    handlers = FLOWER_LOGGER.handlers[:], logging.getLogger().handlers[:]
    return dict(os.environ), handlers, torch.get_deterministic_debug_mode()


def test_a_run_leaves_its_folder_and_nothing_in_this_process(tmp_path, capfd):
    before, events = state_of_this_process(), []
    results = simulate(QUICK, output=tmp_path / "run", engine="in-process", on_event=events.append)
    assert state_of_this_process() == before
    assert capfd.readouterr().out == ""
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert len(Registry(tmp_path / "run" / "registry").clients) == 3
    told = [(e["event"], e.get("phase"), e.get("client")) for e in events]
    assert told[0] == ("run", None, None)
    assert told[-1] == ("finished", None, None)
    assert [c for kind, phase, c in told if (kind, phase) == ("client", "train")] == [
        "client-0",
        "client-1",
        "client-2",
    ]
    log = (tmp_path / "run" / "flower.log").read_text()
    assert "train: client-1 answered" in log
    assert "Epoch 1 of 1" not in log
    assert "Epoch 1 of 1" in (tmp_path / "run" / "clients" / "client-1.log").read_text()


def test_what_a_client_raises_stands_in_its_log_and_why_a_run_failed_is_said(tmp_path, monkeypatch):
    def train(self, request):
        raise RuntimeError("the dog ate the weights")

    monkeypatch.setattr(LocalClient, "train", train)
    with pytest.raises(LaunchError, match=r"^The run failed: 0 usable client\(s\)") as caught:
        simulate(QUICK, output=tmp_path / "run", engine="in-process")
    assert f"The clients' own logs: {tmp_path / 'run' / 'clients'}" in str(caught.value)
    own = (tmp_path / "run" / "clients" / "client-0.log").read_text()
    assert "Traceback (most recent call last)" in own
    assert "the dog ate the weights" in own
    log = (tmp_path / "run" / "flower.log").read_text()
    assert "the dog ate" not in log
    assert "Traceback (most recent call last)" in log
    assert not (tmp_path / "run" / "results.json").exists()


def test_an_interrupted_run_goes_on_without_training_anyone_again(tmp_path, monkeypatch):
    output, train, trained = tmp_path / "run", LocalClient.train, []

    def interrupted(self, request):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(self.name)
        return train(self, request)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalClient, "train", interrupted)
        simulate(QUICK, output=output, engine="in-process")
    said = run("simulate", "--resume", output, "--engine", "in-process").stdout
    assert said.splitlines()[-1] == f"Results: {output}"
    lines = (output / "events.jsonl").read_text().splitlines()
    kept = [
        e for e in map(json.loads, lines) if e.get("reason") == "answered before the interruption"
    ]
    assert trained == [e["client"] for e in kept if e["phase"] == "train"]


def test_another_engine_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected one of flower, in-process"):
        simulate(QUICK, output=tmp_path / "run", engine="ray")
    assert not (tmp_path / "run").exists()
