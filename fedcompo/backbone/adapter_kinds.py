r"""What each kind of PEFT's adapters computes, as a change of a backbone's target weights.

LoRA is :math:`\Delta = sBA`, with s = α/r, or α/√r in rsLoRA. Rank and α may differ by layer. The
factor goes into B. Of separate query, key and value, the fused weight has

.. math:: A = \begin{pmatrix} A_q \\ A_k \\ A_v \end{pmatrix}, \qquad
   B = \begin{pmatrix} s_q B_q & & \\ & s_k B_k & \\ & & s_v B_v \end{pmatrix},

exactly, with the ranks added up; a part without an adapter has no rank. What PEFT can do beyond
that (DoRA, trained biases, layers repeated, …) makes another function of the weights.

(IA)³ multiplies a layer's outputs, or the inputs of a feed-forward layer, by trained scales:

.. math:: y = l_{out} \odot (Wx + b) \qquad\text{or}\qquad y = W(l_{in} \odot x) + b

So :math:`\tau = W \odot (l_{out} - 1)` by rows, which is our own (IA)³, or
:math:`\tau = W \odot (l_{in} - 1)` by columns, which is not: with such a layer all weights travel
as ``full``. Scales of outputs change the bias too, which a contribution cannot; it is named in what
else the source changed. The shape of ``ia3_l`` says which it is: (out, 1) or (1, in).
Source: Liu et al., arXiv 2205.05638.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedcompo.backbone.backbone import Backbone
from fedcompo.config.choices import Kind
from fedcompo.errors import BackboneError
from fedcompo.method.task_vector import TaskVector


@dataclass(frozen=True)
class Adapted:
    """One layer of the adapter's model."""

    layer: str
    """Its name in that model."""
    part: int | None
    """0, 1 or 2 if it is the query, key or value of a fused weight."""
    tensors: dict[str, Tensor]
    """What the adapter has for it, such as ``lora_A.weight`` or ``ia3_l``."""

    def rows(self, out: int) -> slice:
        """Rows that it is of a target weight with so many."""
        if self.part is None:
            return slice(0, out)
        third = out // 3
        return slice(self.part * third, (self.part + 1) * third)


Layers = Mapping[str, list[Adapted]]
"""By target weight: one layer, or up to three of a fused one."""


def check_lora(config: Mapping[str, Any]) -> None:
    """Raise ``ValueError``, ``TypeError``, ``KeyError`` or ``re.error`` at what PEFT cannot use."""
    patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    ranks = config["r"], *patterns[0].values()
    alphas = config["lora_alpha"], *patterns[1].values()
    for pattern in (key for keys in patterns for key in keys):
        re.compile(pattern)
    if not all(type(r) is int and r > 0 for r in ranks):
        raise ValueError(f"ranks {ranks}, expected positive integers")
    if not all(type(alpha) in (int, float) for alpha in alphas):
        raise ValueError(f"alphas {alphas}, expected numbers")


def of_lora(config: Mapping[str, Any], layers: Layers, backbone: Backbone) -> TaskVector:
    """Return the task vector, of kind ``lora``; raises ``BackboneError`` if shapes do not fit."""
    factors: dict[str, Tensor] = {}
    for name, weight in backbone.theta_0.items():
        out, width = weight.shape
        pieces = [_scaled(config, own, weight) for own in layers.get(name, [])]
        a = torch.cat([a for a, _ in pieces] or [torch.zeros(1, width)])
        b = torch.cat([b for _, b in pieces] or [torch.zeros(out, 1)], 1)
        if len(a) > min(out, width):  # as many as the weight has will do
            delta = b @ a
            a, b = (torch.eye(width), delta) if out >= width else (delta, torch.eye(out))
            a, b = a.contiguous(), b.contiguous()
        factors |= {f"{name}/A": a, f"{name}/B": b}
    return TaskVector(Kind.LORA, factors, backbone.fingerprint)


def _scaled(config: Mapping[str, Any], own: Adapted, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A (rank, in) and sB (out, rank) of one layer; zero outside of its rows."""
    out, width = weight.shape
    rows = own.rows(out)
    rank = _of_layer(config, "rank_pattern", "r", own.layer)
    alpha = _of_layer(config, "alpha_pattern", "lora_alpha", own.layer)
    a, b = (own.tensors.get(f"lora_{factor}.weight") for factor in "AB")
    shapes = [None if factor is None else tuple(factor.shape) for factor in (a, b)]
    expected = [(rank, width), (rows.stop - rows.start, rank)]
    if a is None or b is None or shapes != expected or "ia3_l" in own.tensors:
        raise BackboneError(
            f"The adapter's factors A, B of {own.layer!r} have shapes {shapes[0]}, {shapes[1]}, "
            f"expected {expected[0]}, {expected[1]} by its configuration and this backbone. "
            "It is an adapter for another model, or its configuration is another's."
        )
    placed = torch.zeros(out, rank)
    placed[rows] = b * (alpha / (rank**0.5 if config.get("use_rslora") else rank))
    return a, placed


def _of_layer(config: Mapping[str, Any], patterns: str, default: str, layer: str) -> Any:
    """A layer's rank or α: of the first pattern that fits the end of its name, as PEFT reads it."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return config[default]


def of_ia3(config: Mapping[str, Any], layers: Layers, backbone: Backbone) -> TaskVector:
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
    """Names of the biases that (IA)³'s scales of outputs change."""
    state, changed = backbone.model.state_dict(), set()
    for weight, parts in layers.items():
        bias = state.get(name := f"{weight.removesuffix('.weight')}.bias")
        for own in parts:
            scale = own.tensors.get("ia3_l")
            if bias is not None and scale is not None and scale.shape[1] == 1:
                piece = bias[own.rows(len(bias))].cpu()
                if not torch.equal(piece, piece * scale[:, 0]):
                    changed.add(name)
    return sorted(changed)


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
