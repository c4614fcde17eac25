"""Any weights measured beside a run: the run's own composition has the run's own figures."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
from app_runs import ALL_WEIGHTS, run

from fedcompo.audit.evaluation import clients_data, run_config_of
from fedcompo.composition.head import head_of
from fedcompo.training.accuracy import accuracy_of

sys.path.append(str(Path(__file__).resolve().parents[2] / "simulations" / "compare"))
bench, compare_rules, measures = map(import_module, ("bench", "compare_rules", "measures"))

SETTINGS = {
    "target_weights": ALL_WEIGHTS,
    "trust_region": 0.0,
    "local_epochs": 2,
    "learning_rate": 0.02,
    "batch_size": 4,
    "num_classes": 9,
    "images_per_class": 16,
    "scale": 1.0,
    "seed": 3,
}
"""Trained far enough for merges to differ; composed as their mean."""
DERIVED = [name for name, method in measures.METHODS.items() if method.of]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    return run({}, output, **SETTINGS), bench.Bench(output / "registry")


def own_composition(beside) -> dict[str, tuple[float, float]]:
    theta, clients = beside.registry.theta_p(), beside.registry.clients
    return beside.accuracies(theta, beside.head(theta, clients), clients)


def assert_alike(found: dict, results: dict, *, images: float, prefix: str = "") -> None:
    """Equal up to some images of each client."""
    assert list(found) == list(results["per_client"])
    for client, reported in results["per_client"].items():
        share = (images + 0.5) / reported["num_test_examples"]
        for figure, key in zip(found[client], ("class_il", "task_il"), strict=True):
            assert figure == pytest.approx(reported[f"{prefix}{key}_accuracy"], abs=share)


def test_the_composition_has_the_figures_of_the_run(finished):
    results, beside = finished
    assert_alike(own_composition(beside), results, images=1)


def test_a_run_that_was_not_realigned_is_measured_as_such(finished, tmp_path):
    results = run({}, tmp_path / "out", **SETTINGS, realign=False)
    assert_alike(own_composition(bench.Bench(tmp_path / "out" / "registry")), results, images=1)
    realigned, _ = finished
    assert realigned["class_il_accuracy"] > results["class_il_accuracy"] + 0.01


def test_the_frozen_backbone_has_the_registrys_head_and_nearly_the_runs_figures(finished):
    results, beside = finished
    registry, clients = beside.registry, beside.registry.clients
    found = beside.accuracies({}, beside.frozen_head(clients), clients)
    config, backbone = run_config_of(registry), registry.backbone.load()
    head = head_of(registry.pool(), registry.settings)
    for data in clients_data(config.data, backbone, seed=config.seed):
        own = accuracy_of(backbone, {}, head, data.classes, data.test)
        assert found[data.name] == (own.class_il, own.task_il)
    assert_alike(found, results, images=5, prefix="frozen_")


def test_the_head_is_made_of_the_images_that_clients_realign_on(finished):
    _, beside = finished
    theta, clients = beside.registry.theta_p(), beside.registry.clients
    head, own = beside.head(theta, clients), beside.registry.joint_head()
    assert head.classes == own.classes
    assert float((head.weight - own.weight).norm() / own.weight.norm()) < 1e-3
    assert not head.weight.equal(beside.head({}, clients).weight)


def test_derived_methods_are_measured_and_differ(finished):
    _, beside = finished
    figures = {name: measures.derive(beside, name) for name in DERIVED}
    for found in figures.values():
        assert 0 <= found["class_il"] <= found["task_il"] <= 1
    assert len({found["class_il"] for found in figures.values()}) > 3
    assert figures["frozen"]["up"] > 0
    assert figures["joint"]["up"] is None


def test_rules_are_compared_and_the_mean_has_the_figures_of_the_run(finished, monkeypatch, capsys):
    results, beside = finished
    file = beside.path.with_name("rules.json")
    words = [beside.path.parent, "--rule", "mean", "--rule", "ties", "--json", file]
    monkeypatch.setattr(sys, "argv", ["compare_rules.py", *map(str, words)])
    compare_rules.main()
    (found,) = json.loads(file.read_text()).values()
    tried = found["mean"]["tried"]
    assert tried["1"]["class_il"] == pytest.approx(results["class_il_accuracy"], abs=0.02)
    assert found["mean"]["best"] == max(one["class_il"] for one in tried.values())
    assert found["ties"]["removal"] == "O(T)"
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows] == ["rule", "---", "mean", "ties"]


def test_a_client_that_leaves_takes_its_task_and_little_else(finished):
    _, beside = finished
    changed = measures.specialised_and_removed(beside)
    assert changed["specialised"]["target"] > 0.5
    assert changed["removal"]["control"] == pytest.approx(
        changed["removal"]["control_before"], abs=0.2
    )
