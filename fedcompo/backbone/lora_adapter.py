r"""PEFT's LoRA: :math:`\Delta = sBA`, with s = α/r, or α/√r in rsLoRA.

Rank and α may differ by layer. The factor goes into B. Of separate query, key and value, the fused
weight has

.. math:: A = \begin{pmatrix} A_q \\ A_k \\ A_v \end{pmatrix}, \qquad
   B = \begin{pmatrix} s_q B_q & & \\ & s_k B_k & \\ & & s_v B_v \end{pmatrix},

exactly, with the ranks added up; a part without an adapter has no rank. What PEFT can do beyond
that (DoRA, trained biases, layers repeated, …) makes another function of the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedcompo.backbone.adapted import Adapted, Layers
from fedcompo.backbone.backbone import Backbone
from fedcompo.config.choices import Kind
from fedcompo.errors import BackboneError
from fedcompo.method.task_vector import TaskVector

HARMLESS = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("lora_dropout", "ensure_weight_tying", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "qalora_group_size"),
}
"""Keys that are converted, or change nothing; see :mod:`fedcompo.backbone.adapter`."""
ALLOWED = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian")}
"""Keys of which some values are converted. Other ways to initialise may change the base weights."""


def check(config: Mapping[str, Any]) -> None:
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


def converted(config: Mapping[str, Any], layers: Layers, backbone: Backbone) -> TaskVector:
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
    if a is None or b is None or shapes != expected or own.tensors.keys() & {"ia3_l"}:
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
