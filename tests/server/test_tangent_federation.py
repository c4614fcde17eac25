"""Tangent clients in a federation: trained, composed and measured linearised, removed exactly."""

from __future__ import annotations

import pytest
import torch
from app_runs import run

from fedcompo.audit.evaluation import clients_data
from fedcompo.config.choices import Method
from fedcompo.config.run import RunConfig
from fedcompo.errors import ContributionError
from fedcompo.registry.registry import Registry
from fedcompo.training.accuracy import accuracy_of


@pytest.mark.parametrize("method", [Method.ITA, Method.IEL])
def test_what_clients_measure_is_the_linearised_model(tmp_path, method):
    results = run({}, tmp_path / "out", kind="tangent", method=str(method), num_server_rounds=2)
    assert not results["left_out"]
    registry = Registry(tmp_path / "out" / "registry")
    assert registry.linearised
    backbone, config = registry.backbone.load(), RunConfig.parse(results["settings"])
    for data in clients_data(config.data, backbone, seed=config.seed):
        theta, head = registry.theta_p(), registry.joint_head()
        found = accuracy_of(backbone, theta, head, data.classes, data.test, linearised=True)
        assert results["per_client"][data.name]["class_il_accuracy"] == found.class_il


def test_lineage_free_tangents_forget_a_client_in_influence_too(tmp_path):
    free = {"kind": "tangent", "anchor": "own", "head_start": "probe"}
    run({}, tmp_path / "all", **free)
    run({}, tmp_path / "gold", exclude="client-1", **free)
    registry = Registry(tmp_path / "all" / "registry")
    record = registry.remove("client-1")
    assert record.influence.exact
    gold = Registry(tmp_path / "gold" / "registry")
    for name, weight in gold.theta_p().items():
        assert torch.equal(registry.theta_p()[name], weight)


def test_a_node_that_insists_on_another_kind_is_named_before_anyone_trains(tmp_path):
    nodes = {"node_configs": {1: {"kind": "tangent"}}}
    results = run(nodes, tmp_path / "out", kind="lora,full")
    (left_out,) = results["left_out"]
    assert left_out["phase"] == "describe"
    assert "tangents mix with no other kind" in left_out["reason"]


def test_tangents_do_not_join_a_registry_of_others(tmp_path):
    run({}, tmp_path / "lora", exclude="client-2")
    registry = tmp_path / "lora" / "registry"
    before = Registry(registry).state.root
    with pytest.raises(ContributionError, match="Use a registry of its own"):
        run({}, tmp_path / "tangent", registry=str(registry), kind="tangent")
    assert Registry(registry).state.root == before
