"""Task vectors that are too long, or somebody else's, and versions that do not fit, are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from app_runs import TEST, altered, run

from fedcompo.errors import ContributionError, TooFewClients
from fedcompo.messages.answers import EvaluateAnswer
from fedcompo.method.contribution import Contribution
from fedcompo.registry.owners import OWNERS
from fedcompo.registry.registry import Registry
from fedcompo.report.confusion import BINS, Tally, interval
from fedcompo.runtime import check_versions, installed_versions
from fedcompo.storage.files import FISHER
from server.exchange.checks import checked_tally, figures_of, too_large


def test_a_fisher_is_too_large_far_beyond_the_median():
    assert too_large("Fisher", {"a": 1.0, "b": 2.0, "c": 200.0}) == {}
    large = too_large("Fisher", {"a": 1.0, "b": 2.0, "c": 201.0})
    assert list(large) == ["c"]
    assert "mean trace 201, more than 100 times the median 2 of the others'" in large["c"]


@pytest.mark.parametrize("traces", [{}, {"a": 1.0, "b": 1e9}, {"a": 0.0, "b": 0.0, "c": 1.0}])
def test_without_a_usual_fisher_none_is_too_large(traces):
    assert too_large("Fisher", traces) == {}


def test_nobody_is_told_what_a_client_states_beside_its_figures():
    honest = {"losses": [2.5, 1.5], "class_il_accuracy": 0.5}
    lies = {"own_task_accuracy": 10**400, "task_il_accuracy": ["x"], "\x1b_accuracy": 0.5}
    assert figures_of(({}, {**honest, **lies})) == honest


def test_the_same_versions_leave_nothing_to_say():
    assert check_versions("a", installed_versions()) == ""


def test_another_torch_is_noted():
    told = check_versions("a", {**installed_versions(), "torch": "1.0"})
    assert told.startswith("a runs torch 1.0 (here ")


@pytest.mark.parametrize("stated", [{"fedcompo": "99.0.0"}, {}])
def test_another_release_of_fedcompo_is_refused(stated):
    with pytest.raises(ContributionError, match="Install the same release on both"):
        check_versions("a", stated)


def test_builds_of_one_torch_for_different_devices_are_the_same():
    torch_version = installed_versions()["torch"].partition("+")[0]
    assert check_versions("a", {**installed_versions(), "torch": f"{torch_version}+other"}) == ""


EMPTY = ((0, 0.0, 0),) * (BINS - 1)


def answer_of(confusion=None, bins=None, images=10, accuracy=0.6) -> EvaluateAnswer:
    """Ten test images: of cat 3 in 5 are right, of dog 3 in 5."""
    confusion = confusion or {"cat": {"cat": 3, "eel": 2}, "dog": {"dog": 3, "cat": 2}}
    tally = Tally(confusion, bins or (*EMPTY, (10, 9.7, 6)))
    return EvaluateAnswer(
        base="pico@0", client="ann", classes=("cat", "dog"), tally=tally, num_examples=images,
        class_il_accuracy=accuracy, task_il_accuracy=1.0,
    )  # fmt: skip


def checked(answer: EvaluateAnswer) -> Tally | None:
    return checked_tally("ann", answer, ("cat", "dog"), ("cat", "dog", "eel"))


@pytest.mark.parametrize(
    "honest",
    [
        answer_of(),
        answer_of({"cat": {"cat": 3, "eel": 2}}, (*EMPTY, (0, 0.0, 0))),  # the rest is withheld
        answer_of({"cat": {"cat": 3, "eel": 2}}, accuracy=0.8),
        answer_of({"dog": {"dog": 5}}, accuracy=1.0),
    ],
)
def test_counts_that_can_be_true_are_taken(honest):
    assert checked(honest) == honest.tally
    assert checked(replace(honest, tally=None, num_examples=None)) is None


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (answer_of({"fox": {"cat": 1}}), "counts images of 'fox'"),
        (answer_of({"eel": {"cat": 1}}), "counts images of 'eel'"),  # somebody else's
        (answer_of({"cat": {"fox": 1}}), "counts images of 'fox'"),
        (answer_of(images=9), "does not add up"),
        (answer_of(images=11, accuracy=6 / 11), "does not add up"),  # all classes, but one image
        (answer_of(images=None), "does not add up"),
        (answer_of(accuracy=0.7), "does not add up"),
        (answer_of({"cat": {"cat": 3, "eel": 2}}, accuracy=0.9), "does not add up"),
        (answer_of({"cat": {"cat": 3, "eel": 2}}, accuracy=0.2), "does not add up"),
        (answer_of(bins=EMPTY), "does not add up"),
        (answer_of(bins=(*EMPTY, (11, 10.7, 6))), "does not add up"),
        (answer_of(bins=(*EMPTY, (10, 9.7, 11))), "does not add up"),
        (answer_of(bins=(*EMPTY, (10, 9.0, 6))), "does not add up"),  # that is another bin's
        (answer_of(bins=(*EMPTY, (10, float("nan"), 6))), "does not add up"),
        (answer_of(bins=(*EMPTY, (10, float("inf"), 6))), "does not add up"),
    ],
)
def test_counts_that_cannot_be_true_are_refused(lie, reason):
    with pytest.raises(ContributionError, match=f"Client 'ann' .*{reason}"):
        checked(lie)


def test_who_lies_of_its_counts_is_named_and_who_sends_none_takes_part(tmp_path):
    def older(tensors, manifest):
        for entry in ("confusion", "bins", "num_examples"):
            del manifest[entry]

    def lying(tensors, manifest):
        manifest["num_examples"] += 1

    tampered = {"tamper": {(0, "evaluate"): altered(older), (2, "evaluate"): altered(lying)}}
    results = run(tampered, tmp_path / "run")
    (left_out,) = results["left_out"]
    assert (left_out["client"], left_out["phase"]) == ("client-2", "evaluate")
    assert "does not add up" in left_out["reason"]
    assert results["clients_evaluated"] == ["client-0", "client-1"]
    first, second, _ = results["per_client"].values()
    assert list(results["by_class"]) == second["classes"]
    assert {own["images"] for own in results["by_class"].values()} == {TEST}
    for own in first, second:
        assert own["interval"] == interval(own["class_il_accuracy"], own["num_test_examples"])
    low, high = results["interval"]
    assert low < results["class_il_accuracy"] < high


def longer(tensors, manifest):
    for name in tensors:
        if name.endswith("/B"):
            tensors[name] *= 8


@pytest.mark.parametrize("method", ["ita", "iel"])
def test_a_client_that_sends_far_too_much_is_refused_and_named(tmp_path, method):
    tampered = {"tamper": {(2, "train"): altered(longer)}}
    results = run(
        tampered, tmp_path / "run", method=method, num_server_rounds=1, max_norm_ratio=4.0
    )
    named = results["left_out"]
    assert named[0]["client"] == "client-2"
    reasons = [entry["reason"] for entry in (*results["left_out"], *results["missed"])]
    assert any("max-norm-ratio" in reason for reason in reasons)
    assert results["registry"]["joined"] == ["client-0", "client-1"]


def of_no_images(tensors, manifest):
    second = next(name for name in tensors if name.endswith("statistics/second"))
    tensors[second] *= 0.5


def test_statistics_of_no_images_are_refused_and_their_client_is_named(tmp_path):
    tampered = {"tamper": {(2, "query.describe"): altered(of_no_images)}}
    results = run(tampered, tmp_path / "run", realign=False, aside=0.0, scale=1.0)
    (left_out,) = results["left_out"]
    assert "statistics of client 'client-2' are of no images" in left_out["reason"]
    assert results["registry"]["joined"] == ["client-0", "client-1"]


def far_away(tensors, manifest):
    """Features a hundred times as long: consistent, finite, and they would drown all others."""
    for name in tensors:
        if "statistics/s" in name:
            tensors[name] *= 1e2 if name.endswith("sums") else 1e4


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "second moment of the features"),
        ({"schedule": "sequential"}, "have the mean square"),
        ({"method": "fedavg", "num_server_rounds": 1}, "second moment of the features"),
    ],
)
def test_features_that_outweigh_all_others_are_refused_by_name(tmp_path, settings, reason):
    settings = {"realign": False, "aside": 0.0, "scale": 1.0, **settings}
    tampered = {"tamper": {(2, "query.describe"): altered(far_away)}}
    results = run(tampered, tmp_path / "run", **settings)
    (left_out,) = results["left_out"]
    assert (left_out["client"], left_out["phase"].partition(",")[0]) == ("client-2", "describe")
    assert reason in left_out["reason"]
    assert list(results["per_client"]) == ["client-0", "client-1"]


def test_nor_does_one_outweigh_the_others_under_the_composed_model(tmp_path):
    tampered = {"tamper": {(2, "query.realign"): altered(far_away)}}
    results = run(tampered, tmp_path / "run")
    (left_out,) = results["left_out"]
    assert (left_out["client"], left_out["phase"]) == ("client-2", "realign")
    assert any("λ was not voted on" in note for note in results["notes"])
    assert len(Registry(tmp_path / "run" / "registry").clients) == 3


def larger(tensors, manifest):
    for name in tensors:
        if "fisher/" in name:
            tensors[name] *= 1e6


@pytest.mark.parametrize("method", ["ita", "iel"])
def test_a_fisher_that_is_far_too_large_anchors_nobody_and_is_named(tmp_path, method):
    settings = {"method": method, "num_server_rounds": 1, "realign": False, "aside": 0.0}
    tampered = {"tamper": {(2, "query.describe"): altered(larger)}}
    results = run(tampered, tmp_path / "run", **settings, scale=1.0)
    (note,) = (note for note in results["notes"] if "The Fisher of client-2" in note)
    assert "It anchors nobody" in note
    assert results["registry"]["joined"] == ["client-0", "client-1", "client-2"]
    registry = Registry(tmp_path / "run" / "registry")
    anchored = {c: registry.member(c).lineage.anchored_by for c in registry.clients}
    assert all("client-2" not in others for others in anchored.values())
    assert not (tmp_path / "run" / "registry" / "clients" / "client-2" / FISHER).exists()


def test_a_replayed_contribution_is_refused(tmp_path):
    seen = {}

    def remember(tensors, manifest):
        seen.update(tensors)

    def replay(tensors, manifest):
        for name in tensors:
            if name.startswith("task_vector/"):
                tensors[name] = seen[name]

    tampered = {"tamper": {(0, "train"): altered(remember), (1, "train"): altered(replay)}}
    results = run(tampered, tmp_path / "run")
    (left_out,) = results["left_out"]
    assert left_out["client"] == "client-1"
    assert "byte for byte" in left_out["reason"]


def test_a_client_of_another_release_is_refused_and_named(tmp_path):
    def older(tensors, manifest):
        manifest["versions"]["fedcompo"] = "0.0.9"

    results = run({"tamper": {(1, "query.describe"): altered(older)}}, tmp_path / "run")
    (left_out,) = results["left_out"]
    assert "runs fedcompo 0.0.9" in left_out["reason"]


def test_a_copy_of_what_a_member_sent_before_is_refused_though_the_member_trains_anew(tmp_path):
    first = run({}, tmp_path / "first")
    registry = Registry(first["registry"]["path"])
    copied, _, last = registry.clients
    old = registry.contribution(last).task_vector.tensors

    def change(tensors, manifest):
        tensors |= {f"task_vector/{name}": old[name].clone() for name in old}

    tampered = {"tamper": {(0, "train"): altered(change)}}
    again = {"registry": str(registry.path), "replace": True}
    results = run(tampered, tmp_path / "second", **again)
    (left_out,) = results["left_out"]
    assert (left_out["client"], left_out["phase"]) == (copied, "train")
    assert "byte for byte" in left_out["reason"]


def test_whom_only_the_registry_refuses_is_left_out_and_the_others_join(tmp_path, monkeypatch):
    add = Registry.add

    def add_later(registry, *sources, **options):
        name = Contribution.open(sources[-1]).head.classes[0]
        if len(sources) == 3:  # while the clients trained
            (registry.path / OWNERS).write_text(f'{name} = ["nobody"]\n')
        add(registry, *sources, **options)

    monkeypatch.setattr(Registry, "add", add_later)
    results = run({}, tmp_path / "run")
    (left_out,) = results["left_out"]
    assert (left_out["client"], left_out["phase"]) == ("client-2", "compose")
    assert "claims the class" in left_out["reason"]
    assert results["registry"]["joined"] == ["client-0", "client-1"]
    assert Registry(results["registry"]["path"]).clients == ("client-0", "client-1")

    with pytest.raises(TooFewClients, match="claims the class"):
        run({}, tmp_path / "three", min_clients=3)
    assert Registry(tmp_path / "three" / "registry").clients == ()
