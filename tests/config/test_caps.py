"""Caps of what leaves a client: who has the last word, and whole runs under each of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from app_runs import ALL_WEIGHTS, altered, run
from builders import in_memory
from round_runs import (
    PARTITIONS,
    assert_sum_of_the_last,
    draw_images,
    federate,
    same,
    sent_last,
)
from round_runs import (
    Wire as Heard,
)

from clients.composed import evaluate, vote
from clients.local import LocalClient
from fedcompo.config.caps import CapsConfig
from fedcompo.config.choices import Curvature, FisherForm, Wire
from fedcompo.errors import ConfigError, DataError, TooFewClients
from fedcompo.messages.records import from_record
from fedcompo.messages.requests import EvaluateRequest, VoteRequest
from fedcompo.messages.wire import decode, encode
from fedcompo.method.heads import zero_head
from fedcompo.privacy.noise import composed_epsilon
from fedcompo.registry.registry import Registry
from fedcompo.registry.verification import verify_registry

CLIENTS = ("client-0", "client-1", "client-2")
PLAIN = CapsConfig()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("plain") / "out"
    return output, run({}, output, fisher_form="dense", wire="float32")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"))


def received(results: dict, phase: str) -> list[int]:
    """Bytes that each client sent in a phase."""
    return [c["traffic"][phase]["bytes_received"] for c in results["per_client"].values()]


def assert_whole(output: Path, results: dict, *, least_accuracy: float = 0.3) -> None:
    """Everyone took part, and every byte of the registry is what its manifests say."""
    assert tuple(results["per_client"]) == CLIENTS
    assert results["left_out"] == results["missed"] == []
    assert all(finding.holds for finding in verify_registry(output / "registry"))
    assert results["class_il_accuracy"] >= least_accuracy


# -- who has the last word ----------------------------------------------------------------------


@pytest.mark.parametrize("wished", Wire)
@pytest.mark.parametrize("own", Wire)
def test_of_two_wires_the_one_of_fewer_bits_counts(wished, own):
    found = CapsConfig(wire=wished).strictest(CapsConfig(wire=own)).wire
    bits = {Wire.FLOAT32: 32, Wire.BFLOAT16: 16, Wire.INT8: 8}
    assert bits[found] == min(bits[wished], bits[own])


@pytest.mark.parametrize("wished", FisherForm)
@pytest.mark.parametrize("own", FisherForm)
def test_of_two_forms_the_one_that_tells_less_counts(wished, own):
    found = CapsConfig(fisher_form=wished).strictest(CapsConfig(fisher_form=own)).fisher_form
    order = (FisherForm.NONE, FisherForm.FACTORED, FisherForm.KRONECKER, FisherForm.DENSE)
    assert order.index(found) == min(order.index(wished), order.index(own))


def test_of_two_noises_the_stronger_counts_and_the_nodes_own_limits_stand():
    wished = CapsConfig(dp_noise=2.0, dp_clip_features=9.0)
    weaker, stronger = CapsConfig(dp_noise=1.0, dp_clip_features=5.0), CapsConfig(dp_noise=3.0)
    assert wished.strictest(weaker).dp_noise == 2.0
    assert wished.strictest(stronger).dp_noise == 3.0
    assert wished.strictest(weaker).dp_clip_features == 5.0


def client_of(run_config: dict, node_config: dict) -> LocalClient:
    return LocalClient.from_node(run_config, {"partition-id": 0, **node_config})


def test_a_node_sends_less_than_it_is_asked_for_and_never_more_than_it_allows():
    asked = {"wire": "bfloat16", "dp-noise": 1.0}
    assert client_of({}, {}).config.caps == replace(PLAIN, min_images=1)
    caps = client_of(asked, {"wire": "int8", "fisher-form": "none", "dp-noise": 4}).config.caps
    assert (caps.wire, caps.fisher_form, caps.dp_noise) == (Wire.INT8, FisherForm.NONE, 4.0)
    caps = client_of({"preset": "paper"}, {"fisher-form": "factored"}).config.caps
    assert caps.fisher_form is FisherForm.FACTORED  # not the preset's, which is dense
    caps = client_of(asked, {"wire": "float32", "dp-noise": 0.0}).config.caps
    assert (caps.wire, caps.dp_noise) == (Wire.BFLOAT16, 1.0)


@pytest.mark.parametrize(
    ("node", "complaint"),
    [
        ({"wire": "int7"}, "`wire` must be one of float32, bfloat16, int8, got 'int7'"),
        ({"fisher-form": "head"}, "`fisher-form` must be one of"),
        ({"dp-noise": -1.0}, "`dp-noise` must be >= 0"),
    ],
)
def test_a_cap_that_is_none_stops_the_node_before_anything_leaves(node, complaint):
    with pytest.raises(ConfigError, match=complaint):
        client_of({}, node)


def test_noise_under_a_head_fitted_to_the_images_is_refused_by_run_and_node(tmp_path):
    settings = {"dp_noise": 1.0, "head_start": "probe", "curvature": "exact"}
    with pytest.raises(ConfigError, match="not private by noise"):
        run({}, tmp_path / "run", **settings)
    nodes = {i: {"dp-noise": 1.0} for i in range(3)}
    with pytest.raises(TooFewClients, match="not private by noise"):
        run({"node_configs": nodes}, tmp_path / "nodes", head_start="probe", curvature="exact")


# -- fewest images ------------------------------------------------------------------------------


def own_folder(folder: Path, *, train: int, test: int) -> dict[str, str]:
    """A node in a deployment: its images are in a folder of its own."""
    draw_images(folder, {"ann": {"cat": 30, "dog": train}}, test=test)
    return {"client": "ann", "data": str(folder / "ann")}


@pytest.mark.parametrize(
    ("train", "test", "node", "run_config", "complaint"),
    [
        (8, 4, {}, {}, "Too few training images of 1 classes.*'dog' 7; `min-images` is 8"),
        (8, 4, {}, {"min-images": 9, "aside": 0.0}, "'dog' 8; `min-images` is 9"),
        (30, 4, {}, {"images-per-class": 1}, "'cat' 1, 'dog' 1; `min-images` is 8"),
        (30, 4, {"min-images": 2}, {"images-per-class": 1}, "'cat' 1, 'dog' 1; `min-images` is 2"),
        (30, 4, {}, {"fisher-examples": 1}, "`fisher-examples` is 1, and this node's"),
        (30, 3, {}, {}, "There are 6 test images; `min-images` is 8"),
    ],
)
def test_nothing_leaves_a_node_that_is_made_of_few_images(
    train, test, node, run_config, complaint, tmp_path
):
    own = own_folder(tmp_path, train=train, test=test)
    with pytest.raises((ConfigError, DataError), match=complaint):
        LocalClient.from_node(run_config, {**own, **node})


def test_a_node_may_allow_few_images_and_a_run_cannot(tmp_path):
    own = own_folder(tmp_path, train=3, test=2)
    client = LocalClient.from_node({"min-images": 1}, {**own, "min-images": 2})
    assert client.config.caps.min_images == 2
    with pytest.raises(DataError, match="'dog' 3; `min-images` is 8"):
        LocalClient.from_node({"min-images": 1}, own)


def test_a_client_with_few_images_aside_abstains_from_the_vote(tmp_path):
    own = own_folder(tmp_path, train=30, test=4)
    head = zero_head(("cat", "dog"), 128)
    for least, voted in ((6, 6), (7, 0)):
        client = LocalClient.from_node({}, {**own, "min-images": least})
        request = VoteRequest(
            total=client.backbone.theta_0, factors=(0.0,), heads=(head,), linearised=False
        )
        assert len(client.split[1].labels) == 6
        assert vote(client, request).num_examples == voted


def test_few_images_and_noise_keep_counts_by_class_and_confidence_at_home(tmp_path):
    draw_images(tmp_path, {"ann": {"cat": 30}}, test=12)
    draw_images(tmp_path, {"ann": {"dog": 30}}, test=6)
    own = {"client": "ann", "data": str(tmp_path / "ann")}
    head = zero_head(("cat", "dog", "eel"), 128)  # it takes all for cats, and is not sure
    request = EvaluateRequest(theta={}, joint=head, linearised=False)
    for node, told in (
        ({"min-images": 6}, {"cat": {"cat": 12}, "dog": {"cat": 6}}),
        ({"min-images": 7}, {}),  # of cats alone, it would follow what became of the dogs
        ({"min-images": 1, "dp-noise": 1.0}, None),
    ):
        answer = evaluate(LocalClient.from_node({}, {**own, **node}), request)
        assert (answer.num_examples, answer.class_il_accuracy) == (18, 12 / 18)
        assert (answer.tally and answer.tally.confusion) == told
        assert ("confusion" in answer.to_body()[1]) == (told is not None)


# -- fewer bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire", "share", "kind"),
    [("bfloat16", 0.5, "lora"), ("int8", 0.26, "lora"), ("int8", 0.26, "ia3")],
)
def test_a_run_in_fewer_bits_is_as_good_and_says_what_it_lost(plain, tmp_path, wire, share, kind):
    results = run({}, tmp_path / "out", wire=wire, kind=kind, fisher_form="dense")
    assert_whole(tmp_path / "out", results)
    sums = 42_000  # bytes of statistics, which are float32 whatever the wire
    for sent, full in zip(
        received(results, "describe"), received(plain[1], "describe"), strict=True
    ):
        assert sent < share * (full - sums) + sums
    for figures in results["per_client"].values():
        told = {answer["phase"]: answer for answer in figures["caps"]}
        assert set(told) == {"describe", "train"}
        assert all(t["wire"] == wire and 0 < t["wire_error"] < 0.015 for t in told.values())
        assert figures["privacy"] is None
    off = "came in int8 in the phase train is off by"  # of bfloat16 there is no need to speak
    assert any(off in note for note in results["notes"]) == (wire == "int8")
    if kind == "lora":
        assert results["class_il_accuracy"] == pytest.approx(
            plain[1]["class_il_accuracy"], abs=0.03
        )


def test_without_caps_nothing_is_told_of_any(plain):
    _, results = plain
    assert not any(word in n for n in results["notes"] for word in ("came in", "Fisher", "private"))
    for figures in results["per_client"].values():
        assert (figures["caps"], figures["privacy"]) == ([], None)


def test_the_registry_holds_float32_of_what_was_sent(plain, tmp_path):
    """In ITA the wire comes after the training: what is stored is the plain run's, rounded once."""
    output = tmp_path / "out"
    run({}, output, wire="int8", trust_region=0.0)
    run({}, tmp_path / "plain", trust_region=0.0, wire="float32")
    found, meant = sent_last(output), sent_last(tmp_path / "plain")
    for client in CLIENTS:
        tensors = {f"task_vector/{n}": t for n, t in meant[client].task_vector.tensors.items()}
        tensors |= {f"fisher/{n}": t for n, t in meant[client].fisher.sums.items()}
        expected = decode(encode(tensors, Wire.INT8), Wire.INT8, source="test")
        actual = {f"task_vector/{n}": t for n, t in found[client].task_vector.tensors.items()}
        actual |= {f"fisher/{n}": t for n, t in found[client].fisher.sums.items()}
        assert all(t.dtype == torch.float32 for t in actual.values())
        assert same(actual, expected)


@pytest.mark.parametrize(
    ("wire", "kind"), [("int8", "lora"), ("int8", "full"), ("bfloat16", "ia3")]
)
def test_rounds_in_fewer_bits_need_nothing_sent_again(images, tmp_path, wire, kind):
    """What a client keeps must be what the server read: the digests would tell."""
    heard, output = Heard(), tmp_path / "out"
    settings = {"num_server_rounds": 4, "wire": wire, "kind": kind}
    results = federate(images, output, {"tamper": heard.tamper}, **settings)
    assert [r["trained"] for r in results["rounds"]] == [["ann", "ben", "eve"]] * 4
    assert results["left_out"] == results["missed"] == []
    assert not any("sent again" in note for note in results["notes"])
    assert heard.count == {"ann": 4, "ben": 4, "eve": 4}
    assert_sum_of_the_last(output, heard)
    for figures in results["per_client"].values():
        requests = [figures["traffic"][f"train, round {i}"]["bytes_sent"] for i in (1, 2, 3, 4)]
        assert max(requests[1:]) < requests[0]  # neither metric nor own task vector came along


def test_rounds_go_on_from_what_arrived_and_not_from_what_was_meant(images, tmp_path):
    """A client that lost its store is sent the server's copy, and trains on as if it had not."""
    settings = {"num_server_rounds": 3, "wire": "int8"}
    federate(images, tmp_path / "kept", **settings)

    def forget(reply):
        for folder in (tmp_path / "state").rglob("ann"):
            for file in folder.iterdir():
                file.unlink()
        return reply

    heard = Heard({("ann", 1): forget})
    grid = {
        "tamper": heard.tamper,
        "node_configs": {PARTITIONS["ann"]: {"state": str(tmp_path / "state")}},
    }
    results = federate(images, tmp_path / "lost", grid, **settings)
    assert any("ann has lost what it kept" in note for note in results["notes"])
    kept, lost = sent_last(tmp_path / "kept"), sent_last(tmp_path / "lost")
    for client in kept:
        assert same(kept[client].task_vector.tensors, lost[client].task_vector.tensors)


def test_an_averaged_model_comes_in_fewer_bits_too(tmp_path):
    settings = {"method": "fedavg", "num_server_rounds": 2, "target_weights": ALL_WEIGHTS}
    few = run({}, tmp_path / "few", wire="int8", **settings)
    full = run({}, tmp_path / "full", wire="float32", **settings)
    one, other = (received(results, "train, round 2") for results in (few, full))
    assert all(a < 0.5 * b for a, b in zip(one, other, strict=True))
    for figures in few["per_client"].values():
        assert [told["wire"] for told in figures["caps"]] == ["int8"] * 2
    assert few["class_il_accuracy"] == pytest.approx(full["class_il_accuracy"], abs=0.03)


# -- less of the Fisher -------------------------------------------------------------------------


def test_a_factored_fisher_takes_kilobytes_and_is_kept_as_it_came(plain, tmp_path):
    results = run({}, tmp_path / "out", fisher_form="factored", wire="float32")
    assert_whole(tmp_path / "out", results)
    dense = 4 * results["backbone"]["target_parameters"]
    saved = zip(received(plain[1], "describe"), received(results, "describe"), strict=True)
    assert all(0.97 * dense < full - few < dense for full, few in saved)
    meant, found = sent_last(plain[0]), sent_last(tmp_path / "out")
    for client in CLIENTS:
        expected = meant[client].fisher.reduced().sums
        assert found[client].fisher.sums.keys() == expected.keys()
        for name, total in expected.items():
            kept = found[client].fisher.sums[name]
            torch.testing.assert_close(kept, total.float(), rtol=1e-4, atol=0)
        (told,) = results["per_client"][client]["caps"]
        assert told["form"] == "factored"
        assert 0 < told["form_error"] < 1


def test_kronecker_factors_travel_anchor_and_are_kept_with_their_member(tmp_path):
    few = {"head_start": "probe", "images_per_class": 8}
    results = run({}, tmp_path / "out", fisher_form="kronecker", alpha=1.0, **few)
    assert_whole(tmp_path / "out", results, least_accuracy=0.0)
    loose = run({}, tmp_path / "loose", fisher_form="none", trust_region=0.0, **few)
    registry = Registry(tmp_path / "out" / "registry")
    for client in CLIENTS:
        fisher = registry.contribution(client, with_fisher=True).fisher
        assert fisher.form is FisherForm.KRONECKER
        told = results["per_client"][client]
        assert told["caps"][0]["form"] == "kronecker"
        assert 0 < told["caps"][0]["form_error"] < 1
        assert told["distance"] > 0
        assert 0 < told["held"] < 1
        assert told["tau_norm"] < loose["per_client"][client]["tau_norm"]
    leaver = in_memory(registry.path / "clients" / CLIENTS[0])
    for change in (lambda: registry.remove(CLIENTS[0]), lambda: registry.add(leaver)):
        change()
        assert all(finding.holds for finding in verify_registry(registry.path))


def test_who_lacks_what_the_rule_needs_is_left_out_before_anyone_trains(tmp_path):
    nodes, few = {"node_configs": {0: {"dp-noise": 1.0}}}, {"images_per_class": 8, "local_steps": 5}
    results = run(nodes, tmp_path / "out", rule="regmean", **few)
    (left,) = results["left_out"]
    assert (left["client"], left["phase"]) == (CLIENTS[0], "describe")
    assert "needs of every member the squares of layers' inputs" in left["reason"]
    assert all(finding.holds for finding in verify_registry(tmp_path / "out" / "registry"))
    for settings in ({"keep_fisher": False}, {"fisher_form": "none"}, {"dp_noise": 1.0}):
        with pytest.raises(ConfigError, match="The rule regmean composes by what clients send"):
            run({}, tmp_path / "not", rule="regmean", **settings)


def test_kronecker_factors_anchor_an_ensemble_too(images, tmp_path):
    results = federate(images, tmp_path / "out", fisher_form="kronecker", beta=1.0)
    assert [r["trained"] for r in results["rounds"]] == [["ann", "ben", "eve"]] * 2
    assert_sum_of_the_last(tmp_path / "out")
    assert all(figures["held"] > 0 for figures in results["per_client"].values())


def test_noise_has_no_kronecker_factors():
    caps = CapsConfig(fisher_form=FisherForm.KRONECKER, dp_noise=1.0)
    kinds = {"statistics": "sums", "curvature": Curvature.FEATURES, "start": "zero"}
    with pytest.raises(ConfigError, match="Use `fisher-form = factored`"):
        caps.check_noise(**kinds)


def test_where_no_fisher_is_told_nothing_holds_the_backbone(plain, tmp_path):
    results = run({}, tmp_path / "out", fisher_form="none")
    assert_whole(tmp_path / "out", results)
    assert max(received(results, "describe")) < 0.2 * min(received(plain[1], "describe"))
    run({}, tmp_path / "loose", trust_region=0.0)
    one, other = sent_last(tmp_path / "out"), sent_last(tmp_path / "loose")
    for client in CLIENTS:
        assert same(one[client].task_vector.tensors, other[client].task_vector.tensors)
        assert torch.equal(one[client].head.weight, other[client].head.weight)
        assert one[client].fisher is None
        cost = results["per_client"][client]["traffic"]["train"]
        assert cost["bytes_sent"] < 50_000  # nor are zeros sent about


def test_rounds_without_a_fisher_hold_nothing(images, tmp_path):
    results = federate(images, tmp_path / "out", fisher_form="none")
    assert [r["trained"] for r in results["rounds"]] == [["ann", "ben", "eve"]] * 2
    assert_sum_of_the_last(tmp_path / "out")


def test_caps_may_differ_from_node_to_node(tmp_path):
    nodes = {
        0: {"wire": "int8"},
        1: {"fisher-form": "none"},
        2: {"fisher-form": "factored", "wire": "bfloat16"},
    }
    results = run({"node_configs": nodes}, tmp_path / "out", fisher_form="dense")
    assert_whole(tmp_path / "out", results)
    told = [
        {key: answer[key] for key in ("form", "wire") if key in answer}
        for figures in results["per_client"].values()
        for answer in figures["caps"]
        if answer["phase"] == "describe"
    ]
    assert told == [{"wire": "int8"}, {"form": "none"}, {"form": "factored", "wire": "bfloat16"}]
    assert any(note.startswith("client-1 sent no Fisher") for note in results["notes"])


# -- noise --------------------------------------------------------------------------------------


def heard_answers(kinds: tuple[str, ...]) -> tuple[dict, dict[tuple[int, str], list]]:
    """A tamper that changes nothing, and what it hears, by partition and message type."""
    answers: dict[tuple[int, str], list] = {}

    def listen(key):
        def passed(reply):
            expected = reply.metadata.message_type.rpartition(".")[2]
            answers.setdefault(key, []).append(
                from_record(reply.content, expected=expected, source="test")
            )
            return reply

        return passed

    return {(i, kind): listen((i, kind)) for i in range(3) for kind in kinds}, answers


@pytest.mark.parametrize("form", ["dense", "factored", "none"])
def test_a_run_under_noise_works_and_counts_its_releases(tmp_path, form):
    images = 4 if form == "dense" else 12  # a Fisher of each image by itself takes its time
    results = run({}, tmp_path / "out", dp_noise=1.0, fisher_form=form, images_per_class=images)
    assert_whole(tmp_path / "out", results, least_accuracy=0.0)  # noise drowns so few images
    for figures in results["per_client"].values():
        noisy = [answer["phase"] for answer in figures["caps"] if answer.get("noise") == 1.0]
        releases = 2 if form == "none" else 3
        assert (
            noisy == ["describe", "realign"] if form == "none" else ["describe"] * 2 + ["realign"]
        )
        spent = figures["privacy"]
        assert spent["epsilon"] == composed_epsilon([1.0] * releases, delta=1e-5)
        assert (spent["delta"], spent["releases"]) == (1e-5, releases)
    (note,) = [n for n in results["notes"] if "private for each training image" in n]
    assert "Task vectors, heads, losses and accuracies are not." in note


def test_a_node_that_insists_on_noise_is_the_only_one_to_add_any(plain, tmp_path):
    tamper, heard = heard_answers(("query.describe",))
    nodes = {1: {"dp-noise": 2.0}}
    results = run({"node_configs": nodes, "tamper": tamper}, tmp_path / "out")
    assert_whole(tmp_path / "out", results, least_accuracy=0.0)
    spent = [figures["privacy"] for figures in results["per_client"].values()]
    assert (spent[0], spent[2]) == (None, None)
    assert spent[1]["releases"] == 3
    meant = sent_last(plain[0])
    for i, client in enumerate(CLIENTS):
        (tensors, _) = heard[i, "query.describe"][0]
        exact = meant[client].statistics.tensors()
        for part in ("sums", "second"):  # noised counts may be the true ones by chance
            name = f"statistics/{part}"
            assert torch.equal(tensors[name], exact[name]) == (i != 1)


def test_two_runs_of_one_seed_draw_other_noise_and_two_clients_too(tmp_path):
    tamper, heard = heard_answers(("query.describe",))
    nodes = {i: {"dp-noise": 1.0} for i in range(3)}
    for name in ("one", "two"):
        run({"node_configs": nodes, "tamper": tamper}, tmp_path / name, realign=False)
    drawn = [
        next(t for n, t in sorted(tensors.items()) if n.endswith("statistics/sums"))
        for answers in heard.values()
        for tensors, _ in answers
    ]
    assert len(drawn) == 6
    assert len({tuple(t.flatten().tolist()) for t in drawn}) == 6


def test_under_noise_nothing_beside_it_tells_of_the_images(tmp_path):
    """Neither counts nor what an estimator says of its work: both are sums without noise."""
    tamper, heard = heard_answers(("query.describe", "query.realign"))
    nodes = {i: {"dp-noise": 5.0} for i in range(3)}
    run({"node_configs": nodes, "tamper": tamper}, tmp_path / "out", wire="float32")
    for (_, kind), answers in heard.items():
        for _, manifest in answers:
            if kind == "query.describe":
                assert set(manifest["fisher"]["report"]) == {"seconds"}
                assert set(manifest["fisher"]["caps"]) == {"noise", "clip", "form"}
    counts = [
        sum(answers[0][1]["sums"].values())
        for (_, k), answers in heard.items()
        if k == "query.describe"
    ]
    assert len(set(counts)) > 1  # all clients have 24 images


# -- what a client may not report -----------------------------------------------------------------


@pytest.mark.parametrize(
    "caps",
    [
        {"noise": -1.0},
        {"noise": "1.0"},
        {"form_error": 1e308},
        {"wire": "int7"},
        {"phase": [1.0]},
        "int8",
    ],
)
def test_who_reports_nonsense_of_its_caps_is_left_out(tmp_path, caps):
    def change(tensors, manifest):
        manifest["caps"] = caps

    tamper = {(0, "query.describe"): altered(change)}
    results = run({"tamper": tamper}, tmp_path / "out", min_clients=2)
    (left,) = results["left_out"]
    assert (left["client"], left["phase"]) == ("node 1000", "describe")  # its name is not read
    assert "reports the caps" in left["reason"]


def test_who_sends_margins_and_calls_them_dense_is_left_out(tmp_path):
    def change(tensors, manifest):
        manifest["fisher"]["form"] = "dense"

    tamper = {(0, "query.describe"): altered(change)}
    results = run({"tamper": tamper}, tmp_path / "out", min_clients=2, fisher_form="factored")
    (left,) = results["left_out"]
    assert left["client"] == "node 1000"
    assert "not in the form that it names, dense" in left["reason"]
