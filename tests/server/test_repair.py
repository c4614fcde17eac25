"""Removal after IEL, and rounds in which those who stay train on without the client."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from app_runs import altered
from builders import in_memory, running_sum_of
from round_runs import Looks, Wire, federate, same

from fedcompo.composition.running_sum import RunningSum
from fedcompo.method.contribution import Contribution
from fedcompo.registry.record_verification import verify_record
from fedcompo.registry.registry import Registry
from fedcompo.registry.verification import verify_registry
from server.rounds.current_sum import CurrentSum


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Path:
    """The registry of a run of ann, ben and eve."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDCOMPO_STATE", str(tmp_path_factory.mktemp("state")))
        output = tmp_path_factory.mktemp("trained") / "out"
        federate(images, output, kind="lora,full,ia3")
    return output / "registry"


@pytest.fixture
def registry(trained, tmp_path) -> Path:
    """A copy, to change."""
    shutil.copytree(trained, tmp_path / "registry", symlinks=True)
    return tmp_path / "registry"


@pytest.fixture
def watched(monkeypatch) -> list[dict[str, tuple[str, ...]]]:
    """Who was in the sum whenever a client's part of it was taken."""
    seen = []
    original = RunningSum.rest

    def rest(self: RunningSum, client: str, *, together: int):
        seen.append(self.clients)
        return original(self, client, together=together)

    monkeypatch.setattr(RunningSum, "rest", rest)
    return seen


def remove(images: Path, registry: Path, grid: dict | None = None, **settings) -> dict:
    """Remove ann, with two rounds of repair unless the settings say otherwise."""
    given = {"action": "remove", "client": "ann", "repair_rounds": 2, **settings}
    output = registry.parent / "out"
    return federate(images, output, grid, registry=str(registry), **given)


def members(registry: Path) -> dict[str, Contribution]:
    opened = Registry(registry)
    return {c: in_memory(registry / opened.member(c).folder) for c in opened.clients}


def unchanged(one: Contribution, other: Contribution) -> bool:
    return same(one.task_vector.tensors, other.task_vector.tensors) and torch.equal(
        one.head.weight, other.head.weight
    )


def test_after_iel_a_removal_is_not_influence_exact_and_says_whom_to_retrain(images, registry):
    results = remove(images, registry, repair_rounds=0)
    assert results["influence_exact"] is False
    assert results["to_retrain"] == ["ben", "eve"]
    assert results["rounds"] == []
    findings = verify_record(Path(results["record"]), registry=Registry(registry))
    assert all(finding.holds for finding in findings)


def test_repair_trains_those_who_stay_inside_their_sum_without_the_client(
    images, registry, watched
):
    before, wire = members(registry), Wire()
    results = remove(images, registry, {"tamper": wire.tamper})
    assert results["survivors"] == ["ben", "eve"]
    assert watched == [("ben", "eve")] * 4  # two clients in two rounds
    assert [h["trained"] for h in results["rounds"]] == [["ben", "eve"]] * 2
    after = members(registry)
    assert list(after) == ["ben", "eve"]
    for client in after:
        assert not unchanged(after[client], before[client])
        assert after[client].task_vector.kind is before[client].task_vector.kind
        assert same(after[client].task_vector.tensors, wire.heard[client][-1])
    opened = Registry(registry)
    vectors = {client: member.task_vector for client, member in after.items()}
    theta_0 = opened.backbone.load().theta_0
    expected = running_sum_of(theta_0, vectors, dict.fromkeys(vectors, 1)).total
    assert same(opened.running_sum(), expected)
    assert all(finding.holds for finding in verify_registry(registry))
    assert results["root"] == opened.state.root != results["root_after"]
    assert list(results["accuracy_after"]) == ["ben", "eve"]


def test_what_they_learnt_with_the_client_is_not_undone_and_their_lineage_says_so(images, registry):
    remove(images, registry)
    lineage = members(registry)["ben"].lineage
    assert lineage.anchored_by == lineage.ensemble == ("ann", "eve")


def test_they_go_on_from_what_they_were(images, registry):
    """With steps too small to matter, a repair changes nothing but who is in the model."""
    before = members(registry)
    remove(images, registry, learning_rate=1e-12, beta=0.0, repair_rounds=1)
    after = members(registry)
    for client in after:
        tensors = before[client].task_vector.tensors
        for name, tensor in after[client].task_vector.tensors.items():
            torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=1e-7)
        torch.testing.assert_close(after[client].head.weight, before[client].head.weight)


def test_a_repair_leaves_no_files_of_its_own(images, registry, state):
    remove(images, registry)
    left = {path.name for path in (registry.parent / "out").iterdir()}
    assert left == {"results.json", "events.jsonl", "flower.log", "report.html"}
    assert list(state.rglob("*")) == []


def test_who_is_not_connected_stays_as_it_was_and_in_the_sum(images, registry, watched):
    before = members(registry)
    results = remove(images, registry, Looks({"eve": []}).options, num_clients=2)
    after = members(registry)
    assert unchanged(after["eve"], before["eve"])
    assert not unchanged(after["ben"], before["ben"])
    assert watched == [("ben", "eve")] * 2
    assert [h["trained"] for h in results["rounds"]] == [["ben"]] * 2
    assert all(finding.holds for finding in verify_registry(registry))


@pytest.mark.parametrize("phase", ["query.describe", "train"])
def test_who_cannot_be_repaired_stays_as_it_was_and_is_named(images, registry, phase):
    before = members(registry)
    change = altered(lambda tensors, manifest: manifest.update(classes=["x"]))
    results = remove(images, registry, {"tamper": {(2, phase): change}})
    named = [c["client"] for c in (*results["left_out"], *results["missed"])]
    assert "eve" in named
    after = members(registry)
    assert unchanged(after["eve"], before["eve"])
    assert not unchanged(after["ben"], before["ben"])
    assert all(finding.holds for finding in verify_registry(registry))


def fail(tensors: dict, manifest: dict) -> None:
    manifest["losses"] = []


def test_if_nobody_can_be_repaired_the_removal_stands_and_a_note_says_why(images, registry):
    before = members(registry)
    wire = Wire({(client, n): altered(fail) for client in ("ben", "eve") for n in (1, 2)})
    results = remove(images, registry, {"tamper": wire.tamper})
    assert results["survivors"] == list(members(registry)) == ["ben", "eve"]
    (note,) = [note for note in results["notes"] if "repair" in note]
    assert "the removal stands: Nobody trained in round 1" in note
    assert all(unchanged(now, before[client]) for client, now in members(registry).items())
    assert results["root"] == results["root_after"]
    assert list(results["accuracy_after"]) == ["ben", "eve"]
    assert all(finding.holds for finding in verify_registry(registry))
    left = {path.name for path in (registry.parent / "out").iterdir()}
    assert left == {"results.json", "events.jsonl", "flower.log", "report.html"}


def test_a_disk_that_fails_during_repair_leaves_the_removal_standing(images, registry, monkeypatch):
    def full(self: CurrentSum) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CurrentSum, "keep", full)
    results = remove(images, registry)
    assert results["survivors"] == list(members(registry)) == ["ben", "eve"]
    assert any("the removal stands: " in n and "No space" in n for n in results["notes"])


def test_neither_the_removed_client_nor_a_stranger_comes_in_by_a_repair(images, registry):
    """ann restarts its node and zoe appears, before the second round of repair."""
    looks = Looks({"zoe": [2]}, nodes={"ann": [2]})
    results = remove(images, registry, looks.options, clients=4, num_clients=3)
    assert list(members(registry)) == ["ben", "eve"]
    reasons = {c["client"]: c["reason"] for c in results["left_out"] if "round 2" in c["phase"]}
    assert set(reasons) == {"ann", "zoe"}
    assert all("not a member of the registry" in reason for reason in reasons.values())


def test_a_member_that_comes_during_a_repair_stays_as_it_was(images, registry):
    before = members(registry)
    results = remove(images, registry, Looks({"eve": [2]}).options, num_clients=2)
    after = members(registry)
    assert unchanged(after["eve"], before["eve"])
    assert not unchanged(after["ben"], before["ben"])
    assert [c["client"] for c in results["left_out"]][-1] == "eve"
    assert list(results["accuracy_after"]) == ["ben"]


def test_the_last_member_may_leave_though_a_repair_was_asked_for(images, tmp_path):
    federate(images, tmp_path / "one", clients=1, min_clients=1)
    registry = tmp_path / "one" / "registry"
    results = remove(images, registry, clients=1)
    assert results["survivors"] == []
    assert results["rounds"] == []
    assert Registry(registry).clients == ()
