"""The audit: what it compares, what it measures, and that it finds what is there to be found."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from audited_federation import FREE, OTHERS, config_of, federate, noise
from PIL import Image
from registry_builders import member, registry_of
from torch.func import functional_call

from fedcompo.audit.evaluation import clients_data
from fedcompo.audit.forgetting import linear_cka
from fedcompo.audit.measure import LIKELIHOOD_RATIO, LOSS, audit
from fedcompo.audit.membership import loss_attack
from fedcompo.audit.models import (
    AFTER,
    BEFORE,
    FROZEN,
    GOLD,
    REPAIRED,
    audited_images,
    audited_models,
    check_gold,
    distances_to_gold,
)
from fedcompo.audit.report import markdown
from fedcompo.errors import BackboneMismatch, ConfigError, ContributionError, DataError
from fedcompo.registry.registry import Registry

CLIENT, OTHER = "client-1", "client-0"
QUICK = {"local_epochs": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return f"npz:{noise(tmp_path_factory.mktemp('noise') / 'noise.npz')}"


@pytest.fixture(scope="module")
def registry(data, tmp_path_factory) -> Registry:
    return federate(tmp_path_factory.mktemp("run") / "registry", config_of(data))


@pytest.fixture(scope="module")
def values(registry) -> dict:
    return audit(registry, CLIENT, shadows=8)


def every_byte(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- The models ---


def test_after_is_bit_for_bit_what_a_removal_leaves(registry, tmp_path):
    after = audited_models(registry, CLIENT)[AFTER]
    shutil.copytree(registry.path, tmp_path / "copy", symlinks=True)
    copy = Registry(tmp_path / "copy")
    copy.remove(CLIENT)
    expected, head = copy.theta_p(), copy.joint_head()
    assert after.clients == copy.clients
    assert after.theta.keys() == expected.keys()
    assert all(torch.equal(after.theta[name], expected[name]) for name in expected)
    assert after.head.classes == head.classes
    assert torch.equal(after.head.weight, head.weight)
    assert torch.equal(after.head.bias, head.bias)


def test_an_audit_changes_no_byte_of_the_registries(data, tmp_path):
    config = config_of(data, **QUICK)
    registry = federate(tmp_path / "registry", config)
    gold = federate(tmp_path / "gold", config, without=[CLIENT])
    files = every_byte(tmp_path)
    audit(registry, CLIENT, gold=gold, shadows=4)
    assert every_byte(tmp_path) == files


@pytest.mark.parametrize(
    ("settings", "is_exact"), [(FREE, True), (OTHERS, False)], ids=["lineage-free", "others"]
)
def test_without_lineage_after_is_gold_bit_for_bit(settings, is_exact, data, tmp_path):
    config = config_of(data, **settings, **QUICK)
    registry = federate(tmp_path / "registry", config)
    gold = federate(tmp_path / "gold", config, without=[CLIENT])
    found = audit(registry, CLIENT, gold=gold, shadows=4)
    assert (found["distance_to_gold"][AFTER] == 0) is is_exact
    assert found["distance_to_gold"][BEFORE] > 0
    assert any(found["influence"].values()) is not is_exact
    for attack in found["membership"].values():
        assert (attack[AFTER] == attack[GOLD]) is is_exact
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
    differences = [e for part in found["beyond_gold"].values() for e in part.values()]
    assert all(e == nothing for e in differences) is is_exact


def test_the_distance_is_the_length_of_the_difference(registry):
    models = audited_models(registry, CLIENT)
    models[GOLD] = models[AFTER]
    difference = np.concatenate(
        [
            (models[BEFORE].theta[name].double() - weight.double()).flatten().numpy()
            for name, weight in models[AFTER].theta.items()
        ]
    )
    expected = float(np.linalg.norm(difference))
    assert distances_to_gold(models) == {BEFORE: pytest.approx(expected, rel=1e-12), AFTER: 0.0}


# --- Accuracy ---


def counted(backbone, model, rows, data) -> tuple[float, float]:
    """Class-IL and task-IL, image by image, in float64; class-IL goes by names."""
    network = backbone.model.double()
    theta = {name: weight.double() for name, weight in model.theta.items()}
    class_hits = task_hits = 0
    for image, label in zip(data.test.images, data.test.labels, strict=True):
        batch = backbone.preprocessing.normalise(image.unsqueeze(0)).double()
        features = functional_call(network, theta, (batch,))[0]
        scores = {
            name: float(features @ model.head.weight[row].double() + model.head.bias[row])
            for row, name in enumerate(model.head.classes)
        }
        own = {
            name: float(features @ rows.weight[row].double() + rows.bias[row])
            for row, name in enumerate(rows.classes)
            if name in data.classes
        }
        class_hits += max(scores, key=scores.get) == data.classes[label]
        task_hits += max(own, key=own.get) == data.classes[label]
    return class_hits / len(data.test.labels), task_hits / len(data.test.labels)


def check_accuracies(found: dict, registry: Registry, client: str) -> None:
    models = audited_models(registry, client)
    source = config_of(found["data"]).data
    for data in clients_data(source, registry.backbone.load(), seed=0):
        for name, model in models.items():
            rows = models[BEFORE].head if data.name == client else model.head
            expected = counted(registry.backbone.load(), model, rows, data)
            figures = found["accuracy"]["per_client"][data.name][name]
            assert (figures["class_il_accuracy"], figures["task_il_accuracy"]) == expected
            assert figures["num_examples"] == len(data.test.labels)


def test_accuracies_are_counted_with_the_rows_that_an_attacker_kept(values, registry):
    check_accuracies(values, registry, CLIENT)
    removed = values["accuracy"]["removed"]
    assert removed is values["accuracy"]["per_client"][CLIENT]
    assert removed[AFTER]["class_il_accuracy"] == 0
    assert removed[BEFORE]["class_il_accuracy"] > 0
    assert removed[AFTER]["task_il_accuracy"] > 0
    assert values["models"][BEFORE]["rows_of_client"]
    assert values["models"][AFTER]["rows_of_client"] == []
    assert any("by construction" in note for note in values["notes"])


SHADES = {"ada": ("dark", 20), "bob": ("middling", 120), "eve": ("dim", 70)}


def shades_of_grey(folder: Path) -> str:
    """Three clients that share the class `bright`; each has a class of its own besides."""
    generator = np.random.default_rng(0)
    for client, own in SHADES.items():
        for name, level in (("bright", 230), own):
            for part, count in (("train", 8), ("test", 4)):
                target = folder / client / part / name
                target.mkdir(parents=True)
                for index in range(count):
                    pixels = level + generator.integers(-15, 16, (8, 8))
                    Image.fromarray(pixels.astype(np.uint8)).save(target / f"{index}.png")
    return f"folder:{folder}"


def test_classes_that_others_share_keep_their_rows_and_means_are_over_clients(tmp_path):
    config = config_of(shades_of_grey(tmp_path / "images"), **QUICK)
    registry = federate(tmp_path / "registry", config)
    found = audit(registry, "ada", shadows=4)
    check_accuracies(found, registry, "ada")
    accuracy = found["accuracy"]
    for name in (BEFORE, AFTER):
        for key, mean in accuracy["remaining"][name].items():
            both = [accuracy["per_client"][client][name][key] for client in ("bob", "eve")]
            assert mean == pytest.approx(sum(both) / 2)
    assert found["models"][AFTER]["rows_of_client"] == ["bright"]
    assert found["accuracy"]["removed"][AFTER]["class_il_accuracy"] == 0.5
    (note,) = [note for note in found["notes"] if "by construction" in note]
    assert "no rows of dark," in note


# --- Membership ---


def test_what_was_learnt_by_heart_is_found_before_and_not_after(values):
    for attack in (LOSS, LIKELIHOOD_RATIO):
        before, after = (values["membership"][attack][name] for name in (BEFORE, AFTER))
        assert before["auc"]["low"] > 0.5
        assert not before["is_chance"]
        assert before["auc"]["value"] > after["auc"]["value"]
    assert values["membership"][LIKELIHOOD_RATIO][AFTER]["is_chance"]


def test_the_loss_attack_sees_each_backbone_under_the_head_of_the_model_before(values, registry):
    backbone = registry.backbone.load()
    (data,) = clients_data(config_of(values["data"]).data, backbone, seed=0, wanted=(CLIENT,))
    models = audited_models(registry, CLIENT)
    head = models[BEFORE].head
    network = backbone.model.double()
    for name, model in models.items():
        theta = {key: weight.double() for key, weight in model.theta.items()}
        losses = []
        for part in (data.train, data.test):
            batch = backbone.preprocessing.normalise(part.images).double()
            logits = functional_call(network, theta, (batch,)) @ head.weight.double().T
            logits = logits + head.bias.double()
            labels = head.indices(data.classes)[part.labels]
            losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        expected = loss_attack(*losses, seed=0).auc
        found = values["membership"][LOSS][name]["auc"]
        assert found["value"] == pytest.approx(expected.value, abs=0.01)  # a near tie may turn
        assert found["low"] == pytest.approx(expected.low, abs=0.02)
    assert values["images"] == {"members": 32, "non_members": 32}


def test_equal_seeds_give_equal_figures_and_others_other_shadows(registry, values):
    again, other = (audit(registry, CLIENT, shadows=8, seed=seed) for seed in (0, 1))
    assert json.dumps(again) == json.dumps(values)
    for name in (BEFORE, AFTER):
        first, second = (v["membership"][LIKELIHOOD_RATIO][name]["auc"] for v in (values, other))
        assert first["value"] != second["value"]
        assert values["accuracy"] == other["accuracy"]


def test_true_positive_rates_appear_where_there_are_enough_non_members(tmp_path):
    data = f"npz:{noise(tmp_path / 'noise.npz', train=4, test=50)}"
    registry = federate(tmp_path / "registry", config_of(data, **QUICK))
    found = audit(registry, CLIENT, shadows=4)
    assert list(found["membership"][LOSS][BEFORE]["tpr"]) == ["0.05"]
    assert not any("too few" in note for note in found["notes"])


def test_a_head_that_was_realigned_is_mentioned(data, tmp_path):
    registry = federate(tmp_path / "registry", config_of(data, **QUICK))
    described = {member.client: member.statistics for member in registry.pool()}
    registry.realign(described)
    found = audit(registry, CLIENT, shadows=4)
    assert {n: about["joint_head"] for n, about in found["models"].items()} == {
        BEFORE: "realigned",
        AFTER: "aligned",
    }
    assert any("before of features of the composed model" in note for note in found["notes"])


# --- Features, and what comes back ---


def test_what_the_features_knew_is_gone_and_gold_never_knew_it(values, registry):
    assert list(values["probe"]) == [FROZEN, BEFORE, AFTER]
    assert list(values["similarity"]["removed"]) == ["before~after", "frozen~after"]
    assert values["similarity"].keys() == {"removed", "remaining"}
    assert values["beyond_gold"] is values["resurfacing"] is None
    models = audited_models(registry, CLIENT)
    (data,) = clients_data(
        config_of(values["data"]).data, registry.backbone.load(), seed=0, wanted=(CLIENT,)
    )
    seen = [models[name].features(registry.backbone.load(), data.test.images) for name in models]
    alike = values["similarity"]["removed"]["before~after"]["value"]
    assert alike == pytest.approx(linear_cka(*seen, seed=0).value)
    loss, ratio, *others = values["verdicts"]
    assert loss.startswith("Loss attack. Finds members: before (AUC ")
    assert ". Chance: after (AUC" in ratio
    assert [line.split()[0] for line in others] == ["A", "Its"]


def repaired(registry: Registry, path: Path, *, liar: bool) -> Registry:
    """A copy without the client; a liar brings its task vector back, a little changed."""
    shutil.copytree(registry.path, path, symlinks=True)
    copy = Registry(path)
    removed = copy.contribution(CLIENT).task_vector
    tensors = {name: 1.01 * t for name, t in removed.tensors.items()}  # no digest finds it
    copy.remove(CLIENT)
    if liar:
        stays = copy.contribution(OTHER)
        copy.add(
            replace(stays, task_vector=replace(removed, tensors=tensors)),
            replacing=True,
            empty=True,
        )
    return copy


@pytest.mark.parametrize("liar", [True, False], ids=["liar", "honest"])
def test_what_a_repair_brings_back_is_seen(liar, tmp_path):
    data = noise(tmp_path / "noise.npz", train=24, test=24)
    registry = federate(tmp_path / "registry", config_of(f"npz:{data}"))
    copy = repaired(registry, tmp_path / "copy", liar=liar)
    found = audit(registry, CLIENT, repaired=copy, shadows=4)
    assert found["repaired_root"] == copy.state.root
    assert list(found["models"]) == [BEFORE, AFTER, REPAIRED]
    back = found["resurfacing"]
    assert (back["auc"][LOSS]["low"] > 0) is liar
    assert back["probe"].keys() == found["probe"][REPAIRED].keys()
    alike = found["similarity"]["removed"]["after~repaired"]["value"]
    assert (alike == pytest.approx(1)) is not liar
    verdict = found["verdicts"][-1]
    assert verdict.startswith("Repaired - after (above 0: something comes back): ")
    assert ("loss attack +" in verdict) is liar
    assert ("no difference is seen" in verdict) is not liar


def test_a_repaired_registry_that_is_no_copy_without_the_client_is_refused(
    registry, data, tmp_path
):
    apart = federate(tmp_path / "apart", config_of(data, **QUICK), without=[CLIENT])
    for other in (registry, apart):
        with pytest.raises(ConfigError, match=r"expected a copy of .* client-1 was removed"):
            audit(registry, CLIENT, repaired=other)


# --- What is refused ---


@pytest.mark.parametrize("client", ["client-7", "../client-1", ""])
def test_a_client_that_is_not_there_is_refused(registry, client):
    with pytest.raises(ContributionError, match="There is no client"):
        audit(registry, client)


def test_a_client_of_one_class_is_audited_among_the_classes_of_the_others(data, tmp_path):
    registry = federate(tmp_path / "registry", config_of(data, num_tasks=4, **QUICK))
    assert len(registry.member(CLIENT).classes) == 1
    values = audit(registry, CLIENT, shadows=4)
    assert 0 <= values["membership"][LIKELIHOOD_RATIO][BEFORE]["auc"]["value"] <= 1


def test_where_all_have_the_same_one_class_there_is_nothing_to_attack(tmp_path):
    members = (member(name, seed=i, classes=("cat",)) for i, name in enumerate("ab"))
    registry = registry_of(tmp_path / "registry", *members)
    with pytest.raises(ContributionError, match="the one class 'cat', as a has: no model can be"):
        audit(registry, "a")


def test_after_the_last_client_the_pre_trained_weights_are_left(data, tmp_path):
    registry = federate(tmp_path / "registry", config_of(data), without=[OTHER])
    found = audit(registry, CLIENT, shadows=4)
    assert found["models"][AFTER] == {
        "clients": [],
        "joint_head": "aligned",
        "rows_of_client": [],
    }
    assert found["accuracy"]["removed"][AFTER]["class_il_accuracy"] == 0
    assert found["accuracy"]["remaining"] == {}
    assert found["probe"][AFTER] == found["probe"][FROZEN]  # nothing is left of it
    assert found["probe"][BEFORE] != found["probe"][AFTER]
    assert found["similarity"]["removed"]["frozen~after"]["value"] == pytest.approx(1)
    loss = found["membership"][LOSS]
    assert loss[BEFORE]["auc"]["low"] > 0.5
    assert loss[BEFORE]["auc"]["value"] > loss[AFTER]["auc"]["value"]
    assert "after: the client removed (the pre-trained weights alone)" in unescape(markdown(found))
    for other in ("gold", "repaired"):
        with pytest.raises(ConfigError, match=r"client-1 is the last member.*Leave `--gold` and"):
            audit(registry, CLIENT, **{other: registry})


@pytest.mark.parametrize(
    ("settings", "without", "reason"),
    [
        ({}, [], "holds client-0, client-1, expected exactly client-0. .*`exclude = client-1`"),
        ({}, [OTHER], "holds client-1, expected exactly client-0"),
        ({"local_epochs": 2}, [CLIENT], "local-epochs of client-0 is 2, expected 1"),
        ({"scale": 3.0}, [CLIENT], "the registry's scale is 3.0, expected 2.0"),
        ({"seed": 1, "alpha": 2.0}, [CLIENT], r"\(and [0-9]+ more\)"),
    ],
)
def test_a_gold_registry_of_another_run_is_refused(settings, without, reason, data, tmp_path):
    registry = federate(tmp_path / "registry", config_of(data, **QUICK))
    gold = federate(tmp_path / "gold", config_of(data, **{**QUICK, **settings}), without=without)
    with pytest.raises(ConfigError, match=reason):
        audit(registry, CLIENT, gold=gold)


def test_caps_that_follow_from_who_is_there_may_differ_but_not_how_they_are_chosen(tmp_path):
    images = tmp_path / "images"
    source = shades_of_grey(images)
    for client, fewer in (("ada", 4), ("bob", 2)):
        for path in (images / client / "train").rglob("*.png"):
            if int(path.stem) < fewer:
                path.unlink()
    registry = federate(tmp_path / "registry", config_of(source, **QUICK))
    gold = federate(tmp_path / "gold", config_of(source, **QUICK), without=["eve"])
    assert (registry.settings.class_cap, gold.settings.class_cap) == (9, 6)
    check_gold(registry, gold, "eve")
    config = config_of(source, **QUICK, max_count_ratio=2.0)
    other = federate(tmp_path / "other", config, without=["eve"])
    with pytest.raises(ConfigError, match=r"max_count_ratio is 2\.0, expected 1\.5"):
        check_gold(registry, other, "eve")


def test_a_gold_registry_of_another_backbone_is_refused(registry, tmp_path):
    backbone = registry.backbone.load()
    other = Registry.create(tmp_path / "gold", replace(backbone, fingerprint="pico@other"))
    with pytest.raises(BackboneMismatch, match="of the backbone pico@other, expected pico@"):
        audit(registry, CLIENT, gold=other)


def test_a_gold_run_on_another_device_is_as_good(data, tmp_path):
    registry = federate(tmp_path / "registry", config_of(data, **QUICK))
    config = config_of(data, **QUICK, device="cpu")
    gold = federate(tmp_path / "gold", config, without=[CLIENT])
    check_gold(registry, gold, CLIENT)


def test_images_that_the_client_was_not_trained_on_are_refused(registry, tmp_path):
    other = noise(tmp_path / "other.npz", train=15)
    with pytest.raises(DataError, match=r"': 15.*but it was trained on .*': 16"):
        audit(registry, CLIENT, data=f"npz:{other}")


def test_counts_under_noise_need_not_be_those_of_the_images(registry, tmp_path):
    config = config_of(f"npz:{noise(tmp_path / 'other.npz', train=15)}", **QUICK, dp_noise=1.0)
    assert audited_images(registry.contribution(CLIENT), registry.backbone.load(), config).train


def test_data_without_the_client_is_refused(registry, tmp_path):
    data = shades_of_grey(tmp_path / "images")
    with pytest.raises(DataError, match="has no client 'client-1'"):
        audit(registry, CLIENT, data=data)


def test_images_of_others_that_are_not_at_hand_are_mentioned(tmp_path):
    config = config_of(shades_of_grey(tmp_path / "images"), **QUICK)
    registry = federate(tmp_path / "registry", config)
    shutil.rmtree(tmp_path / "images" / "bob")
    shutil.rmtree(tmp_path / "images" / "eve")
    found = audit(registry, "ada", shadows=4)
    assert found["accuracy"]["remaining"] == {}
    assert "No images were at hand of bob, eve." in found["notes"]
