"""Training on all clients' images in one place: it is one client's training on their union."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from builders import pico_backbone, rng

from fedcompo.config.choices import Kind
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData, Split
from fedcompo.method.heads import zero_head
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


def test_it_learns_the_classes_of_all_clients(backbone, datas):
    longer = RunConfig.parse({**CONFIG.flat(), "local-epochs": 30})
    theta, head = joint.train_joint(backbone, datas, longer, Kind.FULL)
    for data in datas:
        assert accuracy_of(backbone, theta, head, data.classes, data.test).class_il > 0.8


def test_training_leaves_the_backbone_alone(backbone, datas):
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    joint.train_joint(backbone, datas, CONFIG, Kind.FULL)
    after = backbone.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
