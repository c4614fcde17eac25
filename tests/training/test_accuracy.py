"""Accuracy of a model on one client's images, and the counts behind it, by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from builders import pico_backbone, pixels, random_head, random_like, rng
from hypothesis import given
from hypothesis import strategies as st

from fedcompo.backbone.backbone import Backbone
from fedcompo.data.client_data import Split
from fedcompo.method.heads import Head
from fedcompo.report.confusion import BINS
from fedcompo.training import accuracy
from fedcompo.training.accuracy import accuracy_of

CLASSES = ("left", "right")


def by_hand(backbone: Backbone, head: Head, classes: tuple[str, ...], data: Split):
    """Oracle: one image at a time, classes by name; in float64 how sure it is."""
    class_il = task_il = 0
    pairs, bins = Counter(), [[0, 0.0, 0] for _ in range(BINS)]
    for image, label in zip(data.images, data.labels, strict=True):
        feature = backbone.forward({})(image.unsqueeze(0))[0]
        logits = {
            name: float(head.weight[i] @ feature + head.bias[i])
            for i, name in enumerate(head.classes)
        }
        taken = max(logits, key=logits.get)
        class_il += taken == classes[label]
        pairs[classes[label], taken] += 1
        sure = math.exp(logits[taken]) / sum(math.exp(logit) for logit in logits.values())
        own = next(own for n, own in enumerate(bins) if n / BINS < sure <= (n + 1) / BINS)
        own[:] = own[0] + 1, own[1] + sure, own[2] + (taken == classes[label])
        task_il += max(classes, key=logits.get) == classes[label]
    return class_il / len(data.labels), task_il / len(data.labels), pairs, bins


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "AT_A_TIME", 5)
        found = accuracy_of(backbone, {}, head, classes, data)
    class_il, task_il, pairs, bins = by_hand(backbone, head, classes, data)
    assert (found.class_il, found.task_il) == pytest.approx((class_il, task_il))
    rows = found.tally.confusion.items()
    assert {(name, other): n for name, row in rows for other, n in row.items()} == pairs
    for own, expected in zip(found.tally.bins, bins, strict=True):
        assert own == pytest.approx(expected, abs=1e-4)
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
    assert found.num_examples == found.tally.images == 0
