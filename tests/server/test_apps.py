"""The real ServerApp and ClientApp over an in-process Grid: every phase, and what can go wrong."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from app_runs import BACKBONE, QUICK, altered, run
from flwr.app import Context, Message, RecordDict
from in_process_grid import InProcessGrid, lost
from PIL import Image
from round_runs import draw_images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import server.work
from clients import local
from clients.app import app as client_app
from clients.local import LocalClient
from fedcompo.backbone.backbone import load_backbone
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.data import DataConfig
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import load_client_data
from fedcompo.errors import ConfigError, TooFewClients
from fedcompo.method.contribution import Contribution
from fedcompo.method.pool import Pool
from fedcompo.registry.registry import Registry
from fedcompo.registry.verification import verify_registry
from server.app import app as server_app


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("run") / "out"
    return output, run({}, output, track="tensorboard")


@pytest.fixture(scope="module")
def again(finished) -> tuple[bytes, Path]:
    """The same run, asked for in the same folder: what was there before, and where it is."""
    output, _ = finished
    before = (output / "results.json").read_bytes()
    config = {**QUICK, "output": str(output)}
    grid = InProcessGrid(client_app, config, 3)
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(config)
    )
    server_app(grid, context)
    return before, output.with_name("out-2")


def test_a_report_that_cannot_be_drawn_fails_no_run(tmp_path, caplog):
    server.work._report(tmp_path, {"created": "no more than this"})
    assert list(tmp_path.iterdir()) == []
    assert f"fedcompo report {tmp_path}" in caplog.text


def test_a_tracker_hears_of_losses_accuracies_and_the_cost_of_every_phase(finished):
    output, results = finished
    reader = EventAccumulator(str(output / "tensorboard"))
    reader.Reload()
    told = {name: [e.value for e in reader.Scalars(name)] for name in reader.Tags()["scalars"]}
    for client, figures in results["per_client"].items():
        assert told[f"loss/{client}"] == pytest.approx(figures["losses"])
        for name in ("class_il_accuracy", "own_task_accuracy"):
            assert told[f"{name}/{client}"] == [pytest.approx(figures[name])]
    for phase, cost in results["phases"].items():
        assert told[f"seconds/{phase}"] == [pytest.approx(cost["seconds"], abs=1e-3)]
        assert told.get(f"bytes_sent/{phase}", [0]) == [cost["bytes_sent"]]
    assert told["run/lambda"] == [pytest.approx(results["scale"]["scale"])]
    assert told["run/class_il_accuracy"] == [pytest.approx(results["class_il_accuracy"])]


def test_a_run_reports_every_phase_and_client(finished):
    _, results = finished
    assert list(results["phases"]) == [
        "describe",
        "train",
        "compose",
        "realign",
        "vote",
        "evaluate",
    ]
    assert list(results["per_client"]) == ["client-0", "client-1", "client-2"]
    assert results["left_out"] == []
    for figures in [results, *results["per_client"].values()]:
        for key in (
            "class_il_accuracy",
            "task_il_accuracy",
            "frozen_class_il_accuracy",
            "own_task_accuracy",
        ):
            assert 0 <= figures[key] <= 1
        assert figures["class_il_accuracy"] <= figures["task_il_accuracy"]
    for key in ("class_il_accuracy", "own_task_accuracy"):
        mean = sum(f[key] for f in results["per_client"].values()) / 3
        assert results[key] == pytest.approx(mean)
    owned = [name for f in results["per_client"].values() for name in f["classes"]]
    assert sorted(owned) == results["classes"]


def test_traffic_is_booked_by_client_and_phase(finished):
    _, results = finished
    for phase in ("describe", "train", "realign", "vote", "evaluate"):
        costs = [f["traffic"][phase] for f in results["per_client"].values()]
        assert all(c["bytes_sent"] > 0 and c["bytes_received"] > 0 for c in costs)
        assert results["phases"][phase]["bytes_sent"] == sum(c["bytes_sent"] for c in costs)
    described = results["per_client"]["client-0"]["traffic"]["describe"]["bytes_received"]
    width = 128  # the Fisher is factored, so the second moment is most of it
    assert 2 * width * (width + 1) < described < 2 * width * (width + 1) + 10_000


def test_the_composed_model_is_the_pool_of_the_saved_contributions(tmp_path):
    output = tmp_path / "out"
    results = run({}, output, scale=2.0)
    folders = (output / "registry" / "clients").iterdir()
    pool = Pool(tuple(Contribution.open(folder) for folder in folders))
    backbone = load_backbone(BACKBONE)
    theta_p = pool.compose(backbone.theta_0, scale=2.0)
    saved = safetensors.torch.load_file(output / "registry" / "model" / "model.safetensors")
    for name, weight in theta_p.items():  # the registry rounds each τ once, to its grid of 2⁻⁴⁰
        torch.testing.assert_close(saved[name], weight, rtol=1e-6, atol=1e-11)
        assert not torch.equal(saved[name], backbone.theta_0[name])
    for name, weight in backbone.model.state_dict().items():
        if name not in theta_p:
            assert torch.equal(saved[name], weight)
    assert pool.clients == tuple(results["per_client"])


def test_a_run_leaves_a_registry_that_verifies_and_nothing_elsewhere(finished):
    output, results = finished
    assert all(finding.holds for finding in verify_registry(output / "registry"))
    assert results["registry"]["root"] == Registry(output / "registry").state.root
    assert results["realigned_with"] == list(results["per_client"])
    names = {path.name for path in output.iterdir()} - {"tensorboard"}
    assert names == {"registry", "results.json", "report.html", "events.jsonl", "flower.log"}


def test_plain_timm_loads_the_model_and_repeats_the_reported_accuracy(finished):
    output, results = finished
    model = timm.create_model(f"local-dir:{output / 'registry' / 'model'}", pretrained=True).eval()
    config = json.loads((output / "registry" / "model" / "config.json").read_text())
    assert config["label_names"] == results["classes"]
    preprocessing = load_backbone(BACKBONE).preprocessing
    source = DataConfig(data=QUICK["data"], num_tasks=3, num_classes=6, images_per_class=12)
    pairs: Counter[tuple[str, str]] = Counter()
    for partition in range(3):
        data = load_client_data(source, preprocessing, partition=partition, seed=0)
        with torch.no_grad():
            logits = model(preprocessing.normalise(data.test.images))
        said = [config["label_names"][i] for i in logits.argmax(1).tolist()]
        true = [data.classes[i] for i in data.test.labels.tolist()]
        accuracy = sum(a == b for a, b in zip(said, true, strict=True)) / len(true)
        reported = results["per_client"][data.name]["class_il_accuracy"]
        assert accuracy == pytest.approx(reported, abs=1e-9)
        pairs.update(zip(true, said, strict=True))
    names = results["confusion"]["classes"]
    counts = {(names[i], names[j]): n for i, j, n in results["confusion"]["counts"]}
    assert counts == pairs
    figures = results["by_class"]
    assert [own["correct"] for own in figures.values()] == [pairs[n, n] for n in results["classes"]]
    assert {*results["worst_classes"]} <= {n for n, own in figures.items() if own["accuracy"] < 1}
    assert sum(own["images"] for own in results["calibration"]["bins"]) == pairs.total()


def test_clients_prepare_pictures_as_when_the_registry_was_made(tmp_path, monkeypatch):
    loaded = load_backbone(BACKBONE)
    old = replace(loaded, preprocessing=replace(loaded.preprocessing, rule=1))
    settings = CompositionSettings.of(RunConfig.parse(QUICK))
    Registry.create(tmp_path / "registry", old, settings)
    rules, load = [], local.load_images
    monkeypatch.setattr(
        local,
        "load_images",
        lambda data, seen, *rest: rules.append(seen.rule) or load(data, seen, *rest),
    )
    results = run({}, tmp_path / "out", registry=str(tmp_path / "registry"))
    assert set(rules) == {1}
    (note,) = (
        note for note in results["notes"] if note.startswith("Pictures are prepared as when")
    )
    assert "other roundings than timm's" in note


def test_lineage_names_the_others_and_never_the_client_itself(finished):
    output, _ = finished
    lineage = Contribution.open(output / "registry" / "clients" / "client-1").lineage
    assert lineage.anchored_by == ("client-0", "client-2")
    assert lineage.aligned_with == ()  # training starts from a head of zeros
    assert lineage.ensemble == ()


def test_the_same_seed_gives_the_same_result(finished, again):
    (output, results), (_, place) = finished, again
    figures = json.loads((place / "results.json").read_text())["per_client"]
    ours = Contribution.open(output / "registry" / "clients" / "client-0").task_vector.tensors
    theirs = Contribution.open(place / "registry" / "clients" / "client-0").task_vector.tensors
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert figures["client-0"]["losses"] == results["per_client"]["client-0"]["losses"]


def test_another_run_never_overwrites(finished, again):
    (output, _), (before, place) = finished, again
    assert (output / "results.json").read_bytes() == before
    assert (place / "results.json").exists()


def test_kinds_are_dealt_in_turn_and_a_node_may_insist(tmp_path):
    options = {"node_configs": {2: {"kind": "lora"}}}
    results = run(options, tmp_path / "out", kind="full,ia3", keep_fisher=False)
    kinds = [figures["kind"] for figures in results["per_client"].values()]
    assert kinds == ["full", "ia3", "lora"]
    assert not (
        tmp_path / "out" / "registry" / "clients" / "client-0" / "fisher.safetensors"
    ).exists()


def test_registered_names_win_over_node_config_over_partition(tmp_path):
    options = {
        "names": {0: "hospital-a"},
        "node_configs": {0: {"client": "ignored"}, 1: {"client": "hospital-b"}},
    }
    results = run(options, tmp_path / "out", realign=False)
    assert list(results["per_client"]) == ["client-2", "hospital-a", "hospital-b"]


def test_a_client_that_raises_is_named_and_left_out(tmp_path, monkeypatch):
    original = LocalClient.train

    def fail(self, request):
        if self.name == "client-1":
            raise RuntimeError("the disk of client-1 is full")
        return original(self, request)

    monkeypatch.setattr("clients.work.LocalClient.train", fail)
    monkeypatch.setattr("clients.local.LocalClient.train", fail)
    results = run({}, tmp_path / "out")
    (left_out,) = results["left_out"]
    assert (left_out["client"], left_out["phase"]) == ("client-1", "train")
    assert left_out["reason"] == "RuntimeError; see the client's own log."
    assert list(results["per_client"]) == ["client-0", "client-2"]
    assert not (tmp_path / "out" / "registry" / "clients" / "client-1").exists()
    owned = (
        results["per_client"]["client-0"]["classes"] + results["per_client"]["client-2"]["classes"]
    )
    assert results["classes"] == sorted(owned)


def _nan(tensors, manifest):
    name = next(name for name in tensors if name.startswith("task_vector/"))
    tensors[name][0, 0] = float("nan")


def _wrong_shape(tensors, manifest):
    name = next(name for name in tensors if name.endswith("/A"))
    tensors[name] = tensors[name][:, :-1].contiguous()


def _absurd(tensors, manifest):
    for name in tensors:
        if name.endswith(("/A", "/B")):
            tensors[name].fill_(6e4)


def _nonsense_memory(tensors, manifest):
    manifest["peak_memory"] = {"resident": "x"}


def _boast(tensors, manifest):
    manifest["own_task_accuracy"] = 1.5


def _forget(tensors, manifest):
    del manifest["losses"]


def _every_class(manifest, count):
    manifest["sums"] = dict.fromkeys(manifest["sums"], count)


def _of_type(tensors, dtype):
    tensors.update({name: torch.ones_like(tensor).to(dtype) for name, tensor in tensors.items()})


def _negative(tensors):
    next(tensor for name, tensor in tensors.items() if name.startswith("fisher/")).neg_()


def _beyond_float32(tensors, prefix):
    for name in [name for name in tensors if name.startswith(prefix)]:
        tensors[name] = torch.full(tensors[name].shape, 1e300, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_nan, "not finite"),
        (_wrong_shape, "has shape"),
        (_absurd, "Its training diverged"),
        (_nonsense_memory, "whole number"),
        (_boast, "expected [0, 1]"),
        (_forget, "malformed"),
        (lambda tensors, manifest: _beyond_float32(tensors, "head"), "not finite"),
        (lambda tensors, manifest: manifest.update(base="other@00"), "was trained on the backbone"),
    ],
)
def test_nonsense_from_training_is_refused_by_name(tmp_path, change, reason):
    options = {"tamper": {(1, "train"): altered(change)}}
    results = run(options, tmp_path / "out", realign=False)
    (left_out,) = results["left_out"]
    assert left_out["client"] == "client-1"
    assert reason in left_out["reason"]
    assert list(results["per_client"]) == ["client-0", "client-2"]
    composed = sorted(
        folder.name for folder in (tmp_path / "out" / "registry" / "clients").iterdir()
    )
    assert composed == ["client-0", "client-2"]


def test_a_wrong_backbone_is_refused_before_anything_is_computed(tmp_path):
    change = altered(lambda tensors, manifest: manifest.update(base="vit@1234"))
    results = run({"tamper": {(2, "query.describe"): change}}, tmp_path / "out", realign=False)
    (left_out,) = results["left_out"]
    assert left_out["phase"] == "describe"
    assert "vit@1234" in left_out["reason"]
    assert results["backbone"]["fingerprint"] in left_out["reason"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors, manifest: manifest.update(kind="dora"), "dora"),
        (lambda tensors, manifest: manifest.update(client="../up"), "client's name"),
        (lambda tensors, manifest: _every_class(manifest, 2.5), "whole number"),
        (lambda tensors, manifest: _every_class(manifest, 10**30), "whole number"),
        (lambda tensors, manifest: _of_type(tensors, torch.bool), "torch.bool"),
        (lambda tensors, manifest: _of_type(tensors, torch.int64), "expected floating"),
        (lambda tensors, manifest: _beyond_float32(tensors, "statistics/s"), "expected numbers"),
        (lambda tensors, manifest: _beyond_float32(tensors, "fisher"), "not finite"),
        (lambda tensors, manifest: _negative(tensors), "out of range"),
        (lambda tensors, manifest: manifest["fisher"].pop("report"), "malformed"),
        (
            lambda tensors, manifest: manifest["fisher"].update(num_examples=10**400),
            "whole number",
        ),
        (lambda tensors, manifest: manifest["fisher"].update(form="dense"), "in the form"),
        (lambda tensors, manifest: manifest.pop("fisher"), "sent no Fisher"),
        (lambda tensors, manifest: manifest["fisher"].update(caps={"form": "big"}), "the caps"),
    ],
)
def test_a_refused_description_leaves_no_trace(tmp_path, change, reason):
    options = {"tamper": {(1, "query.describe"): altered(change)}}
    results = run(options, tmp_path / "out", realign=False)
    (left_out,) = results["left_out"]
    assert left_out["phase"] == "describe"
    assert reason in left_out["reason"]
    lineage = Contribution.open(tmp_path / "out" / "registry" / "clients" / "client-0").lineage
    assert lineage.anchored_by == ("client-2",)


def test_a_node_may_not_take_anothers_registered_name(tmp_path):
    change = altered(lambda tensors, manifest: manifest.update(client="hospital-b"))
    options = {
        "names": {0: "hospital-a", 1: "hospital-b"},
        "tamper": {(0, "query.describe"): change},
    }
    results = run(options, tmp_path / "out", realign=False)
    assert "registered as 'hospital-a'" in results["left_out"][0]["reason"]
    assert list(results["per_client"]) == ["client-2", "hospital-b"]


def test_a_node_that_is_gone_is_left_out_at_once(tmp_path, monkeypatch):
    push = InProcessGrid.push_messages

    def refuse(self, messages):
        (message,) = messages
        if message.metadata.message_type == "train" and message.metadata.dst_node_id != 1000:
            return [""]  # as Flower answers for a node that has unregistered
        return push(self, [message])

    monkeypatch.setattr(InProcessGrid, "push_messages", refuse)
    results = run({}, tmp_path / "out", realign=False, min_clients=1)
    assert [c["client"] for c in results["left_out"]] == ["client-1", "client-2"]
    assert list(results["per_client"]) == ["client-0"]


def test_a_flipped_byte_on_the_way_is_refused(tmp_path):
    def flip(reply: Message) -> Message:
        array = reply.content["payload"]["payload"]
        data = bytearray(array.data)
        data[-100] ^= 1
        array.data = bytes(data)
        return reply

    results = run({"tamper": {(0, "train"): flip}}, tmp_path / "out", realign=False)
    assert "altered" in results["left_out"][0]["reason"]


def test_a_client_that_never_answers_is_left_out_after_the_timeout(tmp_path):
    one_by_one = {"timeout": 0.3, "in_flight": 1}  # so nobody waits while others train
    results = run({"tamper": {(1, "train"): lost}}, tmp_path / "out", realign=False, **one_by_one)
    (left_out,) = results["left_out"]
    assert "no answer within 0.3 s" in left_out["reason"]
    assert list(results["per_client"]) == ["client-0", "client-2"]


def test_of_two_nodes_with_one_name_neither_is_used(tmp_path):
    options = {"node_configs": {0: {"client": "twin"}, 2: {"client": "twin"}}}
    results = run(options, tmp_path / "out", realign=False, min_clients=1)
    assert list(results["per_client"]) == ["client-1"]
    assert len(results["left_out"]) == 2
    assert all("Two nodes call themselves 'twin'" in c["reason"] for c in results["left_out"])


def test_too_few_clients_fail_the_run_and_say_who_and_why(tmp_path):
    options = {
        "tamper": {
            (0, "train"): altered(_nan),
            (1, "train"): altered(_nan),
        }
    }
    with pytest.raises(TooFewClients, match=r"client-0 \(train\).*not finite"):
        run(options, tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
    last = json.loads((tmp_path / "out" / "events.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "failed"


def test_a_relative_output_is_refused_where_nobody_stands(tmp_path):
    with pytest.raises(ConfigError, match="absolute path"):
        run({}, Path("runs/here"))


def test_plain_task_arithmetic_sends_no_fisher_to_the_clients(tmp_path):
    results = run({}, tmp_path / "out", trust_region=0.0, fisher_form="dense", realign=False)
    sent = results["per_client"]["client-0"]["traffic"]["train"]["bytes_sent"]
    assert sent < results["backbone"]["target_parameters"]


def test_clients_that_share_a_class_have_one_row_for_it(tmp_path):
    owned = {"anna": ("dog", "owl"), "ben": ("cat", "dog")}
    pixels = torch.Generator().manual_seed(0)
    for client, classes in owned.items():
        for name in classes:
            for part, count in (("train", 8), ("test", 3)):
                folder = tmp_path / "images" / client / part / name
                folder.mkdir(parents=True)
                for i in range(count):
                    picture = torch.randint(0, 255, (28, 28), generator=pixels).to(torch.uint8)
                    Image.fromarray(picture.numpy()).save(folder / f"{i}.png")
    results = run(
        {"clients": 2}, tmp_path / "out", data=f"folder:{tmp_path / 'images'}", num_clients=2
    )
    assert list(results["per_client"]) == ["anna", "ben"]
    assert results["classes"] == ["cat", "dog", "owl"]
    assert results["left_out"] == []
    assert any("each given the other's own Fisher" in note for note in results["notes"])


def test_without_enough_others_nobody_is_given_a_fisher(tmp_path):
    results = run({}, tmp_path / "out", min_others=3)
    assert "client-0, client-1, client-2 trained without an anchor" in "".join(results["notes"])
    for client in Registry(tmp_path / "out/registry").pool():
        assert client.lineage.anchored_by == ()


def test_classes_that_may_be_one_are_noted_before_training(tmp_path):
    owned = {"north": {"Three": 4, "Seven": 4}, "south": {"three": 4, "Seven\u00a0": 4}}
    images = draw_images(tmp_path / "images", owned, test=2)
    run({"clients": 2}, tmp_path / "out", data=f"folder:{images}", num_clients=2)
    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    (note,) = (i for i, e in enumerate(events) if "spell it alike" in e.get("text", ""))
    assert (
        "'Seven' (north), 'Seven⟨U+00A0⟩' (south); 'Three' (north), 'three' (south)"
        in (events[note]["text"])
    )
    training = [e["event"] == "phase-started" and e["phase"] == "train" for e in events]
    assert note < training.index(True)


def test_what_is_odd_about_pictures_is_noted_by_client_unless_it_sends_under_noise(tmp_path):
    for client, top in (("north", 4000), ("south", 900)):
        for name in ("cat", "dog"):
            for part, count in (("train", 4), ("test", 2)):
                folder = tmp_path / "images" / client / part / name
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = np.full((8, 8), top - 50 * i, dtype=np.uint16)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
    data = f"folder:{tmp_path / 'images'}"
    notes = run({"clients": 2}, tmp_path / "out", data=data, num_clients=2)["notes"]
    assert any("training images too, at north (4), south (4)" in note for note in notes)
    assert any("the ranges differ: north 0..4095, south 0..1023." in note for note in notes)
    noise = {"dp_noise": 1.0, "fisher_form": "dense", "trust_region": 0.0}
    noised = run({"clients": 2}, tmp_path / "noised", data=data, num_clients=2, **noise)["notes"]
    assert not any("too, at" in note or "ranges differ" in note for note in noised)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["lora", "full", "ia3"])
def test_all_phases_run_on_a_gpu(tmp_path, kind):
    results = run({}, tmp_path / "out", kind=kind, device="cuda")
    assert results["left_out"] == []
    assert results["class_il_accuracy"] > 0.5
