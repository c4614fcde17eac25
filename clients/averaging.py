"""One client's part of a round of FedAvg or FedProx: train the shared model further."""

from __future__ import annotations

from clients import outgoing
from clients.local import LocalClient
from fedcompo.data.client_data import Split
from fedcompo.messages.answers import AveragingAnswer
from fedcompo.messages.requests import AveragingRequest
from fedcompo.method.task_vector import TaskVector
from fedcompo.seeds import generator_for
from fedcompo.training.fit import Course, fit_task_vector


def train(client: LocalClient, request: AveragingRequest) -> AveragingAnswer:
    """Train the shared model further, by cross-entropy over the classes of all clients.

    FedProx's term is the only penalty: there is no anchor. The cosine schedule runs over all
    rounds. No image is kept aside, as there is nothing to choose.
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
        client.config.train,
        generator=generator_for(client.config.seed, "train", client.name, str(number)),
        course=course,
    )
    tensors, _, caps = outgoing.trained(fitted, client.backbone, client.config.caps)
    return AveragingAnswer(base=base, tensors=tensors, kind=kind, losses=fitted.losses, caps=caps)
