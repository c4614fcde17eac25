"""From a request to the course of a training: where it starts, and what holds it."""

from __future__ import annotations

from fedcompo.messages.body import TASK_VECTOR
from fedcompo.messages.requests import ANCHOR, OWN, TrainRequest
from fedcompo.method.deltas import Weights
from fedcompo.method.fisher import expanded
from fedcompo.method.heads import head_from
from fedcompo.method.task_vector import TaskVector
from fedcompo.storage.tensorfile import section
from fedcompo.training.fit import Course
from fedcompo.training.penalty import Anchor, Ensemble


def course_of(
    request: TrainRequest,
    theta_0: Weights,
    *,
    base: str,
    classes: tuple[str, ...],
    beta: float,
    of_features: bool = False,
) -> Course:
    """Return the start of the training and its penalties.

    Args:
        request: With all that the client needs.
        theta_0: The target weights; only names and shapes are used.
        base: Fingerprint of the client's pre-trained weights.
        classes: The client's own; the head of a single one is not trained.
        beta: Strength of the penalty that holds it to the others.
        of_features: Whether the anchor is a Fisher of the features.
    """
    sent, others, part, fixed = request.sent, request.others, request.round, len(classes) == 1
    begin = head = None
    if OWN in sent:
        begin = TaskVector(request.kind, section(TASK_VECTOR, sent[OWN]), base)
        head = None if fixed else head_from(sent[OWN], classes)
    return Course(
        begin,
        head=head,
        fixed=fixed,
        anchor=Anchor(expanded(sent[ANCHOR], theta_0), of_features) if ANCHOR in sent else None,
        ensemble=Ensemble(others.rest, others.share, beta, others.scale) if others else None,
        passed=part.passed if part else 0.0,
        share=part.share if part else 1.0,
    )
