"""Trackers: what they are told of a run, read with their own readers; and one that fails."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedcompo.errors import ConfigError
from fedcompo.report import tracking
from fedcompo.report.tracking import TRACKERS, Tracking, require

COST = {"bytes_sent": 10, "bytes_received": 5, "seconds": 2.0}


def reply(client: str, phase: str = "train", **figures: Any) -> dict[str, Any]:
    about = {"event": "client", "phase": phase, "client": client, "status": "ok"}
    return {**about, **COST, "figures": figures}


def ended(phase: str) -> dict[str, Any]:
    return {"event": "phase-finished", "phase": phase, "seconds": 3.5}


RUN = [
    {"event": "run", "clients": [], "phases": ["train"]},
    reply("anna", losses=[2.0, 1.5], own_task_accuracy=0.75),
    reply("ben [2]", losses=[1.0], own_task_accuracy=None),
    {**reply("cho"), "status": "left-out"},
    ended("train"),
    reply("anna", losses=(1.25,)),
    ended("train"),
]
RESULTS = {"class_il_accuracy": 0.5, "task_il_accuracy": None, "scale": {"scale": 1.3}}
FIGURES = {
    "loss/anna": [(1, 2.0), (2, 1.5), (3, 1.25)],
    "loss/ben [2]": [(1, 1.0)],
    "own_task_accuracy/anna": [(1, 0.75)],
    "seconds/train": [(1, 3.5), (2, 3.5)],
    "bytes_sent/train": [(1, 20.0), (2, 10.0)],
    "bytes_received/train": [(1, 10.0), (2, 5.0)],
    "run/class_il_accuracy": [(1, 0.5)],
    "run/lambda": [(1, 1.3)],
}


def follow(name: str, folder: Path, *, events: int = len(RUN)) -> None:
    """Let a tracker hear of a run, which fails unless it gets to its end."""
    with Tracking([name], folder, {"kind": "lora", "data": ""}, pytest.fail) as told:
        for event in RUN[:events]:
            told.hear(event)
        if events == len(RUN):
            (folder / "results.json").write_text("{}")
            told.finish(RESULTS, [folder / "results.json"])


@pytest.mark.parametrize("events", [len(RUN), 5])
def test_tensorboard_reads_what_was_written(tmp_path, events):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow("tensorboard", tmp_path, events=events)
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    found = {
        name: [(e.step, e.value) for e in reader.Scalars(name)] for name in reader.Tags()["scalars"]
    }
    if events == len(RUN):
        expected = {n: [(s, pytest.approx(v)) for s, v in rows] for n, rows in FIGURES.items()}
        assert found == expected
    else:  # the run failed; what was known is there
        assert found["seconds/train"] == [(1, 3.5)]
    (text,) = reader.Tensors("settings/text_summary")
    assert b"kind = lora" in text.tensor_proto.string_val[0]


@pytest.mark.parametrize("events", [len(RUN), 5])
def test_mlflow_reads_what_was_written(tmp_path, events, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    follow("mlflow", tmp_path, events=events)
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("fedcompo")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"kind": "lora"}
    assert run.info.run_name == tmp_path.name
    if events < len(RUN):
        assert (run.info.status, run.data.metrics["seconds/train"]) == ("FAILED", 3.5)
        return
    assert run.info.status == "FINISHED"
    plain = {name.replace("[2]", "_5B_2_5D_"): rows for name, rows in FIGURES.items()}
    assert set(run.data.metrics) == set(plain)
    for name, rows in plain.items():
        history = client.get_metric_history(run.info.run_id, name)
        assert [(m.step, m.value) for m in history] == rows
    assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["results.json"]


def test_weights_and_biases_is_used_offline_unless_one_asks(tmp_path, monkeypatch):
    """By a stand-in: the package itself was not tried."""
    told: list[Any] = []
    run = SimpleNamespace(
        log=told.append,
        save=lambda path, **options: told.append(Path(path).name),
        finish=lambda exit_code: told.append(exit_code),
    )

    def init(**options: Any) -> SimpleNamespace:
        told.append((options["mode"], options["dir"], options["config"]["kind"]))
        return run

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=1))
    follow("wandb", tmp_path)
    assert told[0] == ("offline", str(tmp_path), "lora")
    assert {"loss/anna": 1.25} in told
    assert told[-2:] == ["results.json", 0]
    monkeypatch.setenv("WANDB_MODE", "online")
    follow("wandb", tmp_path, events=5)
    assert [each[0] for each in told if isinstance(each, tuple)] == ["offline", "online"]
    assert told[-1] == 1


def test_a_tracker_that_is_not_installed_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "wandb" else 1)
    with pytest.raises(ConfigError, match=r"wandb, which.*pip install 'fedcompo\[wandb\]'"):
        require(["mlflow", "wandb"])


class Broken:
    """A tracker that fails at its first figures."""

    def __init__(self, folder: Path, settings: Any) -> None:
        self.calls: list[str] = folder.calls  # type: ignore[attr-defined]

    def figures(self, rows: Any) -> None:
        self.calls.append("figures")
        raise ConnectionError("https://user:password@tracker")

    def finish(self, files: Any, *, failed: bool) -> None:
        self.calls.append("finish")


def test_one_that_fails_is_noted_once_and_the_run_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(tracking, "find_spec", lambda name: 1)
    monkeypatch.setitem(TRACKERS, "mlflow", Broken)
    notes: list[str] = []
    folder: Any = SimpleNamespace(calls=[])
    told = Tracking(["mlflow"], folder, {}, notes.append)
    for event in RUN:
        told.hear(event)
    told.finish(RESULTS, ())
    assert folder.calls == ["figures"]
    (note,) = notes
    assert note.startswith("`track`: mlflow failed (ConnectionError)")
    assert "password" in caplog.text and "password" not in note


def test_one_that_cannot_start_ends_the_run_and_closes_the_others(monkeypatch):
    def refused(folder: Path, settings: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(tracking, "find_spec", lambda name: 1)
    monkeypatch.setitem(TRACKERS, "mlflow", Broken)
    monkeypatch.setitem(TRACKERS, "wandb", refused)
    folder: Any = SimpleNamespace(calls=[])
    with pytest.raises(ConfigError, match=r"wandb cannot start .ConnectionError: no route"):
        Tracking(["mlflow", "wandb"], folder, {}, pytest.fail)
    assert folder.calls == ["finish"]
