"""Clients that come one after the other: whom each is trained with, and what is measured then."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from app_runs import QUICK, altered
from in_process_grid import lost
from round_runs import OWNED, PARTITIONS, SMALL, Wire, federate, same, sent_last

from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.composition.head import joint_head
from fedcompo.config.choices import Kind
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData, load_client_data
from fedcompo.errors import TooFewClients
from fedcompo.method.contribution import Contribution
from fedcompo.method.fisher import expanded
from fedcompo.method.heads import zero_head
from fedcompo.method.pool import Pool
from fedcompo.method.task_vector import TaskVector
from fedcompo.registry.registry import Registry
from fedcompo.registry.verification import verify_registry
from fedcompo.seeds import generator_for
from fedcompo.training.accuracy import accuracy_of
from fedcompo.training.fit import Course, fit_task_vector
from fedcompo.training.penalty import Anchor, Ensemble

THREE = ("ann", "ben", "eve")
SEQUENTIAL = {"schedule": "sequential", "local_epochs": 2}


def config_of(images: Path, **settings: object) -> RunConfig:
    given = {**SMALL, **SEQUENTIAL, "data": f"folder:{images}", **settings}
    return RunConfig.parse({**QUICK, **{k.replace("_", "-"): v for k, v in given.items()}})


def data_of(client: str, config: RunConfig, backbone: Backbone) -> ClientData:
    seen = backbone.preprocessing
    return load_client_data(config.data, seen, partition=PARTITIONS[client], seed=0)


@pytest.fixture(scope="module", params=["ita", "iel"])
def finished(request, images, tmp_path_factory):
    """A run of three clients; its method, output, results and settings."""
    output, method = tmp_path_factory.mktemp("run") / "out", request.param
    given = {**SEQUENTIAL, "method": method, "kind": "full"}
    return method, output, federate(images, output, **given), config_of(images, **given)


def test_each_client_is_trained_with_exactly_those_who_came_before(finished):
    method, output, *_ = finished
    for i, (client, member) in enumerate(sent_last(output).items()):
        before = THREE[:i]
        assert client == THREE[i]
        assert member.lineage.method == method
        assert member.lineage.anchored_by == before
        assert member.lineage.ensemble == (before if method == "iel" else ())


def test_the_matrix_has_a_row_an_arrival_of_all_who_are_there(finished):
    _, _, results, _ = finished
    assert set(results["arrivals"]) == {"class_il_accuracy", "task_il_accuracy"}
    for measure, arrivals in results["arrivals"].items():
        assert arrivals["arrivals"] == list(THREE)
        for t, row in enumerate(arrivals["matrix"]):
            assert all(0 <= value <= 1 for value in row[: t + 1])
            assert row[t + 1 :] == [None] * (2 - t)
        assert arrivals["final"] == pytest.approx(results[measure])


def test_what_is_measured_is_the_model_of_the_first_clients_alone(finished):
    """Oracle: their pool, and a head aligned on their statistics, on the clients' test images."""
    _, output, results, config = finished
    backbone, members = load_backbone(config.backbone), sent_last(output)
    settings = Registry(output / "registry").settings
    for t in range(1, 4):
        first = {client: members[client] for client in THREE[:t]}
        theta = Pool(tuple(first.values())).compose(backbone.theta_0)
        head = joint_head(
            {client: member.statistics for client, member in first.items()},
            settings,
        )
        for i, client in enumerate(first):
            data = data_of(client, config, backbone)
            found = accuracy_of(backbone, theta, head, data.classes, data.test)
            for measure, value in (
                ("class_il_accuracy", found.class_il),
                ("task_il_accuracy", found.task_il),
            ):
                matrix = results["arrivals"][measure]["matrix"]
                assert matrix[t - 1][i] == pytest.approx(value)


def test_a_run_leaves_one_line_in_the_journal_an_arrival_and_no_other_files(finished):
    _, output, results, _ = finished
    added = [e for e in Registry(output / "registry").entries() if e.event == "added"]
    assert [[c["client"] for c in e.details["clients"]] for e in added] == [[c] for c in THREE]
    assert results["registry"]["joined"] == list(THREE)
    assert [phase for phase in results["phases"] if phase.startswith("train")] == [
        f"train, {client}" for client in THREE
    ]
    assert all(finding.holds for finding in verify_registry(output / "registry"))
    left = {path.name for path in output.iterdir()}
    assert left == {"registry", "results.json", "report.html", "events.jsonl", "flower.log"}


# -- inside the sum of those before -----------------------------------------------------------


def step_by_hand(
    client: str, others: dict[str, Contribution], own: Contribution, config: RunConfig
) -> TaskVector:
    """Oracle of a dense client's training inside the mean of the others and itself."""
    backbone, count = load_backbone(config.backbone), len(others) + 1
    data = data_of(client, config, backbone)
    fishers = [member.fisher for _, member in sorted({**others, client: own}.items())]
    images_seen = sum(fisher.num_examples for fisher in fishers)
    sums = [fisher.sums for fisher in fishers]
    mean = {n: (sum(s[n].double() for s in sums) / images_seen).float() for n in sums[0]}
    rest = {}
    for name, weight in backbone.theta_0.items():
        total = torch.zeros(weight.shape, dtype=torch.int64)
        for member in others.values():
            total += (member.task_vector.tensors[f"{name}/delta"].double() * 2**40).round().long()
        rest[name] = (total.double() * (2.0**-40 / count)).float()
    return fit_task_vector(
        backbone,
        Kind.FULL,
        data.train,
        zero_head(data.classes, backbone.num_features),
        config.train,
        generator=generator_for(config.seed, "train", client),
        course=Course(
            anchor=Anchor(expanded(mean, backbone.theta_0)),
            ensemble=Ensemble(rest, 1 / count, config.method.beta),
        ),
    ).task_vector


def test_a_step_of_iel_is_training_inside_the_sum_of_those_before(images, tmp_path):
    given = {**SEQUENTIAL, "kind": "full"}
    federate(images, tmp_path / "out", **given)
    members, config = sent_last(tmp_path / "out"), config_of(images, **given)
    for i, client in enumerate(THREE):
        before = {c: members[c] for c in THREE[:i]}
        expected = step_by_hand(client, before, members[client], config)
        assert same(members[client].task_vector.tensors, expected.tensors)


def test_who_is_trained_anew_is_not_inside_a_sum_with_what_it_was(images, tmp_path):
    given = {**SEQUENTIAL, "kind": "full"}
    federate(images, tmp_path / "out", clients=2, **given)
    registry = tmp_path / "out" / "registry"
    before = sent_last(shutil.copytree(tmp_path / "out", tmp_path / "before"))
    anew = {**given, "replace": True, "seed": 3}
    results = federate(images, tmp_path / "anew", clients=2, registry=str(registry), **anew)
    assert results["registry"]["joined"] == ["ann", "ben"]
    after, config = {}, config_of(images, **anew)
    for client in ("ann", "ben"):
        folder = registry / Registry(registry).member(client).folder
        after[client] = Contribution.open(folder)
    ann = step_by_hand("ann", {"ben": before["ben"]}, after["ann"], config)
    assert same(after["ann"].task_vector.tensors, ann.tensors)
    ben = step_by_hand("ben", {"ann": after["ann"]}, after["ben"], config)
    assert same(after["ben"].task_vector.tensors, ben.tensors)
    assert after["ann"].lineage.ensemble == ("ben",)


# -- who fails, and who is there already ------------------------------------------------------


@pytest.mark.parametrize("phase", ["query.describe", "train"])
@pytest.mark.parametrize("client", ["ann", "eve"])
def test_who_fails_on_arrival_is_named_and_the_next_ones_come(images, tmp_path, phase, client):
    change = altered(lambda tensors, manifest: manifest.update(classes=["x"]))
    grid = {"tamper": {(PARTITIONS[client], phase): change}}
    results = federate(images, tmp_path / "out", grid, **SEQUENTIAL, method="ita")
    (left_out,) = results["left_out"]
    assert left_out["client"] == client
    assert left_out["phase"] == f"{phase.removeprefix('query.')}, {client}"
    others = [name for name in THREE if name != client]
    assert list(results["per_client"]) == others
    assert results["arrivals"]["class_il_accuracy"]["arrivals"] == others
    assert sent_last(tmp_path / "out")["ben"].lineage.anchored_by == tuple(
        name for name in others if name < "ben"
    )
    assert not (tmp_path / "out" / "incoming").exists()


def test_who_cannot_be_measured_is_in_the_model_and_the_next_ones_come(images, tmp_path):
    grid = {"tamper": {(0, "evaluate"): lost}}
    results = federate(images, tmp_path / "out", grid, **SEQUENTIAL, method="ita")
    arrivals = results["arrivals"]["class_il_accuracy"]
    assert arrivals["arrivals"] == list(THREE)
    assert [row[0] for row in arrivals["matrix"]] == [None] * 3
    assert arrivals["course"][0] is None
    assert arrivals["course"][2] is not None
    assert list(results["per_client"]) == list(THREE)


def test_if_nobody_arrives_the_run_fails_and_names_everyone(images, tmp_path):
    federate(images, tmp_path / "first", clients=2, **SEQUENTIAL, method="ita")
    registry = str(tmp_path / "first" / "registry")
    change = altered(lambda tensors, manifest: manifest.update(losses=[]))
    grid = {"tamper": {(2, "train"): change}}
    with pytest.raises(TooFewClients, match=r"eve \(train, eve\)"):
        federate(images, tmp_path / "out", grid, registry=registry, **SEQUENTIAL, method="ita")


def test_newcomers_arrive_at_a_registry_whose_members_stay_as_they_are(images, tmp_path):
    federate(images, tmp_path / "first", clients=2, **SEQUENTIAL)
    registry, before = tmp_path / "first" / "registry", sent_last(tmp_path / "first")
    wire = Wire()
    results = federate(
        images,
        tmp_path / "second",
        {"tamper": wire.tamper},
        clients=4,
        registry=str(registry),
        **SEQUENTIAL,
    )
    arrivals = results["arrivals"]["task_il_accuracy"]
    assert arrivals["arrivals"] == results["registry"]["joined"] == ["eve", "zoe"]
    assert len(arrivals["course"]) == 2
    after = sent_last(tmp_path / "first")
    assert all(same(after[c].task_vector.tensors, before[c].task_vector.tensors) for c in before)
    assert (wire.heard["ann"], wire.heard["ben"]) == ([], [])
    assert after["eve"].lineage.ensemble == after["eve"].lineage.anchored_by == ("ann", "ben")
    assert after["zoe"].lineage.ensemble == ("ann", "ben", "eve")
    assert list(results["per_client"]) == list(OWNED)


def test_who_is_excluded_does_not_arrive(images, tmp_path):
    results = federate(images, tmp_path / "out", **SEQUENTIAL, method="ita", exclude="ben")
    assert results["arrivals"]["class_il_accuracy"]["arrivals"] == ["ann", "eve"]
    assert "excluded" in results["left_out"][0]["reason"]
