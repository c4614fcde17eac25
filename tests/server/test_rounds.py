"""IEL over the real apps: what a round computes, and what of it the registry then holds."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from app_runs import QUICK, altered
from flwr.app import Message
from in_process_grid import lost
from round_runs import (
    EXAMPLES,
    OWNED,
    SMALL,
    Wire,
    assert_sum_of_the_last,
    federate,
    notes_of,
    same,
    same_contributions,
    sent_last,
)

from clients.local import LocalClient
from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.composition import fixed_point
from fedcompo.composition.running_sum import RunningSum
from fedcompo.config.choices import Kind
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import load_client_data
from fedcompo.errors import ContributionError, TooFewClients
from fedcompo.method.deltas import Weights
from fedcompo.method.fisher import expanded
from fedcompo.method.heads import zero_head
from fedcompo.method.task_vector import TaskVector
from fedcompo.registry.registry import Registry
from fedcompo.registry.verification import verify_registry
from fedcompo.seeds import generator_for
from fedcompo.storage.files import FISHER
from fedcompo.training.fit import Course, Fitted, fit_task_vector
from fedcompo.training.penalty import Anchor, Ensemble
from server.rounds.rounds import Rounds

THREE = ("ann", "ben", "eve")


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory) -> tuple[Path, dict, Path]:
    """A run of two rounds in which nothing happens: its folder, results, and its clients' state."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDCOMPO_STATE", str(folder / "state"))
        return folder / "out", federate(images, folder / "out"), folder / "state"


@pytest.fixture
def watched(monkeypatch) -> list[Rounds]:
    """The rounds of each run, as they were when the run had done them."""
    seen: list[Rounds] = []
    original = Rounds.run

    def run(self: Rounds) -> None:
        original(self)
        seen.append(self)

    monkeypatch.setattr(Rounds, "run", run)
    return seen


def config_of(images: Path, **settings: object) -> RunConfig:
    given = {**SMALL, "data": f"folder:{images}", **settings}
    return RunConfig.parse({**QUICK, **{k.replace("_", "-"): v for k, v in given.items()}})


# -- what a round computes --------------------------------------------------------------------


def anchor_by_hand(output: Path, theta_0: Weights) -> Anchor:
    """The mean Fisher over the examples of all clients, the client's own among them."""
    fishers = [member.fisher for member in sent_last(output).values()]
    count = sum(fisher.num_examples for fisher in fishers)
    sums = [fisher.sums for fisher in fishers]
    mean = {n: (sum(s[n].double() for s in sums) / count).float() for n in sums[0]}
    return Anchor(expanded(mean, theta_0))


def rest_by_hand(last: dict[str, Fitted], client: str, times: dict[str, int]) -> Weights:
    """The weighted mean of the others, each rounded to a multiple of 2⁻⁴⁰, in whole numbers."""
    others = {c: fitted.task_vector.tensors for c, fitted in last.items() if c != client}
    together, rest = sum(times.values()), {}
    for name in next(iter(others.values()), {}):
        total = sum(times[c] * (t[name].double() * 2**40).round().long() for c, t in others.items())
        rest[name.removesuffix("/delta")] = (total.double() * (2.0**-40 / together)).float()
    return rest


def rounds_by_hand(
    output: Path, config: RunConfig, backbone: Backbone, times: dict[str, int]
) -> dict[str, Fitted]:
    """Oracle: all rounds as two loops, nothing between them but dictionaries."""
    number = config.method.num_server_rounds
    zeros = {name: torch.zeros_like(weight) for name, weight in backbone.theta_0.items()}
    last: dict[str, Fitted] = {}
    for passed in range(number):
        trained = {}
        for i, client in enumerate(THREE):
            data = load_client_data(config.data, backbone.preprocessing, partition=i, seed=0)
            own, before = zero_head(data.classes, backbone.num_features), last.get(client)
            trained[client] = fit_task_vector(
                backbone,
                Kind.FULL,
                data.train,
                own,
                config.train,
                generator=generator_for(config.seed, "train", client, str(passed + 1)),
                course=Course(
                    before.task_vector if before else None,
                    before.head if before else None,
                    anchor=anchor_by_hand(output, backbone.theta_0),
                    ensemble=Ensemble(
                        rest_by_hand(last, client, times) or zeros,
                        times[client] / sum(times.values()),
                        config.method.beta,
                        config.compose.fixed_scale or 1.0,
                    ),
                    passed=passed / number,
                    share=1 / number,
                ),
            )
        last = trained
    return last


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"coefficients": "examples", "scale": 2.0},
        {"penalty": "coupled", "in_flight": 1, "num_server_rounds": 3},
        {"penalty": "explicit", "num_server_rounds": 1},
    ],
)
def test_the_rounds_are_a_loop_over_the_clients_inside_the_sum_of_the_others(
    images, tmp_path, settings
):
    given = {"kind": "full", "local_epochs": 2, **settings}
    federate(images, tmp_path / "out", **given)
    config = config_of(images, **given)
    backbone = load_backbone(config.backbone)
    examples = config.compose.coefficients == "examples"
    times = {client: EXAMPLES[client] if examples else 1 for client in THREE}
    expected = rounds_by_hand(tmp_path / "out", config, backbone, times)
    for client, member in sent_last(tmp_path / "out").items():
        assert same(member.task_vector.tensors, expected[client].task_vector.tensors)
        assert torch.equal(member.head.weight, expected[client].head.weight)
        assert any(tensor.any() for tensor in member.task_vector.tensors.values())


def test_what_is_composed_is_the_sum_the_rounds_ended_with(images, tmp_path, watched):
    wire = Wire()
    settings = {"kind": "lora,full,ia3", "num_server_rounds": 3, "coefficients": "examples"}
    results = federate(images, tmp_path / "out", {"tamper": wire.tamper}, **settings)
    assert_sum_of_the_last(tmp_path / "out", wire)
    registry = Registry(tmp_path / "out" / "registry")
    (rounds,) = watched
    assert same(registry.running_sum(), rounds.sum.running.total)
    assert [f["kind"] for f in results["per_client"].values()] == ["lora", "full", "ia3"]
    shares = [f["coefficient"] for f in results["per_client"].values()]
    assert shares == pytest.approx([EXAMPLES[c] / 31 for c in THREE])
    assert all(finding.holds for finding in verify_registry(registry.path))


def test_a_run_tells_of_its_rounds_and_leaves_nothing_but_the_registry(plain):
    output, results, state = plain
    for number, happened in enumerate(results["rounds"], 1):
        assert happened["round"] == number
        assert happened["members"] == happened["trained"] == list(THREE)
        assert happened["missed"] == happened["went"] == []
        assert happened["came"] == (list(THREE) if number == 1 else [])
        losses = [results["per_client"][c]["losses"][number - 1] for c in THREE]
        assert happened["mean_loss"] == pytest.approx(sum(losses) / 3)
    assert list(results["phases"]) == [
        "identify",
        "describe, round 1",
        "train, round 1",
        "train, round 2",
        "compose",
        "evaluate",
    ]
    assert results["missed"] == results["left_out"] == notes_of(results) == []
    assert all(0 <= f["frozen_class_il_accuracy"] <= 1 for f in results["per_client"].values())
    left = {path.name for path in output.iterdir()}
    assert left == {"registry", "results.json", "report.html", "events.jsonl", "flower.log"}
    assert list(state.rglob("*")) == []


def test_the_same_seed_gives_the_same_result_whoever_answers_at_a_time(plain, images, tmp_path):
    federate(images, tmp_path / "one", in_flight=1)
    assert same_contributions(plain[0], tmp_path / "one")


def test_every_contribution_names_who_it_was_trained_with(plain):
    for client, member in sent_last(plain[0]).items():
        others = tuple(name for name in THREE if name != client)
        assert member.lineage.method == "iel"
        assert member.lineage.anchored_by == others
        assert member.lineage.ensemble == others


def test_in_one_round_nobody_trains_inside_a_sum_that_holds_anyone(images, tmp_path):
    federate(images, tmp_path / "out", num_server_rounds=1)
    assert all(m.lineage.ensemble == () for m in sent_last(tmp_path / "out").values())


def test_of_what_is_the_clients_own_the_lineage_names_nobody_but_the_sum_does(images, tmp_path):
    settings = {"head_start": "probe", "anchor": "own", "keep_fisher": False}
    federate(images, tmp_path / "out", **settings)
    for client, member in sent_last(tmp_path / "out").items():
        assert member.lineage.anchored_by == member.lineage.aligned_with == ()
        assert member.lineage.ensemble == tuple(name for name in THREE if name != client)
    assert not list((tmp_path / "out").rglob(FISHER))


def test_one_client_alone_is_a_federation_of_one(images, tmp_path):
    results = federate(images, tmp_path / "out", clients=1, min_clients=1)
    assert results["per_client"]["ann"]["coefficient"] == 1.0
    (member,) = sent_last(tmp_path / "out").values()
    assert (member.lineage.anchored_by, member.lineage.ensemble) == ((), ())
    assert_sum_of_the_last(tmp_path / "out")


def test_alpha_has_no_say_and_beta_has(images, tmp_path):
    federate(images, tmp_path / "a", alpha=0.0)
    federate(images, tmp_path / "b", alpha=500.0)
    free = federate(images, tmp_path / "c", alpha=500.0, beta=0.0, trust_region=0.0)
    assert same_contributions(tmp_path / "a", tmp_path / "b")
    assert not same_contributions(tmp_path / "a", tmp_path / "c")
    # Without a penalty no Fisher travels to the clients, only the sum of the others.
    assert free["per_client"]["ann"]["lineage"]["anchored_by"] == []
    sent = free["per_client"]["ann"]["traffic"]["train, round 1"]["bytes_sent"]
    assert sent < 1.2 * 4 * free["backbone"]["target_parameters"]


def test_messages_do_not_grow_with_the_number_of_clients(images, tmp_path):
    """But for the joint head's rows: one for each class."""
    sent, rows = [], []
    for count in (2, 4):
        results = federate(images, tmp_path / str(count), clients=count, fisher_form="dense")
        costs = results["per_client"]["ann"]["traffic"]
        sent.append([costs[f"train, round {n}"]["bytes_sent"] for n in (1, 2)])
        rows.append(len(results["classes"]))
    features = load_backbone(config_of(images).backbone).num_features
    for few, many in zip(*sent, strict=True):
        assert 0 <= many - few - 4 * (features + 1) * (rows[1] - rows[0]) < 200
    assert sent[0][1] < 0.6 * sent[0][0]  # the metric travels once


# -- who misses a round -----------------------------------------------------------------------


def nan(tensors: dict, manifest: dict) -> None:
    next(tensors[n] for n in tensors if n.startswith("task_vector/"))[0, 0] = float("nan")


def other_kind(tensors: dict, manifest: dict) -> None:
    manifest["kind"] = "tangent"


def huge(tensors: dict, manifest: dict) -> None:
    next(tensors[n] for n in tensors if n.startswith("task_vector/"))[0, 0] = 3.0


def no_losses(tensors: dict, manifest: dict) -> None:
    manifest["losses"] = []


def lacking(tensors: dict, manifest: dict) -> None:
    manifest["lacks"] = ["own"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lost, "no answer within 0.3 s"),
        (altered(nan), "not finite"),
        (altered(other_kind), "of the kind tangent, it was asked for full"),
        (altered(no_losses), "reports the losses []"),
    ],
)
def test_who_misses_a_round_stays_with_what_it_sent_last(images, tmp_path, watched, change, reason):
    wire = Wire({("ben", 2): change})
    settings = {"kind": "full", "num_server_rounds": 3}
    results = federate(images, tmp_path / "out", {"tamper": wire.tamper}, **settings)
    (missed,) = results["missed"]
    assert (missed["client"], missed["phase"]) == ("ben", "train, round 2")
    assert reason in missed["reason"]
    assert results["left_out"] == []
    assert [h["missed"] for h in results["rounds"]] == [[], ["ben"], []]
    assert [h["members"] for h in results["rounds"]] == [list(THREE)] * 3
    assert len(results["per_client"]["ben"]["losses"]) == 2
    assert_sum_of_the_last(tmp_path / "out", wire)
    assert same(Registry(tmp_path / "out" / "registry").running_sum(), watched[0].sum.running.total)


def test_what_it_sent_last_stays_in_the_sum_also_if_it_never_answers_again(images, tmp_path):
    wire = Wire({("ben", 2): lost, ("ben", 3): lost})
    results = federate(images, tmp_path / "out", {"tamper": wire.tamper}, num_server_rounds=3)
    assert [m["phase"] for m in results["missed"]] == ["train, round 2", "train, round 3"]
    assert list(results["per_client"]) == list(THREE)
    assert len(wire.heard["ben"]) == 1
    assert_sum_of_the_last(tmp_path / "out", wire)


def test_who_raises_once_misses_that_round_alone(images, tmp_path, monkeypatch):
    original = LocalClient.train

    def fail(self, request):
        if (self.name, request.round.number) == ("eve", 1):
            raise RuntimeError("the disk of eve is full")
        return original(self, request)

    monkeypatch.setattr("clients.work.LocalClient.train", fail)
    results = federate(images, tmp_path / "out", num_server_rounds=3)
    (missed,) = results["missed"]
    assert missed["client"] == "eve"
    assert missed["reason"] == "RuntimeError; see the client's own log."
    assert [h["members"] for h in results["rounds"]] == [["ann", "ben"], list(THREE), list(THREE)]
    # In round 2 nobody was trained inside eve's task vector yet; in round 3 all others were.
    members = sent_last(tmp_path / "out")
    assert members["ann"].lineage.ensemble == ("ben", "eve")
    assert members["eve"].lineage.ensemble == ("ann", "ben")
    assert_sum_of_the_last(tmp_path / "out")


def test_what_cannot_be_summed_is_as_if_it_had_not_been_sent(
    images, tmp_path, monkeypatch, watched
):
    monkeypatch.setattr(fixed_point, "LARGEST", 2.0)
    wire = Wire({("ben", 2): altered(huge), ("eve", 1): altered(huge)})
    settings = {"kind": "full", "num_server_rounds": 3}
    results = federate(images, tmp_path / "out", {"tamper": wire.tamper}, **settings)
    assert [(m["client"], m["phase"]) for m in results["missed"]] == [
        ("eve", "train, round 1"),
        ("ben", "train, round 2"),
    ]
    assert all("expected at most 2" in m["reason"] for m in results["missed"])
    assert [h["trained"] for h in results["rounds"]] == [
        ["ann", "ben"],
        ["ann", "eve"],
        list(THREE),
    ]
    assert len(results["per_client"]["ben"]["losses"]) == 2
    assert_sum_of_the_last(tmp_path / "out", wire)
    assert same(Registry(tmp_path / "out" / "registry").running_sum(), watched[0].sum.running.total)


def test_whyever_a_round_was_missed_the_client_goes_on_from_what_it_sent_before(
    images, tmp_path, monkeypatch
):
    original, put = RunningSum.put, Counter()

    def refuse_bens_second(self: RunningSum, client: str, vector: TaskVector, *, times: int):
        put[client] += 1
        if (client, put[client]) == ("ben", 2):
            raise ContributionError("It cannot be summed.")
        original(self, client, vector, times=times)

    settings = {"kind": "full", "num_server_rounds": 3}
    for name, change in {"lost": lost, "refused": altered(nan)}.items():
        wire = Wire({("ben", 2): change})
        federate(images, tmp_path / name, {"tamper": wire.tamper}, **settings)
    monkeypatch.setattr(RunningSum, "put", refuse_bens_second)
    results = federate(images, tmp_path / "summed", **settings)
    assert [m["reason"] for m in results["missed"]] == ["It cannot be summed."]
    assert same_contributions(tmp_path / "lost", tmp_path / "refused")
    assert same_contributions(tmp_path / "lost", tmp_path / "summed")


def test_who_never_sends_a_task_vector_is_left_out_in_the_end(images, tmp_path, watched):
    wire = Wire({("ben", 1): altered(nan), ("ben", 2): altered(nan)})
    results = federate(images, tmp_path / "out", {"tamper": wire.tamper})
    (left_out,) = results["left_out"]
    assert left_out["client"] == "ben"
    assert "in any round" in left_out["reason"]
    assert list(results["per_client"]) == ["ann", "eve"]
    # The metric and the head that they started from were made with ben's statistics all the same.
    lineage = sent_last(tmp_path / "out")["ann"].lineage
    assert (lineage.anchored_by, lineage.ensemble) == (("ben", "eve"), ("eve",))
    assert_sum_of_the_last(tmp_path / "out")


def test_a_round_in_which_nobody_trains_fails_the_run_and_names_everyone(images, tmp_path):
    wire = Wire({(client, 2): altered(nan) for client in THREE})
    with pytest.raises(TooFewClients, match="Nobody trained in round 2") as caught:
        federate(images, tmp_path / "out", {"tamper": wire.tamper})
    assert all(f"{client}: Tensor" in str(caught.value) for client in THREE)
    assert not (tmp_path / "out" / "results.json").exists()
    assert Registry(tmp_path / "out" / "registry").clients == ()


def test_too_few_task_vectors_in_the_end_fail_the_run_and_say_why(images, tmp_path):
    wire = Wire({(client, n): altered(nan) for client in ("ann", "ben") for n in (1, 2)})
    with pytest.raises(TooFewClients, match=r"1 usable client.*`min-clients` is 2") as caught:
        federate(images, tmp_path / "out", {"tamper": wire.tamper})
    assert "ann (train, round 1): Tensor" in str(caught.value)


# -- what a client was left to remember -------------------------------------------------------


def test_who_loses_what_it_kept_is_sent_it_again_and_trains_the_same(images, tmp_path, state):
    def forget(reply: Message) -> Message:
        (kept,) = state.glob("*/ben")
        shutil.rmtree(kept)
        return reply

    federate(images, tmp_path / "kept", kind="lora,full,ia3", num_server_rounds=3)
    wire = Wire({("ben", 1): forget})
    settings = {"kind": "lora,full,ia3", "num_server_rounds": 3}
    results = federate(images, tmp_path / "lost", {"tamper": wire.tamper}, **settings)
    assert same_contributions(tmp_path / "kept", tmp_path / "lost")
    (note,) = notes_of(results)
    assert "ben has lost what it kept (anchor and own)" in note
    assert results["missed"] == []
    costs = {c: f["traffic"]["train, round 2"] for c, f in results["per_client"].items()}
    assert all(cost["bytes_sent"] > 0 for cost in costs.values())
    assert costs["ben"]["bytes_sent"] > 2 * costs["ann"]["bytes_sent"]  # asked twice, sent all
    third = {c: f["traffic"]["train, round 3"] for c, f in results["per_client"].items()}
    assert third["ben"]["bytes_sent"] == third["ann"]["bytes_sent"]


def test_who_can_keep_nothing_is_sent_everything_each_time_and_trains_the_same(
    images, tmp_path, monkeypatch
):
    federate(images, tmp_path / "kept")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FEDCOMPO_STATE", str(tmp_path / "file"))
    results = federate(images, tmp_path / "unkept")
    assert same_contributions(tmp_path / "kept", tmp_path / "unkept")
    assert notes_of(results) == results["missed"] == []


def test_who_says_that_it_lacks_what_it_was_just_sent_misses_the_round(images, tmp_path):
    wire = Wire({("ben", n): altered(lacking) for n in (2, 3)})
    results = federate(images, tmp_path / "out", {"tamper": wire.tamper})
    (missed,) = results["missed"]
    assert "was sent all that it needs" in missed["reason"]
    assert list(results["per_client"]) == list(THREE)
    assert_sum_of_the_last(tmp_path / "out")


# -- with members of a registry ---------------------------------------------------------------


def test_newcomers_train_inside_the_sum_with_the_members_who_stay_as_they_are(images, tmp_path):
    registry = str(tmp_path / "first" / "registry")
    federate(images, tmp_path / "first", clients=2)
    before = sent_last(tmp_path / "first")
    results = federate(images, tmp_path / "second", clients=4, registry=registry)
    assert results["registry"]["joined"] == ["eve", "zoe"]
    after = sent_last(tmp_path / "first")
    assert all(same(after[c].task_vector.tensors, before[c].task_vector.tensors) for c in before)
    assert [h["members"] for h in results["rounds"]] == [list(OWNED)] * 2
    assert [h["trained"] for h in results["rounds"]] == [["eve", "zoe"]] * 2
    assert after["eve"].lineage.ensemble == ("ann", "ben", "zoe")
    assert after["eve"].lineage.anchored_by == ("ann", "ben", "zoe")
    assert_sum_of_the_last(tmp_path / "first")
    assert all(finding.holds for finding in verify_registry(Path(registry)))


def test_members_that_are_trained_anew_take_no_part_as_what_they_were(images, tmp_path, watched):
    registry = str(tmp_path / "first" / "registry")
    federate(images, tmp_path / "first")
    federate(images, tmp_path / "fresh", seed=5)
    results = federate(images, tmp_path / "anew", registry=registry, replace=True, seed=5)
    assert results["registry"]["joined"] == list(THREE)
    anew, fresh = sent_last(tmp_path / "first"), sent_last(tmp_path / "fresh")
    assert all(same(anew[c].task_vector.tensors, fresh[c].task_vector.tensors) for c in fresh)
    assert_sum_of_the_last(tmp_path / "first")
    assert same(Registry(Path(registry)).running_sum(), watched[-1].sum.running.total)
