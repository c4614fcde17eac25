"""Accuracy of a composition on the clients' images, held against the library by hand."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cli_runs import CLASSES, digits_registry
from registry_builders import backbone, contents, member, registry_of

from fedcompo.audit.evaluation import (
    Figures,
    clients_data,
    effect_of_removal,
    evaluate_clients,
    figures_of,
    run_config_of,
)
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData, load_client_data
from fedcompo.errors import ConfigError, DataError
from fedcompo.method.deltas import Weights
from fedcompo.method.heads import Head
from fedcompo.registry.registry import Registry
from fedcompo.report.confusion import interval
from fedcompo.report.progress import listening
from fedcompo.training.accuracy import accuracy_of

CONFIG = RunConfig()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return digits_registry(tmp_path_factory.mktemp("evaluation") / "registry")


def digits_of(partition: int, *, seed: int = 0) -> ClientData:
    seen = backbone().preprocessing
    return load_client_data(CONFIG.data, seen, partition=partition, seed=seed)


def by_hand(theta: Weights, head: Head, *partitions: int) -> Figures:
    figures = {}
    for partition in partitions:
        data = digits_of(partition)
        found = accuracy_of(backbone(), theta, head, data.classes, data.test)
        figures[data.name] = {
            "class_il_accuracy": found.class_il,
            "interval": interval(found.class_il, len(data.test.labels)),
            "task_il_accuracy": found.task_il,
            "num_examples": len(data.test.labels),
        }
    return figures


def test_figures_are_those_of_the_library(registry: Registry) -> None:
    theta, head, steps = registry.theta_p(), registry.joint_head(), []
    with listening(lambda progress: steps.append(str(progress))):
        found = figures_of(evaluate_clients(backbone(), theta, head, CONFIG))
    assert found == by_hand(theta, head, 0, 1, 2)
    assert steps == [f"evaluating on client-{partition}" for partition in range(3)]
    assert len({figures["class_il_accuracy"] for figures in found.values()}) > 1


def test_only_those_wanted_are_looked_at(registry: Registry) -> None:
    theta, head = registry.theta_p(), registry.joint_head()
    found = evaluate_clients(backbone(), theta, head, CONFIG, wanted=("client-2",))
    assert figures_of(found) == by_hand(theta, head, 2)


def test_clients_with_a_class_that_the_head_does_not_know_are_left_out(registry: Registry) -> None:
    head = registry.joint_head().rows(["0", "1", "6", "8"])
    found = evaluate_clients(backbone(), registry.theta_p(), head, CONFIG)
    assert figures_of(found) == by_hand(registry.theta_p(), head, 0)


def test_images_of_nobody_in_the_model_are_an_error_that_names_its_classes(
    registry: Registry,
) -> None:
    theta, head = registry.theta_p(), registry.joint_head()
    with pytest.raises(DataError, match="it knows 0, 1, 2, 6, 7, 8"):
        evaluate_clients(backbone(), theta, head, CONFIG, wanted=("client-4",))


def test_data_comes_client_by_client_as_it_was_dealt() -> None:
    found = list(clients_data(CONFIG.data, backbone(), seed=0))
    assert [data.name for data in found] == [f"client-{i}" for i in range(5)]
    assert {d.name: d.classes for d in found if d.name in CLASSES} == CLASSES
    (one,) = clients_data(CONFIG.data, backbone(), seed=3, wanted=("client-3",))
    assert one.classes == digits_of(3, seed=3).classes != digits_of(3).classes


def test_settings_are_those_of_the_clients_run_but_for_the_data(registry: Registry) -> None:
    assert run_config_of(registry) == CONFIG
    config = run_config_of(registry, "folder:somewhere")
    assert config.data == replace(CONFIG.data, data="folder:somewhere")
    assert replace(config, data=CONFIG.data) == CONFIG


def test_a_registry_of_nobody_has_nothing_to_evaluate(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Nobody is in the registry"):
        run_config_of(registry_of(tmp_path / "r"))


def test_settings_that_this_version_does_not_know_are_refused(tmp_path: Path) -> None:
    odd = replace(member("ada"), settings={"colour": "red"})
    with pytest.raises(ConfigError, match="`colour` is no setting"):
        run_config_of(registry_of(tmp_path / "r", odd))


def test_the_effect_foreseen_is_the_effect_had(registry: Registry, tmp_path: Path) -> None:
    copy = Registry(shutil.copytree(registry.path, tmp_path / "r", symlinks=True))
    before = contents(copy.path)
    foreseen = effect_of_removal(copy, ["client-1"], None)
    assert contents(copy.path) == before
    assert foreseen["before"] == by_hand(copy.theta_p(), copy.joint_head(), 0, 1, 2)
    copy.remove("client-1")
    assert foreseen["after"] == by_hand(copy.theta_p(), copy.joint_head(), 0, 2)
    assert foreseen["before"]["client-0"] != foreseen["after"]["client-0"]


def test_after_the_last_client_nothing_is_left_to_measure(tmp_path: Path) -> None:
    registry = registry_of(tmp_path / "r", member("client-0", classes=CLASSES["client-0"]))
    effect = effect_of_removal(registry, ["client-0"], None)
    assert effect["before"] == by_hand(registry.theta_p(), registry.joint_head(), 0)
    assert effect["after"] == {}


@pytest.mark.parametrize("data", ["folder:/nowhere", "digist"])
def test_an_effect_that_cannot_be_measured_says_why(registry: Registry, data: str) -> None:
    effect = effect_of_removal(registry, ["client-1"], data)
    assert set(effect) == {"reason"}
    assert data.removeprefix("folder:") in effect["reason"]
