"""Accuracy of a model on one client's images, counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from builders import pico_backbone, pixels, random_head, random_like, rng
from hypothesis import given
from hypothesis import strategies as st

from fedcompo.backbone.backbone import Backbone
from fedcompo.data.client_data import Split
from fedcompo.method.heads import Head
from fedcompo.training.accuracy import accuracy_of

CLASSES = ("left", "right")


def by_hand(backbone: Backbone, head: Head, classes: tuple[str, ...], data: Split):
    """Oracle: one image at a time, classes by name."""
    class_il = task_il = 0
    for image, label in zip(data.images, data.labels, strict=True):
        feature = backbone.forward({})(image.unsqueeze(0))[0]
        logits = {
            name: float(head.weight[i] @ feature + head.bias[i])
            for i, name in enumerate(head.classes)
        }
        class_il += max(logits, key=logits.get) == classes[label]
        task_il += max(classes, key=logits.get) == classes[label]
    return class_il / len(data.labels), task_il / len(data.labels)


@given(
    seed=st.integers(0, 999),
    num_classes=st.integers(2, 5),
    owned=st.integers(1, 5),
    count=st.integers(1, 12),
)
def test_accuracies_are_those_counted_by_hand_and_fewer_classes_are_never_harder(
    seed, num_classes, owned, count
):
    backbone = pico_backbone()
    names = tuple("abcde"[:num_classes])
    order = torch.randperm(num_classes, generator=rng(seed))[: min(owned, num_classes)]
    classes = tuple(sorted(names[i] for i in order))
    head = random_head(names, 8, seed=seed)
    labels = torch.randint(0, len(classes), (count,), generator=rng(seed))
    data = Split(pixels(count, 1, 8, seed=seed), labels)
    found = accuracy_of(backbone, {}, head, classes, data)
    assert (found.class_il, found.task_il) == pytest.approx(by_hand(backbone, head, classes, data))
    assert 0 <= found.class_il <= found.task_il <= 1
    assert found.num_examples == count


def test_a_model_is_evaluated_under_the_weights_it_is_given():
    backbone, head = pico_backbone(), random_head(CLASSES, 8, seed=1)
    change = random_like(backbone.theta_0, seed=2)
    theta = {name: weight + change[name] for name, weight in backbone.theta_0.items()}
    data = Split(pixels(200, 1, 8), torch.zeros(200).long())
    under_theta = accuracy_of(backbone, theta, head, CLASSES, data)
    under_theta_0 = accuracy_of(backbone, backbone.theta_0, head, CLASSES, data)
    assert under_theta_0 == accuracy_of(backbone, {}, head, CLASSES, data)
    assert under_theta != under_theta_0


def test_no_images_have_no_accuracy():
    empty = Split(pixels(1, 1, 8)[:0], torch.zeros(0).long())
    head = random_head(CLASSES, 8, seed=1)
    found = accuracy_of(pico_backbone(), {}, head, CLASSES, empty)
    assert math.isnan(found.class_il)
    assert math.isnan(found.task_il)
    assert found.num_examples == 0
