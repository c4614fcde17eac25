"""Rounds in which clients come, go, lose their node and come back, over the real apps."""

from __future__ import annotations

from pathlib import Path

import pytest
from app_runs import altered
from flwr.app import Message
from in_process_grid import lost
from round_runs import (
    OWNED,
    Looks,
    Wire,
    assert_sum_of_the_last,
    federate,
    notes_of,
    same,
    same_contributions,
    sent_last,
)

from clients.local import LocalClient
from fedcompo.errors import TooFewClients
from fedcompo.messages.requests import TrainRequest
from fedcompo.method.fisher import expanded
from fedcompo.registry.registry import Registry
from fedcompo.training.fit import fit_task_vector
from server.phases.fitting import Fitting
from server.rounds.rounds import Rounds

THREE = ("ann", "ben", "eve")


@pytest.fixture
def sums(monkeypatch) -> list[dict]:
    """The sum that the rounds of each run ended with."""
    seen: list[dict] = []
    original = Rounds.run

    def run(self: Rounds) -> None:
        original(self)
        seen.append(self.sum.running.total)

    monkeypatch.setattr(Rounds, "run", run)
    return seen


@pytest.fixture
def metrics(monkeypatch) -> dict[str, list[dict]]:
    """Mean Fisher that each client was held in, by client and round."""
    seen: dict[str, list[dict]] = {client: [] for client in OWNED}
    original = LocalClient.train

    def train(self: LocalClient, request: TrainRequest):
        def fit(*arguments, **options):
            seen[self.name].append(options["course"].anchor.weights)
            return fit_task_vector(*arguments, **options)

        monkeypatch.setattr("clients.local.fit_task_vector", fit)
        return original(self, request)

    monkeypatch.setattr("clients.work.LocalClient.train", train)
    return seen


def mean_fisher(output: Path, clients: tuple[str, ...]) -> dict:
    """Oracle: over the examples of some clients."""
    fishers = [sent_last(output)[client].fisher for client in clients]
    count, names = sum(f.num_examples for f in fishers), fishers[0].sums.keys()
    total = {n: sum(f.sums[n].double() for f in fishers) for n in names}
    theta_0 = Registry(output / "registry").backbone.load().theta_0
    return expanded({name: (value / count).float() for name, value in total.items()}, theta_0)


def rounds(images: Path, tmp_path: Path, grid: dict | None = None, **settings) -> dict:
    given = {"num_server_rounds": 3, **settings}
    return federate(images, tmp_path / "out", grid, **given)


def assert_exact(tmp_path: Path, sums: list[dict], wire: Wire | None = None) -> None:
    assert_sum_of_the_last(tmp_path / "out", wire)
    assert same(Registry(tmp_path / "out" / "registry").running_sum(), sums[-1])


def happened(results: dict, key: str) -> list:
    return [one[key] for one in results["rounds"]]


# -- who joins --------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["setting", "node"])
def test_who_joins_in_a_later_round_is_described_then_and_trains_with_those_there(
    images, tmp_path, sums, by
):
    wire, looks = Wire(), Looks({"eve": [2, 3]} if by == "node" else {})
    given = {"num_clients": 2} if by == "node" else {"joins": "eve:2"}
    results = rounds(images, tmp_path, {"tamper": wire.tamper, **looks.options}, **given)
    assert happened(results, "came") == [["ann", "ben"], ["eve"], []]
    assert happened(results, "members") == [["ann", "ben"], list(THREE), list(THREE)]
    assert "describe, round 2" in results["phases"]
    assert [len(results["per_client"][c]["losses"]) for c in THREE] == [3, 3, 2]
    members = sent_last(tmp_path / "out")
    assert members["eve"].lineage.ensemble == ("ann", "ben")
    assert members["ann"].lineage.anchored_by == ("ben", "eve")
    assert members["ann"].lineage.ensemble == ("ben", "eve")
    assert_exact(tmp_path, sums, wire)


def test_each_round_has_the_metric_of_those_who_take_part_in_it(images, tmp_path, metrics):
    """eve joins in round 2, zoe leaves after it; ben's node is gone in round 3."""
    looks = Looks({"ben": [1, 2, 4]}).options
    settings = {"joins": "eve:2", "leaves": "zoe:2", "num_server_rounds": 4}
    rounds(images, tmp_path, looks, clients=4, **settings)
    after = mean_fisher(tmp_path / "out", ("ann", "ben", "eve"))
    assert all(same(metrics[client][i], after) for client in ("ann", "eve") for i in (-1, -2))
    assert same(metrics["ben"][2], after)
    first, second, *_ = metrics["ann"]
    assert same(metrics["ben"][0], first)
    assert same(metrics["eve"][0], second)
    assert not same(first, second)
    assert not same(second, after)
    assert [len(metrics[client]) for client in OWNED] == [4, 3, 3, 2]


def test_nobody_is_trained_with_who_joins_only_after_its_own_last_round(images, tmp_path):
    wire = Wire({("ann", 3): lost})
    rounds(images, tmp_path, {"tamper": wire.tamper}, joins="eve:3")
    members = sent_last(tmp_path / "out")
    assert members["ann"].lineage.anchored_by == members["ann"].lineage.ensemble == ("ben",)
    assert members["ben"].lineage.anchored_by == ("ann", "eve")
    assert members["ben"].lineage.ensemble == ("ann",)


def test_it_makes_no_difference_whether_a_setting_or_its_node_keeps_a_client_back(images, tmp_path):
    federate(images, tmp_path / "a", num_server_rounds=3, joins="eve:2")
    looks = Looks({"eve": [2, 3]}).options
    federate(images, tmp_path / "b", looks, num_server_rounds=3, num_clients=2)
    assert same_contributions(tmp_path / "a", tmp_path / "b")


def test_who_fails_on_joining_is_left_out_and_the_others_go_on(images, tmp_path, sums):
    change = altered(lambda tensors, manifest: manifest.pop("classes"))
    grid = {"tamper": {(2, "query.describe"): change}}
    results = rounds(images, tmp_path, grid, joins="eve:2")
    (left_out,) = results["left_out"]
    assert (left_out["client"], left_out["phase"]) == ("eve", "describe, round 2")
    assert happened(results, "came") == [["ann", "ben"], [], []]
    assert list(results["per_client"]) == ["ann", "ben"]
    assert_exact(tmp_path, sums)


def test_who_failed_on_joining_may_come_again_under_another_node(
    images, tmp_path, sums, monkeypatch
):
    original, asked = LocalClient.describe, []

    def fail_once(self, request):
        asked.append(self.name)
        if asked.count("eve") == 1 and self.name == "eve":
            raise RuntimeError("out of memory")
        return original(self, request)

    monkeypatch.setattr("clients.work.LocalClient.describe", fail_once)
    results = rounds(images, tmp_path, Looks(nodes={"eve": [3]}).options, joins="eve:2")
    assert happened(results, "came") == [["ann", "ben"], [], ["eve"]]
    assert results["left_out"][0]["reason"] == "RuntimeError; see the client's own log."
    assert list(results["per_client"]) == list(THREE)
    assert_exact(tmp_path, sums)


def test_of_two_nodes_with_one_name_the_one_that_took_part_stays(images, tmp_path, sums):
    """zoe's node claims to be ann, in round 2."""
    grid = {**Looks({"zoe": [2, 3]}).options, "node_configs": {3: {"client": "ann"}}}
    results = rounds(images, tmp_path, grid, clients=4, num_clients=3)
    assert [left["phase"] for left in results["left_out"]] == [
        "identify, round 2",
        "identify, round 3",
    ]
    assert all("Two nodes call themselves 'ann'" in left["reason"] for left in results["left_out"])
    assert happened(results, "trained") == [list(THREE)] * 3
    assert_exact(tmp_path, sums)


def test_who_restarts_before_its_old_node_is_found_gone_comes_in_a_round_later(
    images, tmp_path, sums
):
    """The fourth node is ben's new one: there from round 2, as the old one is until round 3."""
    restarted = {"client": "ben", "data": str(images / "ben"), "min-images": 1}
    looks = Looks({"ben": [1, 2], "zoe": [2, 3]})
    grid = {**looks.options, "node_configs": {3: restarted}}
    results = rounds(images, tmp_path, grid, clients=4, num_clients=3)
    (left_out,) = results["left_out"]
    assert (left_out["client"], left_out["phase"]) == ("node 1003", "identify, round 2")
    assert happened(results, "trained") == [list(THREE)] * 3
    assert happened(results, "came")[1:] == [[], []]
    assert_exact(tmp_path, sums)


# -- who leaves -------------------------------------------------------------------------------


def test_who_leaves_is_out_of_the_sum_the_metric_and_the_head_of_those_who_stay(
    images, tmp_path, sums, monkeypatch
):
    aligned = []
    original = Fitting.align

    def align(self: Fitting) -> None:
        original(self)
        aligned.append(self.aligned.classes)

    monkeypatch.setattr(Fitting, "align", align)
    there = []

    def look(reply: Message) -> Message:
        there.append({path.stem for path in (tmp_path / "out").glob("*/*")})
        return reply

    wire = Wire({("ann", 2): look, ("ann", 3): look})
    results = rounds(images, tmp_path, {"tamper": wire.tamper}, leaves="ben:2")
    assert happened(results, "members") == [list(THREE), list(THREE), ["ann", "eve"]]
    assert happened(results, "went") == [[], ["ben"], []]
    (left_out,) = results["left_out"]
    assert left_out["client"] == "ben"
    assert "left after round 2" in left_out["reason"]
    assert list(results["per_client"]) == ["ann", "eve"]
    assert "eel" in aligned[0]  # a class of ben's alone
    assert "eel" not in aligned[1]
    assert "ben" in there[0]  # its Fisher and its task vector, while it takes part
    assert "ben" not in there[1]
    # It is not undone that they were trained with it.
    assert sent_last(tmp_path / "out")["ann"].lineage.ensemble == ("ben", "eve")
    assert_exact(tmp_path, sums, wire)
    files = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert all(t.numpy().tobytes() not in files for t in wire.heard["ben"][-1].values())


def test_who_first_trains_after_another_left_is_not_trained_with_anything_of_it(
    images, tmp_path, sums
):
    wire = Wire({("eve", 1): lost})
    rounds(images, tmp_path, {"tamper": wire.tamper}, leaves="ben:1", num_server_rounds=2)
    lineage = sent_last(tmp_path / "out")["eve"].lineage
    assert lineage.anchored_by == lineage.ensemble == ("ann",)
    assert_exact(tmp_path, sums)


def test_who_leaves_after_the_last_round_is_not_composed(images, tmp_path, sums):
    results = rounds(images, tmp_path, leaves="ben:3")
    assert happened(results, "members")[-1] == list(THREE)
    assert list(results["per_client"]) == ["ann", "eve"]
    assert_exact(tmp_path, sums)


def test_who_left_does_not_come_back_under_another_node(images, tmp_path, sums):
    looks = Looks(nodes={"ben": [2]})
    results = rounds(images, tmp_path, looks.options, leaves="ben:1")
    assert [left["phase"] for left in results["left_out"]] == [
        "train, round 1",
        "identify, round 2",
    ]
    assert "left after round 1" in results["left_out"][1]["reason"]
    assert happened(results, "trained") == [list(THREE), ["ann", "eve"], ["ann", "eve"]]
    assert_exact(tmp_path, sums)


def test_if_all_leave_the_run_fails_in_words(images, tmp_path):
    with pytest.raises(TooFewClients, match=r"ann \(train, round 1\): left after round 1"):
        rounds(images, tmp_path, leaves="ann:1,ben:1,eve:1")


def test_if_too_many_leave_the_run_fails_in_the_end(images, tmp_path):
    with pytest.raises(TooFewClients, match=r"1 usable client.*`min-clients` is 2"):
        rounds(images, tmp_path, leaves="ann:1,ben:2")


# -- whose node is gone for a while -----------------------------------------------------------


@pytest.mark.parametrize("nodes", [{}, {"ben": [3]}])
def test_who_comes_back_goes_on_whatever_the_id_of_its_node(images, tmp_path, sums, nodes):
    wire, looks = Wire(), Looks({"ben": [1, 3, 4]}, nodes)
    grid = {"tamper": wire.tamper, **looks.options}
    results = rounds(images, tmp_path, grid, num_server_rounds=4)
    (missed,) = results["missed"]
    assert (missed["client"], missed["phase"]) == ("ben", "train, round 2")
    assert "not connected" in missed["reason"]
    assert happened(results, "missed") == [[], ["ben"], [], []]
    assert happened(results, "members") == [list(THREE)] * 4
    assert happened(results, "came")[1:] == [[], [], []]  # nobody is described twice
    assert results["left_out"] == []
    assert sent_last(tmp_path / "out")["eve"].lineage.ensemble == ("ann", "ben")
    assert_exact(tmp_path, sums, wire)


def test_who_restarts_between_two_rounds_misses_none(images, tmp_path, sums):
    results = rounds(images, tmp_path, Looks(nodes={"ben": [2], "eve": [2, 3]}).options)
    assert results["missed"] == []
    federate(images, tmp_path / "calm", num_server_rounds=3)
    assert same_contributions(tmp_path / "out", tmp_path / "calm")
    assert_exact(tmp_path, sums)


def test_who_is_gone_in_the_end_is_composed_with_what_it_sent_last(images, tmp_path, sums):
    wire, looks = Wire(), Looks({"ben": [1]})
    grid = {"tamper": wire.tamper, **looks.options}
    results = rounds(images, tmp_path, grid, min_clients=3, realign=True)
    assert [m["phase"] for m in results["missed"]] == ["train, round 2", "train, round 3"]
    assert list(results["per_client"]) == list(THREE)
    assert results["per_client"]["ben"]["class_il_accuracy"] is None
    assert any("not aligned again" in note for note in results["notes"])
    assert len(wire.heard["ben"]) == 1
    assert_exact(tmp_path, sums, wire)


def test_who_is_gone_may_also_leave(images, tmp_path, sums):
    results = rounds(images, tmp_path, Looks({"ben": [1]}).options, leaves="ben:2")
    assert happened(results, "went") == [[], ["ben"], []]
    assert happened(results, "missed") == [[], ["ben"], []]
    assert list(results["per_client"]) == ["ann", "eve"]
    assert_exact(tmp_path, sums)


# -- whom the settings name -------------------------------------------------------------------


def test_who_is_excluded_is_so_also_when_it_comes_late(images, tmp_path, sums):
    looks = Looks({"eve": [2, 3]})
    results = rounds(images, tmp_path, looks.options, num_clients=2, exclude="eve")
    (left_out,) = results["left_out"]
    assert (left_out["client"], left_out["phase"]) == ("eve", "identify, round 2")
    assert "excluded" in left_out["reason"]
    assert list(results["per_client"]) == ["ann", "ben"]
    assert_exact(tmp_path, sums)


def test_what_does_not_come_about_of_joining_and_leaving_is_said(images, tmp_path):
    results = rounds(images, tmp_path, joins="bob:2,eve:9", leaves="ann:7,zed:1")
    assert list(results["per_client"]) == ["ann", "ben"]
    two, *notes = notes_of(results)
    assert two.startswith("Of two clients, the mean of the others is the other's")
    assert notes == [
        "`joins` names bob:2, but it never came.",
        "`joins` names eve:9, but there are 3 round(s).",
        "`leaves` names ann:7, but there are 3 round(s).",
        "`leaves` names zed:1, but it never came.",
    ]
    assert happened(results, "went") == [[], [], []]


def test_a_member_of_the_registry_does_not_leave_it_in_a_round(images, tmp_path, sums):
    federate(images, tmp_path / "first", clients=2)
    registry = tmp_path / "first" / "registry"
    results = rounds(images, tmp_path, registry=str(registry), clients=4, leaves="ann:1,zoe:2")
    assert any("names ann:1, but it is a member" in note for note in results["notes"])
    assert list(results["per_client"]) == list(THREE)
    assert same(Registry(registry).running_sum(), sums[-1])


def test_kinds_are_dealt_by_name_whoever_joins_when(images, tmp_path):
    results = rounds(images, tmp_path, clients=4, kind="lora,full,ia3", joins="ben:2")
    kinds = [results["per_client"][client]["kind"] for client in OWNED]
    assert kinds == ["lora", "full", "ia3", "lora"]
