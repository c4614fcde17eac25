"""One client's part of a round of FedAvg or FedProx: the model that all share, trained a while."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from clients import outgoing
from clients.local import LocalClient
from fedcompo.config.choices import Kind
from fedcompo.data.client_data import Split
from fedcompo.messages.body import Body
from fedcompo.method.heads import Head, head_from
from fedcompo.method.task_vector import TaskVector
from fedcompo.seeds import generator_for
from fedcompo.storage.tensorfile import section
from fedcompo.training.accuracy import evaluate
from fedcompo.training.fit import Course, fit_task_vector

logger = logging.getLogger(__name__)

ROUND = "server-round"
"""What Flower's strategies call the number of the round, from 1; no other request has it."""
PROXIMAL = "proximal-mu"
"""What Flower's FedProx calls its strength."""


def train(client: LocalClient, tensors: Mapping[str, Tensor], request: Mapping[str, Any]) -> Body:
    """Train the shared model on, by cross-entropy over the classes of all clients.

    Nothing but FedProx's term holds it: neither an anchor, nor a penalty of the head. Of the cosine
    schedule, which runs over all rounds, a round is one part.

    Args:
        client: Whose images these are.
        tensors: The shared task vector's parameters, and the joint head.
        request: Kind, classes of the joint head, number of the round and of all rounds.

    Returns:
        The same tensors, trained; losses; in the first round the frozen backbone's accuracy.
    """
    number, rounds = int(request[ROUND]), int(request["rounds"])
    joint = head_from(tensors, request["classes"])
    kind, base = Kind(request["kind"]), client.backbone.fingerprint
    course = Course(
        TaskVector(kind, section("task_vector", tensors), base),
        passed=(number - 1) / rounds,
        share=1 / rounds,
        proximal_mu=float(request.get(PROXIMAL, 0.0)),
    )
    own, train = joint.indices(client.data.classes), client.data.train
    fitted = fit_task_vector(
        client.backbone,
        kind,
        Split(train.images, own[train.labels]),
        joint,
        joint,
        None,
        replace(client.config.train, head_alpha=0.0, head_decay=0.0),
        generator=generator_for(client.config.seed, "train", client.name, str(number)),
        course=course,
        on_epoch=lambda *told: logger.info("%s: epoch %d of %d, loss %.4f", client.name, *told),
    )
    body, _, told = outgoing.trained(fitted, client.backbone, client.config.caps)
    manifest = {
        "content": "train",
        "kind": str(kind),
        "base": base,
        "losses": list(fitted.losses),
        **(_frozen(client, joint) if number == 1 else {}),
        **told,
    }
    return body, manifest


def _frozen(client: LocalClient, joint: Head) -> dict[str, float]:
    """Accuracy of the pre-trained backbone under the head that all start from."""
    found = evaluate(client.backbone, {}, joint, client.data.classes, client.data.test)
    return {
        "frozen_class_il_accuracy": found.class_il,
        "frozen_task_il_accuracy": found.task_il,
    }
