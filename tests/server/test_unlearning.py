"""Removal over Flower, and clients that join a registry later: the real apps, in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from app_runs import altered, run
from builders import in_memory
from in_process_grid import lost

from fedcompo.errors import BackboneMismatch, ConfigError, ContributionError
from fedcompo.method.contribution import Contribution
from fedcompo.registry.record_verification import verify_record
from fedcompo.registry.registry import Registry
from fedcompo.registry.removal import RemovalRecord
from fedcompo.registry.verification import verify_registry
from fedcompo.storage.files import CONTENT

REMOVE = {"action": "remove", "client": "client-1"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The registry of a run of three clients."""
    output = tmp_path_factory.mktemp("trained") / "out"
    run({}, output, kind="lora,full,ia3")
    return output / "registry"


@pytest.fixture
def registry(trained, tmp_path) -> Path:
    """A copy, to change."""
    shutil.copytree(trained, tmp_path / "registry", symlinks=True)
    return tmp_path / "registry"


def remove(registry: Path, output: Path, grid_options: dict | None = None, **settings) -> dict:
    return run(grid_options or {}, output, registry=str(registry), **{**REMOVE, **settings})


def test_a_removal_is_measured_before_and_after_by_those_who_stay(registry, tmp_path):
    results = remove(registry, tmp_path / "out", requested_by="client-1", reason="contract ended")
    assert results["method"] == "removal"
    assert results["survivors"] == ["client-0", "client-2"]
    for figures in (results["accuracy_before"], results["accuracy_after"]):
        assert list(figures) == ["client-0", "client-2"]
        assert all(0 <= f["class_il_accuracy"] <= f["task_il_accuracy"] for f in figures.values())
    phases = ["identify", "evaluate before", "remove", "notify", "realign", "vote", "evaluate"]
    assert list(results["phases"]) == phases
    assert results["joint_head"] == "realigned"
    (left_out,) = results["left_out"]
    assert (left_out["client"], left_out["phase"]) != ("", "")
    assert "it is not asked again" in left_out["reason"]

    record = RemovalRecord.parse(Path(results["record"]).read_bytes(), source="record")
    assert (record.client, record.requested_by, record.reason) == (
        "client-1",
        "client-1",
        "contract ended",
    )
    assert results["to_retrain"] == ["client-0", "client-2"]
    findings = verify_record(Path(results["record"]), registry=Registry(registry))
    assert all(finding.holds for finding in findings)
    assert all(finding.holds for finding in verify_registry(registry))


def test_the_removed_client_is_gone_from_the_registry_a_run_left(registry, tmp_path):
    gone = in_memory(registry / "clients" / "client-1")
    remove(registry, tmp_path / "out")
    everything = b"".join(p.read_bytes() for p in registry.rglob("*") if p.is_file())
    for tensor in gone.task_vector.tensors.values():
        assert tensor.numpy().tobytes() not in everything
    kept = Contribution.open(registry / "clients" / "client-0").task_vector.tensors
    assert all(tensor.numpy().tobytes() in everything for tensor in kept.values())


def test_a_removal_waits_for_nobody(registry, tmp_path):
    options = {"clients": 1, "tamper": {(0, "evaluate"): lost}}
    results = remove(registry, tmp_path / "out", options, num_clients=1, timeout=0.3)
    assert Registry(registry).clients == ("client-0", "client-2")
    assert results["accuracy_before"] == results["accuracy_after"] == {}
    assert any("client-2" in note and "does not wait" in note for note in results["notes"])
    assert results["joint_head"] == "aligned"


def test_a_member_that_changed_its_classes_is_not_asked(registry, tmp_path):
    change = altered(lambda tensors, manifest: manifest.update(classes=["x", "y"]))
    results = remove(registry, tmp_path / "out", {"tamper": {(0, "query.identify"): change}})
    assert list(results["accuracy_after"]) == ["client-2"]
    assert any("in the registry it has" in left["reason"] for left in results["left_out"])


def test_who_is_not_there_cannot_be_removed(registry, tmp_path):
    before = (registry / "state.json").read_bytes()
    with pytest.raises(ContributionError, match="Did you mean 'client-"):
        remove(registry, tmp_path / "out", client="client-7")
    assert (registry / "state.json").read_bytes() == before
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"client": ""}, "`client` is empty"),
        ({"action": "train"}, "only remove makes use of it"),
    ],
)
def test_a_removal_needs_a_name_and_a_name_a_removal(registry, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        remove(registry, tmp_path / "out", **settings)


def test_a_relative_registry_is_refused_where_nobody_stands(tmp_path):
    with pytest.raises(ConfigError, match="absolute path"):
        run({}, tmp_path / "out", registry="somewhere", **REMOVE)


def test_clients_of_a_later_run_join_those_already_there(tmp_path):
    registry = tmp_path / "registry"
    run({"clients": 2}, tmp_path / "first", registry=str(registry), num_clients=2)
    members = {c: folder_bytes(registry / "clients" / c) for c in ("client-0", "client-1")}
    results = run({}, tmp_path / "second", registry=str(registry))

    assert Registry(registry).clients == ("client-0", "client-1", "client-2")
    assert results["registry"]["joined"] == ["client-2"]
    assert list(results["phases"]["train"]) and results["per_client"]["client-0"]["losses"] == []
    assert results["per_client"]["client-2"]["losses"]
    assert all(f["class_il_accuracy"] is not None for f in results["per_client"].values())
    for client, files in members.items():  # nobody is trained again
        assert folder_bytes(registry / "clients" / client) == files
    lineage = Contribution.open(registry / "clients" / "client-2").lineage
    assert lineage.anchored_by == ("client-0", "client-1")
    assert all(finding.holds for finding in verify_registry(registry))


def test_a_member_is_trained_anew_only_on_request(registry, tmp_path):
    with pytest.raises(ContributionError, match=r"in the registry .* already"):
        run({}, tmp_path / "again", registry=str(registry))
    before = (registry / "clients" / "client-0" / CONTENT).read_bytes()
    results = run({}, tmp_path / "anew", registry=str(registry), replace=True, seed=3, kind="ia3")
    assert results["registry"]["joined"] == ["client-0", "client-1", "client-2"]
    opened = Registry(registry)
    assert {member.kind for member in opened.state.members.values()} == {"ia3"}
    (folder,) = registry.glob("clients/client-0*")
    assert (folder / CONTENT).read_bytes() != before
    events = [entry.event for entry in opened.entries()]
    assert events == ["created", "added", "realigned", *["removed"] * 3, "added", "realigned"]


def test_a_registry_of_another_backbone_is_refused(registry, tmp_path):
    with pytest.raises(BackboneMismatch, match="another registry"):
        run(
            {},
            tmp_path / "out",
            registry=str(registry),
            target_weights="blocks.*.mlp.*.weight",
            image_size=14,
        )


def test_what_a_removal_takes_from_a_lineage_free_run_leaves_no_influence(tmp_path):
    output = tmp_path / "out"
    run({}, output, anchor="own", head_start="probe", realign=False)
    results = remove(output / "registry", tmp_path / "removed")
    assert results["influence_exact"] is True
    assert results["to_retrain"] == []


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_results_of_a_removal_are_json_that_names_the_record(registry, tmp_path):
    remove(registry, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert Path(results["record"]).is_relative_to(registry)
    assert results["root"] != results["root_before"]
