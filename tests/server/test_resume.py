"""A run that is killed at any message goes on where it was, and comes to the same, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from app_runs import run

from fedcompo.config.run import RunConfig
from fedcompo.errors import ConfigError, LaunchError
from fedcompo.messages.records import from_record
from fedcompo.registry.registry import Registry
from fedcompo.storage import tensorfile
from server.exchange.books import NOTHING
from server.exchange.kept_answers import KeptAnswers
from server.resume import check_same

TYPES = ("query.describe", "query.identify", "train", "query.realign", "query.vote", "evaluate")
ROUNDS = {"method": "iel", "num_server_rounds": 2}
TASKS = {
    "schedule": "sequential",
    "partition": "iid",
    "clients_per_task": 2,
    "num_tasks": 2,
    "num_clients": 4,
}


class Killed(BaseException):
    """As sudden as SIGKILL: nothing but a context's end can be done about it."""


class Watched:
    """Counts the answers of clients, and kills the run before one of them arrives."""

    def __init__(self, kill_at: int = 0) -> None:
        self.kill_at, self.count = kill_at, 0
        self.trained: list[int] = []

    def options(self, clients: int = 3) -> dict:
        return {
            "clients": clients,
            "tamper": {
                (i, kind): lambda reply, i=i, kind=kind: self._see(i, kind, reply)
                for i in range(clients)
                for kind in TYPES
            },
        }

    def _see(self, partition: int, kind: str, reply):
        self.count += 1
        if self.count == self.kill_at:
            raise Killed
        if (
            kind == "train"
            and "losses" in from_record(reply.content, expected="train", source="")[1]
        ):
            self.trained.append(partition)
        return reply


def figures(results: dict) -> dict:
    """What must not depend on interruptions."""
    kept = ("class_il_accuracy", "task_il_accuracy", "own_task_accuracy", "diagnostics", "rounds")
    kept += ("frozen_class_il_accuracy", "left_out", "missed", "arrivals", "realigned_with")
    return {name: results.get(name) for name in kept}


@pytest.fixture(scope="module", params=[{}, ROUNDS, TASKS], ids=["ita", "iel", "tasks"])
def uninterrupted(request, tmp_path_factory):
    watched, output = Watched(), tmp_path_factory.mktemp("whole") / "run"
    settings = {**request.param, "in_flight": 1}  # else answers on their way are lost
    clients = settings.setdefault("num_clients", 3)
    return settings, run(watched.options(clients), output, **settings), watched


@pytest.mark.parametrize("share", [0.45, 0.65, 1.0])
def test_a_run_killed_anywhere_goes_on_and_trains_nobody_twice(uninterrupted, tmp_path, share):
    settings, expected, whole = uninterrupted
    first, again, last = Watched(int(share * whole.count)), Watched(2), Watched()
    output, clients = tmp_path / "run", settings["num_clients"]

    with pytest.raises(Killed):
        run(first.options(clients), output, **settings)
    assert list((output / "answers").rglob("*.safetensors"))
    with pytest.raises(Killed):
        run(again.options(clients), output, **settings, resume=True)
    results = run(last.options(clients), output, **settings, resume=True)

    assert figures(results) == figures(expected)
    assert results["registry"]["root"] == expected["registry"]["root"]
    assert results["per_client"].keys() == expected["per_client"].keys()
    assert sorted(first.trained + again.trained + last.trained) == sorted(whole.trained)
    assert not (output / "answers").exists()
    assert not (output / "run.json").exists()


def test_a_run_killed_once_its_clients_are_in_the_registry_adds_them_only_once(
    tmp_path, monkeypatch
):
    add, output = Registry.add, tmp_path / "run"

    def add_and_die(registry, *sources, **options):
        add(registry, *sources, **options)
        raise Killed

    monkeypatch.setattr(Registry, "add", add_and_die)
    with pytest.raises(Killed):
        run(Watched().options(), output)
    monkeypatch.undo()
    second = Watched()
    results = run(second.options(), output, resume=True)
    registry = Registry(output / "registry")
    assert second.trained == []
    assert [e.event for e in registry.entries()].count("added") == 1
    assert results["clients_evaluated"] == list(registry.clients)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def of_another_version(path: Path) -> None:
    tensors, kept = tensorfile.load(path)
    del kept["manifest"]["losses"]
    about = {key: kept[key] for key in ("content", "asked", "manifest", "cost")}
    tensorfile.save(path, tensors, about)


@pytest.mark.parametrize("damage", [cut_short, of_another_version])
def test_an_answer_that_was_damaged_on_disk_is_asked_for_again(tmp_path, damage):
    output = tmp_path / "run"
    with pytest.raises(Killed):
        run(Watched(10).options(), output)  # all have trained
    damage(next((output / "answers" / "train").iterdir()))
    second = Watched()
    run(second.options(), output, resume=True)
    assert len(second.trained) == 1


def test_going_on_with_other_settings_is_refused_and_changes_nothing(tmp_path):
    output = tmp_path / "run"
    with pytest.raises(Killed):
        run(Watched(5).options(), output)
    before = {p: p.read_bytes() for p in output.rglob("*.safetensors")}
    with pytest.raises(ConfigError, match=r"alpha = 3.0, begun with 0.0"):
        run(Watched().options(), output, resume=True, alpha=3.0)
    assert {p: p.read_bytes() for p in output.rglob("*.safetensors")} == before


def test_what_changes_no_result_may_differ(tmp_path):
    begun = RunConfig.parse({"track": "wandb", "keep-cache": True}).flat()
    check_same(tmp_path, begun, RunConfig().flat())


def test_a_finished_run_cannot_be_resumed(tmp_path):
    run(Watched().options(), tmp_path / "run")
    with pytest.raises(LaunchError, match="finished"):
        run(Watched().options(), tmp_path / "run", resume=True)


def test_where_nothing_was_begun_nothing_can_be_resumed(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(LaunchError, match="holds no run to go on with"):
        run(Watched().options(), tmp_path / "run", resume=True)


@pytest.mark.parametrize("settings", [{"method": "fedavg"}, {"action": "remove", "client": "a"}])
def test_what_cannot_be_resumed_says_so(tmp_path, settings):
    with pytest.raises(ConfigError, match="starts anew"):
        run(Watched().options(), tmp_path / "run", resume=True, **settings)


def test_a_client_that_missed_a_round_before_the_interruption_still_has_missed_it(tmp_path):
    class Missing(Watched):
        def _see(self, partition, kind, reply):
            reply = super()._see(partition, kind, reply)
            return None if kind == "train" and partition == 1 else reply

    settings = {"method": "iel", "num_server_rounds": 2, "timeout": 0.3}
    output: Path = tmp_path / "run"
    first = Missing(11)
    with pytest.raises(Killed):
        run(first.options(), output, **settings)
    rounds_over = json.loads((output / "run.json").read_text())["steps"]
    assert [step["missed"] for step in rounds_over] == [["client-1"]]
    second = Watched()
    results = run(second.options(), output, **settings, resume=True)
    assert results["rounds"][0]["missed"] == ["client-1"]
    assert [(m["client"], m["phase"]) for m in results["missed"]] == [
        ("client-1", "train, round 1")
    ]
    assert results["rounds"][1]["trained"] == ["client-0", "client-1", "client-2"]


def test_kinds_are_those_that_were_dealt_though_one_client_does_not_come_back(tmp_path):
    """Dealt anew among those who are there, client-1 would be trained as a LoRA."""

    class KilledLate(Watched):
        def _see(self, partition, kind, reply):
            if kind == "evaluate":  # all are in the registry by then
                raise Killed
            return reply

    alone = {"head_start": "probe", "anchor": "own", "realign": False, "aside": 0.0}
    settings, output = {**alone, "kind": "lora,full"}, tmp_path / "run"
    with pytest.raises(Killed):
        run(KilledLate().options(), output, **settings)
    left = {"present": lambda partition: partition != 0}
    results = run(left, output, **settings, resume=True, num_clients=2)
    members = Registry(output / "registry").state.members
    kinds = {client: member.kind for client, member in members.items()}
    assert kinds == {"client-0": "lora", "client-1": "full", "client-2": "lora"}
    assert results["class_il_accuracy"] is not None


def test_the_longest_name_of_a_client_is_no_trouble(tmp_path):
    """Until it has named itself, it is called by its node and its registered name, too."""
    answers = KeptAnswers(tmp_path / "answers")
    client = f"node {2**63}, registered as {'あ' * 64}"
    answers.keep("describe", client, "0" * 64, ({}, {"a": 1}), NOTHING)
    kept = answers.recall("describe", client, "0" * 64)
    assert kept == (({}, {"a": 1}), NOTHING)
    assert answers.recall("describe", client[:-1], "0" * 64) is None
