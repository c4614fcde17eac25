"""Several tasks of one client: they arrive in turn, are measured together, and leave together."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from app_runs import run
from cli_runs import run as command
from cli_runs import told
from round_runs import same, sent_last

from fedcompo.backbone.backbone import load_backbone
from fedcompo.composition.head import joint_head
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import load_client_data
from fedcompo.method.pool import Pool
from fedcompo.registry.record_verification import verify_record
from fedcompo.registry.registry import Registry
from fedcompo.registry.removal import RemovalRecord
from fedcompo.registry.verification import verify_registry
from fedcompo.training.accuracy import accuracy_of

MEMBERS = [f"client-{client}.task-{task}" for task in (0, 1) for client in (0, 1)]
TASKS = {
    "clients_per_task": 2,
    "num_tasks": 2,
    "partition": "iid",
    "schedule": "sequential",
    "scale": 1.0,
    "realign": False,
    "num_clients": 4,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two clients with two tasks each; its output and results."""
    output = tmp_path_factory.mktemp("run") / "out"
    return output, run({"clients": 4}, output, **TASKS)


@pytest.fixture
def registry(finished, tmp_path) -> Path:
    """A copy, to change."""
    return Path(shutil.copytree(finished[0] / "registry", tmp_path / "registry", symlinks=True))


def test_a_task_arrives_with_all_its_members_and_is_anchored_by_all_that_are_there(finished):
    output, results = finished
    added = [e for e in Registry(output / "registry").entries() if e.event == "added"]
    came = [[own["client"] for own in entry.details["clients"]] for entry in added]
    assert came == [MEMBERS[:2], MEMBERS[2:]]
    assert results["tasks"] == {"task-0": MEMBERS[:2], "task-1": MEMBERS[2:]}
    members = sent_last(output)
    assert members[MEMBERS[0]].lineage.anchored_by == (MEMBERS[1],)
    assert members[MEMBERS[2]].lineage.anchored_by == tuple(sorted({*MEMBERS} - {MEMBERS[2]}))


def test_accuracy_after_each_task_is_that_of_all_its_test_images(finished):
    """Oracle: hits of the model of the members so far, counted over the images of each task."""
    output, results = finished
    config = RunConfig.parse(results["settings"])
    backbone, members = load_backbone(config.backbone), sent_last(output)
    data = {
        name: load_client_data(config.data, backbone.preprocessing, partition=i, seed=0)
        for i, name in enumerate(MEMBERS)
    }
    matrix = []
    for there in (MEMBERS[:2], MEMBERS):
        theta = Pool(tuple(members[name] for name in there)).compose(backbone.theta_0)
        statistics = {name: members[name].statistics for name in there}
        head = joint_head(statistics, Registry(output / "registry").settings)
        row = []
        for task in (there[:2], there[2:]):
            images = hits = 0
            for name in task:
                own = data[name]
                found = accuracy_of(backbone, theta, head, own.classes, own.test)
                hits += round(found.class_il * len(own.test.labels))
                images += len(own.test.labels)
            row.append(hits / images if images else None)
        matrix.append(row)
    arrivals = results["arrivals"]["class_il_accuracy"]
    assert arrivals["arrivals"] == ["task-0", "task-1"]
    for actual, expected in zip(arrivals["matrix"], matrix, strict=True):
        assert actual == [None if value is None else pytest.approx(value) for value in expected]
    (first, _), (then, second) = matrix
    assert arrivals["average"] == pytest.approx((first + (then + second) / 2) / 2)
    assert arrivals["forgetting"] == pytest.approx(first - then)


def test_a_client_that_leaves_takes_all_its_tasks_as_if_it_had_never_had_them(
    finished, registry, tmp_path
):
    output, _ = finished
    plan = told("remove", "client-0", "--registry", registry, "--dry-run", "--data", "none")
    assert [one["client"] for one in plan] == MEMBERS[::2]
    records = told("remove", "client-0", "--registry", registry, "--yes")
    assert [record["client"] for record in records] == MEMBERS[::2]
    left = Registry(registry)
    assert left.clients == tuple(MEMBERS[1::2])
    members = sent_last(output)
    never = Registry.create(tmp_path / "never", left.backbone.load(), left.settings)
    never.add(*(members[name] for name in MEMBERS[1::2]), empty=True)
    assert same(left.running_sum(), never.running_sum())
    assert same(dict(left.composed()), dict(never.composed()))
    assert all(finding.holds for finding in verify_registry(registry))
    for path in (registry / "removals").iterdir():
        assert all(found.holds is not False for found in verify_record(path, registry=left))


def test_a_run_removes_all_tasks_of_a_client_and_measures_the_others(registry, tmp_path):
    settings = {**TASKS, "action": "remove", "client": "client-1", "registry": str(registry)}
    results = run({"clients": 4}, tmp_path / "out", **settings)
    assert results["survivors"] == list(results["accuracy_after"]) == MEMBERS[::2]
    records = [RemovalRecord.parse(Path(p).read_bytes(), source=p) for p in results["records"]]
    assert [record.client for record in records] == MEMBERS[1::2]
    assert results["to_retrain"] == MEMBERS[::2]
    assert {left["client"] for left in results["left_out"]} & {*MEMBERS} == set()


def test_one_task_of_a_client_can_leave_alone(registry):
    said = command("remove", MEMBERS[0], "--registry", registry, "--yes").stdout
    assert f"Removed {MEMBERS[0]}" in said
    assert Registry(registry).clients == tuple(sorted(MEMBERS[1:]))
