"""Merges measured beside a run: the mean is the run's own composition, and so are its figures."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
from app_runs import ALL_WEIGHTS, run

from fedcompo.audit.evaluation import clients_data, run_config_of
from fedcompo.composition.head import head_of
from fedcompo.method.heads import Head
from fedcompo.method.pool import Pool
from fedcompo.registry.registry import Registry
from fedcompo.training.accuracy import accuracy_of

sys.path.append(str(Path(__file__).resolve().parents[2] / "simulations" / "compare"))
merged, merging = import_module("merged"), import_module("merging")

MEASURES = ("class_il_accuracy", "task_il_accuracy")
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[dict, Registry, dict]:
    output = tmp_path_factory.mktemp("run") / "out"
    results = run({}, output, **SETTINGS)
    registry = Registry(output / "registry")
    return results, registry, merged.evaluate_merges(registry)


def assert_alike(figures: dict, results: dict, *, images: float, prefix: str = "") -> None:
    """Equal up to some images of each client."""
    assert list(figures["per_client"]) == list(results["per_client"])
    for client, reported in results["per_client"].items():
        for key in MEASURES:
            share = (images + 0.5) / reported["num_test_examples"]
            found = figures["per_client"][client][key]
            assert found == pytest.approx(reported[f"{prefix}{key}"], abs=share)


def test_the_mean_has_the_figures_of_the_run(finished):
    results, _, figures = finished
    assert_alike(figures["mean"], results, images=1)
    assert figures["mean"]["class_il_accuracy"] == pytest.approx(
        results["class_il_accuracy"], abs=0.01
    )


def test_a_run_that_was_not_realigned_is_compared_as_such(finished, tmp_path):
    results = run({}, tmp_path / "out", **SETTINGS, realign=False)
    registry = Registry(tmp_path / "out" / "registry")
    figures = merged.evaluate_merges(registry, {"mean": merging.mean})
    assert_alike(figures["mean"], results, images=1)
    realigned, *_ = finished
    assert realigned["class_il_accuracy"] > results["class_il_accuracy"] + 0.01


def test_the_frozen_backbone_has_the_registrys_head_and_nearly_the_runs_figures(finished):
    results, registry, figures = finished
    config, backbone = run_config_of(registry), registry.backbone.load()
    head = head_of(registry.pool(), registry.settings)
    for data in clients_data(config.data, backbone, seed=config.seed):
        found = accuracy_of(backbone, {}, head, data.classes, data.test)
        own = figures["frozen"]["per_client"][data.name]
        assert [own[key] for key in MEASURES] == [found.class_il, found.task_il]
    assert_alike(figures["frozen"], results, images=5, prefix="frozen_")  # other draws align it


def test_all_merges_are_measured_and_differ(finished):
    _, registry, figures = finished
    assert list(figures) == ["frozen", *merging.MERGES]
    for found in figures.values():
        assert all(0 <= found[key] <= 1 for key in MEASURES)
        assert found["class_il_accuracy"] <= found["task_il_accuracy"]
        assert list(found["per_client"]) == list(registry.clients)
    assert len({figures[name]["class_il_accuracy"] for name in figures}) > 4


def test_each_merge_gets_a_head_aligned_on_its_own_features(finished, monkeypatch):
    _, registry, figures = finished
    seen: list[Head] = []
    original = merged.measured

    def noted(backbone, theta, head, datas, **options):
        seen.append(head)
        return original(backbone, theta, head, datas, **options)

    monkeypatch.setattr(merged, "measured", noted)
    names = ("mean", "task_arithmetic_3")
    again = merged.evaluate_merges(registry, {name: merging.MERGES[name] for name in names})
    assert again == {name: figures[name] for name in ("frozen", *names)}
    frozen, mean, far = seen
    for one, other in ((frozen, mean), (mean, far), (frozen, far)):
        assert not one.weight.equal(other.weight)
    own = registry.joint_head()
    assert float((mean.weight - own.weight).norm() / own.weight.norm()) < 1e-3


def test_what_cannot_be_merged_so_says_why(finished):
    _, registry, _ = finished

    def only_the_first(pool: Pool, theta_0):
        return merging.fisher_weighted(registry.pool(), theta_0)

    figures = merged.evaluate_merges(registry, {"without fishers": only_the_first})
    assert "There is no Fisher of client-0" in figures["without fishers"]["reason"]
