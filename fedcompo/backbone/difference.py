r"""Reads a file that holds a difference :math:`\theta - \theta_0`, not a model.

Such files look like checkpoints: names and shapes are the same. Nothing in them says what they are.
So whoever imports one says it, and the lengths of the weights must agree.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.checkpoint import require_finite
from fedcompo.backbone.finetuned import MODEL_FROM, FineTuned, length, read_source
from fedcompo.backbone.foreign_names import within
from fedcompo.config.choices import Kind
from fedcompo.errors import BackboneError
from fedcompo.method.deltas import Weights
from fedcompo.method.task_vector import TaskVector


def read_difference(source: Path, backbone: Backbone) -> FineTuned:
    """Read a difference; a weight that it does not hold is unchanged.

    Args:
        source: As for :func:`~fedcompo.backbone.finetuned.read_finetuned`.
        backbone: The pre-trained weights it is a difference to.

    Returns:
        A task vector of kind ``full``. A classifier is no part of the pre-trained weights, so that
        nobody knows what it is a difference to; it counts to the rest.

    Raises:
        BackboneError: If the source cannot be read, fits other weights, or holds a model.
    """
    path, state = read_source(source, backbone)
    require_finite(state)
    found = {within(name): tensor.float() for name, tensor in state.items()}
    if len(found) < len(state):
        raise BackboneError(
            f"{path} holds several models: names differ only in what stands before `blocks.`. "
            "Save the difference of the one you want in a file of its own."
        )
    start = backbone.model.state_dict()
    own = backbone.theta_0
    if own.keys().isdisjoint(found):
        raise BackboneError(
            f"{path} holds no target weight of {backbone.name!r}, only "
            f"{', '.join(sorted(state)[:3])}. Import it into a registry of its model."
        )
    tau: Weights = {}
    for name, weight in own.items():
        tensor = found.get(name, torch.zeros(weight.shape))
        if tensor.shape != weight.shape:
            raise BackboneError(
                f"{name!r} of {path} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(weight.shape)} as in {backbone.name!r}, which the registry's weights are."
            )
        tau[name] = tensor
    if not (share := length(tau) / length(own)) < MODEL_FROM:
        raise BackboneError(
            f"{path} is no difference to {backbone.name!r}: its weights are as long as {share:.2g} "
            f"of the pre-trained ones, expected below {MODEL_FROM}. If it holds a model, leave "
            "`--delta` out."
        )
    rest = (n for n, t in found.items() if n not in own and (n not in start or bool(t.any())))
    tensors = {f"{name}/delta": tensor for name, tensor in tau.items()}
    vector = TaskVector(Kind.FULL, tensors, backbone.fingerprint)
    return FineTuned(vector, None, (), tuple(sorted(rest)))
