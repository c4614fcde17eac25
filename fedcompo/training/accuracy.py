"""Accuracy of a model on one client's images, among all classes and among the client's own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.tangent import feature_map
from fedcompo.data.client_data import Split
from fedcompo.method.deltas import Weights
from fedcompo.method.features import extract_features
from fedcompo.method.heads import Head
from fedcompo.report.confusion import BINS, Tally

AT_A_TIME = 4096
"""Images whose logits are in memory: 16 MB for 1,000 classes."""


@dataclass(frozen=True)
class Accuracy:
    """Shares of correctly classified images, in [0, 1], and the counts behind them."""

    class_il: float
    """Arg max over the classes of all clients."""
    task_il: float
    """Arg max over the client's own classes."""
    num_examples: int
    tally: Tally
    """Of the arg max over all classes."""


def accuracy_of(
    backbone: Backbone,
    theta: Weights,
    head: Head,
    classes: tuple[str, ...],
    data: Split,
    *,
    linearised: bool = False,
) -> Accuracy:
    """Classify a client's images under one head; see :func:`accuracies_of`."""
    (accuracy,) = accuracies_of(backbone, theta, [head], classes, data, linearised=linearised)
    return accuracy


def accuracies_of(
    backbone: Backbone,
    theta: Weights,
    heads: Sequence[Head],
    classes: tuple[str, ...],
    data: Split,
    *,
    linearised: bool = False,
) -> list[Accuracy]:
    """Classify a client's images under each of several heads, and compare with their labels.

    Args:
        backbone: Pre-trained weights.
        theta: Target weights to use in their place, by name, each (out, in).
        heads: Each must have all of the client's classes, and may have more.
        classes: The client's classes, which ``data.labels`` index.
        data: Images and labels; of none, accuracy is NaN.
        linearised: Whether the weights are composed of tangents.
    """
    features = extract_features(feature_map(backbone, theta, tangent=linearised), data.images)
    return [_under(head, features, data.labels, classes) for head in heads]


def _under(head: Head, features: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Accuracy:
    """Classify by a head.

    Args:
        head: Of these classes, and perhaps of more.
        features: (count, features).
        labels: (count,), index into ``classes``.
        classes: The client's.
    """
    own, pairs, own_hits = head.indices(classes), Counter[tuple[int, int]](), 0
    bins = torch.zeros(3, BINS, dtype=torch.float64)  # images, their confidence, right ones
    parts = (torch.split(tensor, AT_A_TIME) for tensor in (features, labels))
    for part, given in zip(*parts, strict=True):
        logits, true = head(part).cpu(), own[given]  # (part, classes of the head), (part,)
        taken = logits.argmax(1)
        pairs.update(zip(true.tolist(), taken.tolist(), strict=True))
        own_hits += int((logits[:, own].argmax(1) == given).sum())
        confidence = logits.double().softmax(1).amax(1)
        number = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
        counted = torch.ones_like(confidence), confidence, (taken == true).double()
        bins += torch.stack([torch.bincount(number, values, BINS) for values in counted])
    confusion: dict[str, dict[str, int]] = {}
    for (true_row, taken_row), count in sorted(pairs.items()):
        row_of = confusion.setdefault(head.classes[true_row], {})
        row_of[head.classes[taken_row]] = count
    tally = Tally(confusion, tuple((int(n), float(c), int(r)) for n, c, r in bins.T.tolist()))
    count = len(labels)
    right, right_of_own = (n / count if count else math.nan for n in (tally.correct, own_hits))
    return Accuracy(right, right_of_own, count, tally)
