"""FedAvg and FedProx by Flower's own strategies, held against means taken by hand."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from app_runs import BACKBONE, QUICK, altered, run
from builders import dense_by_hand
from round_runs import draw_images
from torch import Tensor

from clients import averaging
from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.composition.head import joint_head
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Kind
from fedcompo.config.data import DataConfig
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData, Split, load_client_data
from fedcompo.engine.live import State
from fedcompo.errors import ConfigError, ContributionError, TooFewClients
from fedcompo.method.deltas import new_deltas
from fedcompo.method.features import extract_features
from fedcompo.method.heads import Head, head_tensors
from fedcompo.method.statistics import FeatureSums
from fedcompo.method.task_vector import TaskVector
from fedcompo.report.console import PlainConsole
from fedcompo.report.results import print_results
from fedcompo.seeds import generator_for
from fedcompo.storage.tensorfile import prefixed, section
from fedcompo.training.accuracy import accuracy_of
from fedcompo.training.fit import Course, Fitted, fit_task_vector

OWNED = {"anna": {"dog": 12, "owl": 9}, "ben": {"cat": 5, "dog": 3}, "cleo": {"eel": 7, "fox": 7}}
"""Training images by client and class: unequal numbers, and one class that two clients share."""
CLASSES = ("cat", "dog", "eel", "fox", "owl")
AVERAGED = [Kind.FULL, Kind.LORA, Kind.IA3]
Parameters = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(BACKBONE)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"), OWNED, test=4)


def settings(images: Path, **more: object) -> dict:
    given = {"batch_size": 4, "num_server_rounds": 1, "head_start": "aligned", "aside": 0.0}
    given["max_count_ratio"] = 0.0  # all count by all that they have
    return {"data": f"folder:{images}", "wire": "float32", **given, **more}


def config_of(given: Mapping[str, object]) -> RunConfig:
    return RunConfig.parse({**QUICK, **{k.replace("_", "-"): v for k, v in given.items()}})


def owned(images: Path, backbone: Backbone) -> list[ClientData]:
    source = DataConfig(data=f"folder:{images}")
    seen = backbone.preprocessing
    return [load_client_data(source, seen, partition=i, seed=0) for i in range(len(OWNED))]


def start_of(backbone: Backbone, kind: Kind, datas: list[ClientData], config: RunConfig):
    """What everyone begins with: a task vector that changes nothing, and the aligned head."""
    described = {}
    for data in datas:
        features = extract_features(backbone.forward({}), data.train.images)
        described[data.name] = FeatureSums.of(features, data.train.labels, data.classes)
    generator = generator_for(config.seed, "averaging")
    deltas = new_deltas(kind, backbone.theta_0, rank=config.train.rank, generator=generator)
    vector = TaskVector.of(kind, deltas, base=backbone.fingerprint)
    return vector, joint_head(
        described,
        CompositionSettings.of(config),
        purpose="align",
    )


def fit(
    backbone: Backbone, data: ClientData, vector: TaskVector, head: Head, config: RunConfig, n: int
) -> Fitted:
    """Oracle of a client's round: labels by the names of classes, nothing that holds it."""
    named = [data.classes[label] for label in data.train.labels.tolist()]
    labels = torch.tensor([head.classes.index(name) for name in named])
    quiet = {"alpha": 0.0}
    rounds = config.method.num_server_rounds
    return fit_task_vector(
        backbone,
        vector.kind,
        Split(data.train.images, labels),
        head,
        RunConfig.parse({**config.flat(), **quiet}).train,
        generator=generator_for(config.seed, "train", data.name, str(n)),
        course=Course(vector, passed=(n - 1) / rounds, share=1 / rounds),
    )


def parameters_of(vector: TaskVector, head: Head) -> Parameters:
    return prefixed("task_vector", vector.tensors) | head_tensors(head)


def saved(output: Path) -> Parameters:
    return safetensors.torch.load_file(output / "model" / "model.safetensors")


def model_of(backbone: Backbone, kind: Kind, parameters: Parameters) -> Parameters:
    """Weights of the model that parameters make, in float64."""
    vector = TaskVector(kind, section("task_vector", parameters), backbone.fingerprint)
    changes = dense_by_hand(vector, backbone.theta_0)
    theta = {name: backbone.theta_0[name].double() + change for name, change in changes.items()}
    return theta | {n.replace("/", "."): t.double() for n, t in parameters.items() if "head/" in n}


@pytest.fixture(scope="module", params=AVERAGED)
def finished(request, images, backbone, tmp_path_factory):
    """One round of FedAvg with one epoch; output, results, kind and settings."""
    output, kind = tmp_path_factory.mktemp("run") / "out", request.param
    given = settings(images, kind=str(kind), method="fedavg")
    return output, run({}, output, **given), kind, config_of(given)


def test_one_round_is_the_mean_of_local_training_weighted_by_examples(finished, images, backbone):
    output, results, kind, config = finished
    datas = owned(images, backbone)
    vector, head = start_of(backbone, kind, datas, config)
    fits = [fit(backbone, data, vector, head, config, 1) for data in datas]
    total = sum(sum(own.values()) for own in OWNED.values())
    shares = [sum(OWNED[data.name].values()) / total for data in datas]
    sent = [parameters_of(fitted.task_vector, fitted.head) for fitted in fits]
    mean = {n: sum(w * p[n].double() for w, p in zip(shares, sent, strict=True)) for n in sent[0]}
    model = saved(output)
    for name, expected in model_of(backbone, kind, mean).items():
        torch.testing.assert_close(model[name].double(), expected, rtol=1e-5, atol=1e-7)
    changed = [n for n, weight in backbone.theta_0.items() if not torch.equal(model[n], weight)]
    assert changed == list(backbone.theta_0)
    for data, fitted, share in zip(datas, fits, shares, strict=True):
        figures = results["per_client"][data.name]
        assert figures["losses"] == list(fitted.losses)
        assert figures["coefficient"] == pytest.approx(share)
    losses = [share * fitted.losses[-1] for share, fitted in zip(shares, fits, strict=True)]
    assert results["rounds"] == [
        {"round": 1, "trained": list(OWNED), "mean_loss": pytest.approx(sum(losses))}
    ]


def test_nobody_is_weighed_by_more_images_than_the_cap(images, tmp_path):
    results = run({}, tmp_path / "out", **settings(images, method="fedavg", max_count_ratio=1.0))
    shares = {client: own["coefficient"] for client, own in results["per_client"].items()}
    assert shares == pytest.approx({"anna": 14 / 36, "ben": 8 / 36, "cleo": 14 / 36})


def test_reported_accuracies_are_those_of_the_saved_model_and_of_the_frozen_one(
    finished, images, backbone
):
    output, results, kind, config = finished
    datas = owned(images, backbone)
    _, aligned = start_of(backbone, kind, datas, config)
    model = saved(output)
    head = Head(CLASSES, model["head.weight"], model["head.bias"])
    theta = {name: model[name] for name in backbone.theta_0}
    for data in datas:
        figures = results["per_client"][data.name]
        now = accuracy_of(backbone, theta, head, data.classes, data.test)
        frozen = accuracy_of(backbone, {}, aligned, data.classes, data.test)
        assert figures["class_il_accuracy"] == now.class_il
        assert figures["task_il_accuracy"] == now.task_il
        assert figures["frozen_class_il_accuracy"] == frozen.class_il
        assert figures["frozen_task_il_accuracy"] == frozen.task_il
    assert sum(own["images"] for own in results["by_class"].values()) == sum(
        len(data.test.labels) for data in datas
    )
    assert tuple(results["classes"]) == CLASSES
    described = json.loads((output / "model" / "config.json").read_text())
    assert tuple(described["label_names"]) == CLASSES


def test_the_frozen_backbone_is_the_one_that_ita_reports(finished, images, tmp_path):
    _, results, kind, _ = finished
    ita = run({}, tmp_path / "out", **settings(images, kind=str(kind), realign=False))
    for key in ("frozen_class_il_accuracy", "frozen_task_il_accuracy"):
        for client, figures in ita["per_client"].items():
            assert results["per_client"][client][key] == figures[key]


def test_a_round_costs_each_client_the_parameters_once_each_way(finished):
    _, results, kind, _ = finished
    targets, features = results["backbone"]["target_parameters"], 128
    parameters = results["model"]["parameters_sent"]
    if kind is Kind.FULL:
        assert parameters == targets + len(CLASSES) * (features + 1)
    costs = [figures["traffic"]["train, round 1"] for figures in results["per_client"].values()]
    for cost in costs:
        for way in ("bytes_sent", "bytes_received"):
            assert 4 * parameters < cost[way] < 4 * parameters + 10_000
    for way in ("bytes_sent", "bytes_received"):
        assert results["phases"]["train, round 1"][way] == sum(cost[way] for cost in costs)


def test_what_is_left_says_that_there_is_no_registry(finished):
    output, results, _, _ = finished
    names = {path.name for path in output.iterdir()}
    assert names == {"model", "results.json", "report.html", "events.jsonl", "flower.log"}
    assert any("no registry" in note for note in results["notes"])
    assert results["method"] == "fedavg"
    assert not {"registry", "diagnostics"} & results.keys()


def test_people_see_a_table_and_a_page(finished):
    output, results, _, _ = finished
    assert "There is no registry" in (output / "report.html").read_text()
    stream = io.StringIO()
    print_results(results, PlainConsole(file=stream, width=120))
    assert "train" in stream.getvalue()
    assert "There is no registry" in stream.getvalue()


def test_those_who_follow_the_run_see_its_rounds(images, tmp_path):
    given = settings(images, kind="ia3", method="fedavg", num_server_rounds=2)
    run({}, tmp_path / "out", **given)
    lines = (tmp_path / "out" / "events.jsonl").read_text().splitlines()
    events, progress = [json.loads(line) for line in lines], State()
    for event in events:
        progress = progress.after(event)
    assert progress.phases == ("describe", "evaluate frozen", "train", "evaluate")
    assert {progress.cells[client, "train"].part for client in OWNED} == {"round 2"}
    started = [e.get("part") for e in events if e["event"] == "phase-started"]
    assert started == [None, None, "round 1", "round 2", None]


@pytest.mark.parametrize("kind", AVERAGED)
def test_rounds_go_on_from_one_another_along_one_cosine(images, backbone, tmp_path, kind):
    """The mean over a single client is its own result, to the last bit."""
    given = settings(images, kind=str(kind), method="fedavg", num_server_rounds=3, num_clients=1)
    config = config_of(given)
    results = run({"clients": 1}, tmp_path / "out", **given, min_clients=1)
    (anna, *_) = owned(images, backbone)
    vector, head = start_of(backbone, kind, [anna], config)
    losses = []
    for number in (1, 2, 3):
        fitted = fit(backbone, anna, vector, head, config, number)
        vector, head = fitted.task_vector, fitted.head
        losses += fitted.losses
    assert results["per_client"]["anna"]["losses"] == losses
    model = saved(tmp_path / "out")
    for name, change in vector.dense(backbone.theta_0).items():
        assert torch.equal(model[name], backbone.theta_0[name] + change)
    assert torch.equal(model["head.weight"], head.weight)


def test_a_head_of_zeros_is_where_everyone_may_start(images, tmp_path):
    """One step from there moves no weight of the backbone."""
    given = settings(images, method="fedavg", head_start="zero", batch_size=100)
    results = run({}, tmp_path / "out", **given)
    losses = [figures["losses"] for figures in results["per_client"].values()]
    assert losses == [[pytest.approx(math.log(len(CLASSES)))]] * len(OWNED)


def distance(output: Path, backbone: Backbone) -> float:
    model = saved(output)
    changes = [model[name] - weight for name, weight in backbone.theta_0.items()]
    return float(torch.cat([change.flatten() for change in changes]).norm())


def test_fedprox_with_a_huge_pull_stays_at_the_start_and_with_none_is_fedavg(
    images, backbone, tmp_path
):
    given = settings(images, kind="full", local_epochs=6)
    run({}, tmp_path / "fedavg", **given, method="fedavg")
    run({}, tmp_path / "none", **given, method="fedprox", proximal_mu=0.0)
    run({}, tmp_path / "huge", **given, method="fedprox", proximal_mu=1e6)
    free, none = saved(tmp_path / "fedavg"), saved(tmp_path / "none")
    assert all(torch.equal(none[name], free[name]) for name in free)
    held = distance(tmp_path / "huge", backbone)
    assert 0 < held < 0.1 * distance(tmp_path / "fedavg", backbone)


def failing(monkeypatch, clients: tuple[str, ...], number: int) -> None:
    """Let the disks of clients be full in a round."""
    original = averaging.train

    def fail(client, request):
        if client.name in clients and request.number == number:
            raise RuntimeError(f"the disk of {client.name} is full")
        return original(client, request)

    monkeypatch.setattr(averaging, "train", fail)


def test_a_client_that_fails_is_named_and_the_others_go_on(images, tmp_path, monkeypatch):
    failing(monkeypatch, ("ben",), 2)
    given = settings(images, kind="ia3", method="fedavg", num_server_rounds=3)
    results = run({}, tmp_path / "out", **given)
    (left_out,) = results["left_out"]
    assert (left_out["client"], left_out["phase"]) == ("ben", "train, round 2")
    assert left_out["reason"] == "RuntimeError; see the client's own log."
    others = ["anna", "cleo"]
    assert [r["trained"] for r in results["rounds"]] == [list(OWNED), others, others]
    assert list(results["per_client"]) == others
    assert tuple(results["classes"]) == CLASSES


def test_too_few_clients_fail_the_run_and_say_who_and_why(images, tmp_path, monkeypatch):
    failing(monkeypatch, tuple(OWNED), 1)
    with pytest.raises(TooFewClients, match=r"(?s)anna .*ben .*cleo .*RuntimeError; see"):
        run({}, tmp_path / "out", **settings(images, method="fedavg"))
    assert not (tmp_path / "out" / "results.json").exists()
    last = json.loads((tmp_path / "out" / "events.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "failed"


def test_what_a_client_refuses_in_words_is_passed_on(images, tmp_path, monkeypatch):
    original = averaging.fit_task_vector

    def diverge(backbone, kind, data, *rest, **options):
        if len(data.labels) == sum(OWNED["ben"].values()):
            raise ContributionError.public("The training loss is nan.")
        return original(backbone, kind, data, *rest, **options)

    monkeypatch.setattr(averaging, "fit_task_vector", diverge)
    results = run({}, tmp_path / "out", **settings(images, kind="ia3", method="fedavg"))
    assert [o["client"] for o in results["left_out"]] == ["ben"]
    assert results["left_out"][0]["reason"] == "ContributionError: The training loss is nan."


def _nan(tensors, manifest):
    next(t for name, t in tensors.items() if name.endswith("/A"))[0, 0] = float("nan")


def _narrower(tensors, manifest):
    name = next(name for name in tensors if name.endswith("fc1.weight/A"))
    other = f"{name[:-1]}B"
    tensors[name], tensors[other] = tensors[name][:-1].clone(), tensors[other][:, :-1].clone()


def _wide_head(tensors, manifest):
    tensors["head/bias"] = torch.zeros(len(CLASSES) + 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_nan, "not finite"),
        (_narrower, "other tensors than it was given"),
        (_wide_head, "other tensors than it was given"),
        (lambda tensors, manifest: manifest.pop("losses"), "malformed"),
        (lambda tensors, manifest: manifest.update(losses=["nan"]), "reports the losses"),
        (lambda tensors, manifest: tensors.update(more=torch.ones(1)), "other tensors"),
        (lambda tensors, manifest: manifest.update(base="other@00"), "was trained on the backbone"),
    ],
)
def test_nonsense_is_kept_out_of_the_mean_by_name(images, tmp_path, change, reason):
    options = {"tamper": {(1, "train"): altered(change)}}
    results = run(options, tmp_path / "out", **settings(images, method="fedavg"))
    (left_out,) = results["left_out"]
    assert left_out["client"] == "ben"
    assert reason in left_out["reason"]
    assert list(results["per_client"]) == ["anna", "cleo"]


def test_a_node_that_insists_on_another_kind_is_left_out_and_so_is_who_is_excluded(
    images, tmp_path
):
    options = {"node_configs": {1: {"kind": "full"}}}
    given = settings(images, kind="ia3", method="fedavg", exclude="anna")
    results = run(options, tmp_path / "out", **given, min_clients=1)
    reasons = {o["client"]: o["reason"] for o in results["left_out"]}
    assert reasons.keys() == {"anna", "ben"}
    assert "insists on the kind full" in reasons["ben"]
    assert results["classes"] == ["eel", "fox"]


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"kind": "lora,ia3"}, "one kind"),
        ({"kind": "tangent"}, "one kind"),
        ({"schedule": "sequential"}, "schedule = parallel"),
        ({"registry": "/tmp/registry"}, "registry"),
    ],
)
@pytest.mark.parametrize("method", ["fedavg", "fedprox"])
def test_settings_that_allow_no_averaging_are_refused_before_anyone_is_asked(
    images, tmp_path, given, fault, method
):
    with pytest.raises(ConfigError, match=fault):
        run({}, tmp_path / "out", **settings(images, method=method, **given))
    events = (tmp_path / "out" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in events] == ["run", "failed"]
