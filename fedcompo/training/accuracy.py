"""Class-incremental and task-incremental accuracy of a model on one client's images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.tangent import feature_map
from fedcompo.data.client_data import Split
from fedcompo.method.deltas import Weights
from fedcompo.method.features import extract_features
from fedcompo.method.heads import Head


@dataclass(frozen=True)
class Accuracy:
    """Shares of correctly classified images, in [0, 1]."""

    class_il: float
    """Arg max over the classes of all clients."""
    task_il: float
    """Arg max over the client's own classes."""
    num_examples: int


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
    accuracies = []
    for head in heads:
        logits, own = head(features), head.indices(classes)
        right = logits.argmax(1) == own[data.labels]
        right_of_own = logits[:, own].argmax(1) == data.labels
        accuracies.append(Accuracy(_share(right), _share(right_of_own), len(data.labels)))
    return accuracies


def _share(hits: Tensor) -> float:
    return float(hits.double().mean()) if len(hits) else float("nan")
