"""Training on all clients' images in one place: it is one client's training on their union."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from builders import pico_backbone, rng

from fedcompo.composition.head import joint_head
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Kind
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData, Split
from fedcompo.method.features import extract_features
from fedcompo.method.heads import Head, zero_head
from fedcompo.method.statistics import FeatureSums
from fedcompo.seeds import generator_for
from fedcompo.training.accuracy import accuracy_of
from fedcompo.training.fit import fit_task_vector

sys.path.append(str(Path(__file__).resolve().parents[2] / "simulations" / "compare"))
joint = import_module("joint")

WHERE = {"left": (slice(None), slice(4)), "right": (slice(None), slice(4, None))}
WHERE |= {"top": (slice(4), slice(None)), "bottom": (slice(4, None), slice(None))}
OWNED = {"anna": {"left": 14, "right": 10}, "ben": {"bottom": 6, "left": 4, "top": 9}}
"""Training images by client and class; one class is both clients'."""
CONFIG = RunConfig.parse(
    {"rank": 2, "local-epochs": 3, "local-steps": 0, "batch-size": 8, "learning-rate": 0.02}
)


def split(counts: dict[str, int], *, seed: int) -> Split:
    """Grey 8x8 images, bright in one half."""
    images, labels = [], []
    for label, (name, count) in enumerate(counts.items()):
        drawn = torch.randint(0, 60, (count, 1, 8, 8), generator=rng(seed + label))
        drawn[:, :, *WHERE[name]] += 150
        images.append(drawn.to(torch.uint8))
        labels += [label] * count
    return Split(torch.cat(images), torch.tensor(labels))


@pytest.fixture(scope="module")
def datas() -> list[ClientData]:
    return [
        ClientData(
            client,
            tuple(counts),
            split(counts, seed=10 * i),
            split(dict.fromkeys(counts, 5), seed=50 + 10 * i),
        )
        for i, (client, counts) in enumerate(OWNED.items())
    ]


@pytest.fixture(scope="module")
def backbone():
    return pico_backbone()


def frozen_head(backbone, datas: list[ClientData]) -> Head:
    statistics = {}
    for data in datas:
        features = extract_features(backbone.forward({}), data.train.images)
        statistics[data.name] = FeatureSums.of(features, data.train.labels, data.classes)
    return joint_head(statistics, CompositionSettings.of(CONFIG))


@pytest.mark.parametrize("kind", list(Kind))
def test_it_is_training_on_the_union_with_labels_by_the_names_of_classes(backbone, datas, kind):
    start, images, labels = zero_head(("bottom", "left", "right", "top"), 8), [], []
    for data in datas:
        for image, label in zip(data.train.images, data.train.labels.tolist(), strict=True):
            images.append(image)
            labels.append(start.classes.index(data.classes[label]))
    expected = fit_task_vector(
        backbone,
        kind,
        Split(torch.stack(images), torch.tensor(labels)),
        start,
        CONFIG.train,
        generator=generator_for(CONFIG.seed, "train", "joint"),
    )
    theta, head = joint.train_joint(backbone, datas, CONFIG, kind)
    for name, change in expected.task_vector.dense(backbone.theta_0).items():
        assert torch.equal(theta[name], backbone.theta_0[name] + change)
    assert head.classes == start.classes
    assert torch.equal(head.weight, expected.head.weight)
    assert torch.equal(head.bias, expected.head.bias)


def test_it_makes_as_many_passes_as_clients_on_average(datas):
    assert joint.passes_of(datas, CONFIG) == 3
    floor = RunConfig.parse({**CONFIG.flat(), "local-steps": 18})
    assert [len(data.train.labels) for data in datas] == [24, 19]  # three steps each
    assert joint.passes_of(datas, floor) == 6


def test_statistics_are_of_the_images_that_clients_describe(backbone, datas):
    config = RunConfig.parse({**CONFIG.flat(), "aside": 0.25})
    everyone = joint.described(backbone, {}, datas, config, purpose="describe")
    kept = joint.described(backbone, {}, datas, config, purpose="realign")
    assert [own.counts.tolist() for own in everyone.values()] == [[14, 10], [6, 4, 9]]
    assert [own.counts.tolist() for own in kept.values()] == [[10, 8], [4, 4, 7]]
    mixed = RunConfig.parse({**CONFIG.flat(), "statistics": "mixtures"})
    mixtures = joint.described(backbone, {}, datas, mixed, purpose="describe")
    assert mixtures["ben"]["top"].num_examples == 9


def test_more_passes_may_be_asked_for(backbone, datas):
    theta, _ = joint.train_joint(backbone, datas, CONFIG, Kind.IA3)
    same, _ = joint.train_joint(backbone, datas, CONFIG, Kind.IA3, epochs=3)
    longer, _ = joint.train_joint(backbone, datas, CONFIG, Kind.IA3, 4)
    assert all(torch.equal(same[name], theta[name]) for name in theta)
    assert all(not torch.equal(longer[name], theta[name]) for name in theta)


def test_it_learns_the_classes_of_all_clients(backbone, datas):
    theta, head = joint.train_joint(backbone, datas, CONFIG, Kind.FULL, epochs=30)
    trained = joint.measured(backbone, theta, head, datas)
    assert trained["class_il_accuracy"] > 0.95


def test_what_is_measured_is_every_clients_accuracy_and_their_mean(backbone, datas):
    head = frozen_head(backbone, datas)
    figures = joint.measured(backbone, {}, head, datas)
    assert list(figures["per_client"]) == list(OWNED)
    for key, attribute in (("class_il_accuracy", "class_il"), ("task_il_accuracy", "task_il")):
        found = [
            getattr(accuracy_of(backbone, {}, head, d.classes, d.test), attribute) for d in datas
        ]
        assert [figures["per_client"][d.name][key] for d in datas] == found
        assert figures[key] == pytest.approx(sum(found) / len(found))


def test_training_leaves_the_backbone_alone(backbone, datas):
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    joint.train_joint(backbone, datas, CONFIG, Kind.FULL, epochs=1)
    after = backbone.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
