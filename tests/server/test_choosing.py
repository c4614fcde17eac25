"""The clients choose λ and the head; where they cannot, the run says why and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from app_runs import BACKBONE, QUICK, altered, run
from in_process_grid import lost
from round_runs import draw_images

from clients.local import LocalClient
from fedcompo.backbone.backbone import load_backbone
from fedcompo.backbone.tangent import feature_map
from fedcompo.composition.head import SHRINKAGE, head_from_total
from fedcompo.composition.settings import CompositionSettings
from fedcompo.composition.voting import Votes, elected, scales
from fedcompo.config.choices import Statistics
from fedcompo.config.run import RunConfig
from fedcompo.errors import ConfigError
from fedcompo.export.selection import from_registry
from fedcompo.method.features import extract_features
from fedcompo.method.statistics import FeatureSums, total_of
from fedcompo.registry.registry import Registry

SOME = {"images_per_class": 30, "alpha": 0.0, "local_epochs": 4}
"""Enough images that some are kept aside, and task vectors that matter."""


@pytest.fixture(scope="module")
def chosen(tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("chosen") / "out"
    return output, run({}, output, **SOME)


def clients_of(**settings) -> list[LocalClient]:
    config = {**QUICK, **{k.replace("_", "-"): v for k, v in {**SOME, **settings}.items()}}
    return [LocalClient.from_node(config, {"partition-id": i}) for i in range(3)]


def test_the_clients_elect_the_candidate_with_the_least_loss(chosen):
    """Repeated here, client by client, from the registry's own files."""
    output, results = chosen
    registry, clients = Registry(output / "registry"), clients_of()
    theta_0 = registry.backbone.load().theta_0
    pool, tried = registry.pool(), scales(3)
    votes = Votes.none(len(tried))
    sums: dict[float, list[FeatureSums]] = {}
    for scale in tried:
        theta = pool.compose(theta_0, scale=scale) if scale else {}
        sums[scale] = [
            FeatureSums.of(features(c, theta, 0), c.split[0].labels, c.data.classes)
            for c in clients
        ]
    heads = [head_from_total(total_of(sums[scale])) for scale in tried]
    for client in clients:
        logits = []
        for scale, head in zip(tried, heads, strict=True):
            theta = pool.compose(theta_0, scale=scale) if scale else {}
            logits.append(head(features(client, theta, 1)))
        labels = heads[0].indices(client.data.classes)[client.split[1].labels]
        votes += Votes.of(logits, labels)
    reported = results["scale"]
    assert reported["votes"] == votes.num_examples > 0
    expected = [loss / votes.num_examples for loss in votes.losses]
    assert [c["loss"] for c in reported["candidates"]] == pytest.approx(expected, abs=1e-4)
    winner = min(reported["candidates"], key=lambda c: (c["loss"], c["scale"]))
    assert (reported["scale"], reported["by"]) == (pytest.approx(winner["scale"]), "vote")
    assert expected[elected(votes.losses)] == pytest.approx(winner["loss"], abs=1e-4)


def features(client: LocalClient, theta, part: int) -> torch.Tensor:
    forward = feature_map(client.backbone, theta, tangent=False)
    return extract_features(forward, client.split[part].images)


def test_the_registry_holds_what_was_chosen(chosen):
    output, results = chosen
    registry, reported = Registry(output / "registry"), results["scale"]
    assert registry.scale == pytest.approx(reported["scale"])
    assert registry.factor == pytest.approx(reported["scale"] / 3)
    assert registry.state.shrinkage == SHRINKAGE
    assert registry.realigned
    assert results["notes"] == [] or all("voted" not in note for note in results["notes"])


def test_a_fixed_scale_is_not_voted_on_and_no_image_is_kept_aside(tmp_path):
    results = run({}, tmp_path / "out", scale=2.0, **SOME)
    assert "vote" not in results["phases"]
    assert results["scale"]["by"] == "fixed"
    assert (results["scale"]["scale"], results["scale"]["candidates"]) == (2.0, [])
    assert not any("voted" in note for note in results["notes"])
    assert all(len(c.split[1].labels) == 0 for c in clients_of(scale=2.0))


@pytest.mark.parametrize("scale", ["auto", 2.0])
def test_who_joins_a_registry_of_fixed_scale_is_told_that_images_are_kept_aside_in_vain(
    scale, tmp_path
):
    backbone = load_backbone(BACKBONE)
    Registry.create(tmp_path / "fixed", backbone, CompositionSettings(scale=2.0))
    results = run({}, tmp_path / "out", registry=str(tmp_path / "fixed"), scale=scale, **SOME)
    told = [note for note in results["notes"] if "trains nobody. Set `aside = 0`" in note]
    assert len(told) == (scale == "auto")
    assert results["scale"]["by"] == "fixed"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"aside": 0.0}, "`aside` is 0"),
        ({"images_per_class": 4}, "nobody keeps an image aside"),
        ({"realign": False}, "`realign` is false"),
        ({"dp_noise": 1.0}, "client-0, client-1, client-2 are under noise"),
    ],
)
def test_without_a_vote_the_length_is_kept_and_the_run_says_why(tmp_path, settings, reason):
    results = run({}, tmp_path / "out", **{**SOME, **settings})
    (note,) = [note for note in results["notes"] if "voted" in note]
    assert reason in note
    assert results["scale"]["by"] == "norms"
    assert results["scale"]["votes"] == 0
    assert 0 < results["scale"]["scale"] <= 3


def test_nobody_votes_on_images_that_were_trained_on(tmp_path):
    run({}, tmp_path / "first", **SOME, exclude="client-2", realign=False)
    joined = {"registry": str(tmp_path / "first" / "registry"), "aside": 0.2}
    results = run({}, tmp_path / "out", **SOME, **joined)
    (note,) = [note for note in results["notes"] if "voted" in note]
    assert "client-0, client-1 trained on the images to vote on" in note
    assert (results["scale"]["by"], results["scale"]["votes"]) == ("norms", 0)
    assert results["realigned_with"] == ["client-0", "client-1", "client-2"]


def test_one_node_under_noise_describes_one_model(tmp_path):
    """Each further model would be one more release."""
    options = {"node_configs": {1: {"dp-noise": 1.0}}}
    results = run(options, tmp_path / "out", **SOME)
    (note,) = [note for note in results["notes"] if "voted" in note]
    assert "the statistics of client-1 are under noise" in note
    assert results["left_out"] == []
    releases = [c["phase"] for c in results["per_client"]["client-1"]["caps"] if "noise" in c]
    assert releases == ["describe", "describe", "realign"]  # statistics, Fisher; statistics
    assert results["per_client"]["client-1"]["privacy"]["releases"] == 3


def test_without_everyones_features_the_head_stays_as_the_registry_aligned_it(tmp_path):
    one_by_one = {"timeout": 0.3, "in_flight": 1}
    results = run({"tamper": {(0, "query.realign"): lost}}, tmp_path / "out", **one_by_one)
    assert any("not aligned again" in note for note in results["notes"])
    assert results["scale"]["by"] == "norms"
    assert results["per_client"]["client-0"]["class_il_accuracy"] is None
    assert results["class_il_accuracy"] is not None


def _more_hits(tensors, manifest):
    manifest["hits"] = [10**6] * len(manifest["hits"])


def _below_zero(tensors, manifest):
    manifest["losses"][0] = -1.0


def _too_few(tensors, manifest):
    manifest["losses"].pop()


@pytest.mark.parametrize("change", [_more_hits, _below_zero, _too_few])
def test_a_vote_that_cannot_be_true_does_not_count(tmp_path, change):
    results = run({"tamper": {(1, "query.vote"): altered(change)}}, tmp_path / "out", **SOME)
    (left_out,) = results["left_out"]
    assert (left_out["client"], left_out["phase"]) == ("client-1", "vote")
    assert results["scale"]["by"] == "vote"
    assert results["scale"]["votes"] > 0
    assert Registry(tmp_path / "out" / "registry").clients == ("client-0", "client-1", "client-2")


def test_a_client_with_a_single_class_takes_part(tmp_path):
    owned = {"ann": {"cat": 6}, "ben": {"dog": 6, "eel": 6}, "eve": {"fox": 6, "owl": 6}}
    images = draw_images(tmp_path / "images", owned)
    results = run({}, tmp_path / "out", data=f"folder:{images}")
    assert results["left_out"] == []
    assert results["classes"] == ["cat", "dog", "eel", "fox", "owl"]
    lineages = {c: own["lineage"]["aligned_with"] for c, own in results["per_client"].items()}
    assert lineages == {"ann": ["ben", "eve"], "ben": [], "eve": []}
    registry = Registry(tmp_path / "out" / "registry")
    assert registry.contribution("ann").head.classes == ("cat",)


def test_the_papers_protocol_has_mixtures_a_fisher_under_the_joint_head_and_no_vote(tmp_path):
    results = run({}, tmp_path / "out", preset="paper", local_epochs=1)
    phases = ["describe", "align", "fisher", "train", "compose", "realign", "evaluate"]
    assert list(results["phases"]) == phases
    assert results["scale"]["by"] == "fixed"
    assert results["scale"]["scale"] == 1.0
    lineage = results["per_client"]["client-1"]["lineage"]
    assert lineage["aligned_with"] == lineage["anchored_by"] == ["client-0", "client-2"]
    registry = Registry(tmp_path / "out" / "registry")
    assert registry.settings.statistics is Statistics.MIXTURES
    for left in (True, False):
        with pytest.raises(ConfigError, match="no head can be made of both"):
            run({}, tmp_path / f"again{left}", registry=str(registry.path), replace=True)
        for client in registry.clients:
            registry.remove(client)


def test_a_fisher_of_class_probabilities_is_under_the_joint_head(tmp_path):
    results = run({}, tmp_path / "out", curvature="exact", head_start="zero", realign=False)
    assert list(results["phases"]) == ["describe", "fisher", "train", "compose", "evaluate"]
    assert results["per_client"]["client-0"]["lineage"]["aligned_with"] == ["client-1", "client-2"]
    assert results["per_client"]["client-0"]["distance"] is None


def test_a_fisher_of_another_curvature_anchors_nobody(tmp_path):
    """Its unit is another: the sum of both would be the larger one's alone."""
    first = run({}, tmp_path / "first", exclude="client-2", realign=False)
    assert first["per_client"]["client-0"]["lineage"]["anchored_by"] == ["client-1"]
    registry = {"registry": str(tmp_path / "first" / "registry"), "realign": False}
    results = run({}, tmp_path / "out", **registry, curvature="exact")
    assert results["per_client"]["client-2"]["lineage"]["anchored_by"] == []
    assert any("client-0, client-1, or one of another" in note for note in results["notes"])


def test_a_client_may_send_no_fisher(tmp_path):
    options = {"node_configs": {1: {"fisher-form": "none"}}}
    results = run(options, tmp_path / "out", realign=False)
    lineages = {c: own["lineage"]["anchored_by"] for c, own in results["per_client"].items()}
    assert lineages == {
        "client-0": ["client-2"],
        "client-1": ["client-0", "client-2"],
        "client-2": ["client-0"],
    }
    assert any("client-1 sent no Fisher" in note for note in results["notes"])


def test_a_run_says_how_far_each_client_went(chosen):
    _, results = chosen
    assert all(own["distance"] > 0 for own in results["per_client"].values())


def test_the_distance_is_in_the_metric_of_the_others_whoever_s_anchors(chosen, tmp_path):
    _, results = chosen
    own = run({}, tmp_path / "out", **SOME, anchor="own", realign=False)
    for client, expected in results["per_client"].items():
        assert own["per_client"][client]["distance"] == pytest.approx(expected["distance"])


def test_by_another_rule_they_vote_on_its_total(tmp_path):
    """The rule is the registry's. λ = 0 is the frozen backbone; the others multiply the total."""
    fast = {**SOME, "local_epochs": 1, "local_steps": 5}
    settings = CompositionSettings.of(RunConfig.parse({"rule": "ties:density=0.3"}))
    path = Registry.create(tmp_path / "empty", load_backbone(BACKBONE), settings).path
    results = run({}, tmp_path / "out", **fast, registry=str(path))
    assert any("composes with its own settings" in note for note in results["notes"])
    registry = Registry(path)
    chosen, candidates = results["scale"], results["scale"]["candidates"]
    assert (chosen["by"], [c["scale"] for c in candidates]) == ("vote", list(scales(3)))
    losses = []
    clients = clients_of(**fast)
    for scale in scales(3):
        theta = dict(from_registry(registry, scale=scale).stream()) if scale else {}
        own = [(features(c, theta, 0), c.split[0].labels, c.data.classes) for c in clients]
        head = head_from_total(total_of([FeatureSums.of(*described) for described in own]))
        votes = Votes.none(1)
        for client in clients:
            labels = head.indices(client.data.classes)[client.split[1].labels]
            votes += Votes.of([head(features(client, theta, 1))], labels)
        losses.append(votes.losses[0] / votes.num_examples)
    assert [c["loss"] for c in candidates] == pytest.approx(losses, abs=1e-4)
