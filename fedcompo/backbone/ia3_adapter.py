r"""PEFT's (IA)³: a layer's outputs, or the inputs of a feed-forward layer, times trained scales.

.. math:: y = l_{out} \odot (Wx + b) \qquad\text{or}\qquad y = W(l_{in} \odot x) + b

So :math:`\tau = W \odot (l_{out} - 1)` by rows, which is our own (IA)³, or
:math:`\tau = W \odot (l_{in} - 1)` by columns, which is not: with such a layer all weights travel
as ``full``. Scales of outputs change the bias too, which a contribution cannot; it is named in what
else the source changed. The shape of ``ia3_l`` says which it is: (out, 1) or (1, in).
Source: Liu et al., arXiv 2205.05638.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedcompo.backbone.adapted import Adapted, Layers
from fedcompo.backbone.backbone import Backbone
from fedcompo.config.choices import Kind
from fedcompo.errors import BackboneError
from fedcompo.method.task_vector import TaskVector

HARMLESS = {"feedforward_modules", "init_ia3_weights"}
"""Keys that the shapes of the tensors tell too, or that only start a training."""
ALLOWED: dict[str, tuple[Any, ...]] = {}


def check(config: Mapping[str, Any]) -> None:
    """Any configuration that PEFT writes will do."""


def converted(config: Mapping[str, Any], layers: Layers, backbone: Backbone) -> TaskVector:
    """Return the task vector, of kind ``ia3`` or ``full``; raises ``BackboneError`` if not fit."""
    scales = {
        name: _scales(layers.get(name, []), weight) for name, weight in backbone.theta_0.items()
    }
    if all(scale.shape[1] == 1 for scale in scales.values()):
        tensors = {f"{name}/l": scale for name, scale in scales.items()}
        return TaskVector(Kind.IA3, tensors, backbone.fingerprint)
    tensors = {f"{n}/delta": w.cpu() * (scales[n] - 1) for n, w in backbone.theta_0.items()}
    return TaskVector(Kind.FULL, tensors, backbone.fingerprint)


def scaled_biases(layers: Layers, backbone: Backbone) -> list[str]:
    """Names of the biases that scales of outputs change."""
    state = backbone.model.state_dict()
    changed = []
    for name, parts in layers.items():
        bias = state.get(f"{name.removesuffix('.weight')}.bias")
        for own in parts if bias is not None else ():
            scale = own.tensors.get("ia3_l")
            assert bias is not None
            if scale is not None and scale.shape[1] == 1:
                piece = bias[own.rows(len(bias))].cpu()
                if not torch.equal(piece, piece * scale[:, 0]):
                    changed.append(f"{name.removesuffix('.weight')}.bias")
                    break
    return changed


def _scales(parts: list[Adapted], weight: Tensor) -> Tensor:
    """The factors of a weight: (out, 1), or (out, in) if an input is scaled."""
    out, width = weight.shape
    scale = torch.ones(out, 1)
    for own in parts:
        rows = own.rows(out)
        height = rows.stop - rows.start
        given = own.tensors.get("ia3_l")
        if given is None or tuple(given.shape) not in ((height, 1), (1, width)):
            raise BackboneError(
                f"The adapter's scales of {own.layer!r} have shape "
                f"{None if given is None else tuple(given.shape)}, expected {(height, 1)} of "
                f"outputs or {(1, width)} of inputs, by this backbone."
            )
        if given.shape[0] == 1 and width > 1:
            scale = scale.expand(out, width).clone()
        scale[rows] = scale[rows] * given
    return scale
