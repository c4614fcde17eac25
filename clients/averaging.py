"""One client's part of a round of FedAvg or FedProx: the model that all share, trained a while."""

from __future__ import annotations

import logging
from dataclasses import replace

from clients import outgoing
from clients.local import LocalClient
from fedcompo.data.client_data import Split
from fedcompo.messages.answers import AveragingAnswer
from fedcompo.messages.requests import AveragingRequest
from fedcompo.method.task_vector import TaskVector
from fedcompo.seeds import generator_for
from fedcompo.training.fit import Course, fit_task_vector

logger = logging.getLogger(__name__)


def train(client: LocalClient, request: AveragingRequest) -> AveragingAnswer:
    """Train the shared model on, by cross-entropy over the classes of all clients.

    Nothing but FedProx's term holds it: neither an anchor, nor a penalty of the head. Of the cosine
    schedule, which runs over all rounds, a round is one part.

    Args:
        client: Whose images these are.
        request: The shared task vector's parameters and the joint head; which round this is.

    Returns:
        The same tensors, trained; losses; in the first round the frozen backbone's accuracy.
    """
    number, joint = request.number, request.joint
    kind, base = request.kind, client.backbone.fingerprint
    course = Course(
        TaskVector(kind, request.task_vector, base),
        passed=(number - 1) / request.rounds,
        share=1 / request.rounds,
        proximal_mu=request.proximal_mu or 0.0,
    )
    own, train = joint.indices(client.data.classes), client.data.train
    fitted = fit_task_vector(
        client.backbone,
        kind,
        Split(train.images, own[train.labels]),
        joint,
        replace(client.config.train, head_alpha=0.0, head_decay=0.0),
        generator=generator_for(client.config.seed, "train", client.name, str(number)),
        course=course,
        on_epoch=lambda *told: logger.info("%s: epoch %d of %d, loss %.4f", client.name, *told),
    )
    frozen = client.measure({}, joint) if number == 1 else None
    tensors, _, caps = outgoing.trained(fitted, client.backbone, client.config.caps)
    return AveragingAnswer(
        base=base,
        tensors=tensors,
        kind=kind,
        losses=fitted.losses,
        caps=caps,
        frozen_class_il_accuracy=frozen.class_il if frozen else None,
        frozen_task_il_accuracy=frozen.task_il if frozen else None,
    )
