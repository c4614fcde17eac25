r"""The trainable change :math:`\Delta` of one weight matrix: one class for each kind.

A kind is a module whose ``forward`` returns :math:`\Delta`; autograd does the rest. A client
trains, sends and stores its parameters. At the start :math:`\Delta = 0`.

Source: Porrello et al., *A Second-Order Perspective on Model Compositionality and Incremental
Learning*, ICLR 2025 (arXiv 2405.16350), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedcompo.config.choices import Kind

Weights = dict[str, Tensor]
"""Tensors under timm's own parameter names."""


class Full(nn.Module):
    r""":math:`\Delta` itself, dense, (out, in); of tangents a direction.

    In that the features are linearised around θ₀; see :mod:`fedcompo.backbone.tangent`.
    """

    sized = frozenset({"delta"})

    def __init__(self, weight: Tensor, rank: int = 0, generator: torch.Generator | None = None):
        """Start at zero, in the shape of the weight; ``rank`` and ``generator`` are not used."""
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(weight))

    def forward(self) -> Tensor:
        """Return the change, (out, in)."""
        return self.delta


class LoRA(nn.Module):
    r""":math:`\Delta = BA`, with A (rank, in) and B (out, rank). B starts at zero, so Δ does too.

    Source: Hu et al., arXiv 2106.09685; but without its factor α/r, as the learning rate is enough.
    """

    sized = frozenset({"B"})

    def __init__(self, weight: Tensor, rank: int = 16, generator: torch.Generator | None = None):
        """Draw A uniformly from ±1/√in, as Kaiming's initialisation with a = √5.

        Args:
            weight: The pre-trained weight, (out, in).
            rank: Columns of B; at most min(out, in).
            generator: Source of A; on the CPU.
        """
        super().__init__()
        out, width = weight.shape
        rank = min(rank, out, width)
        bound = 1 / math.sqrt(width)
        factor = (2 * torch.rand(rank, width, generator=generator) - 1) * bound
        self.A = nn.Parameter(factor.to(weight))
        self.B = nn.Parameter(weight.new_zeros(out, rank))

    def forward(self) -> Tensor:
        """Return the change, (out, in)."""
        return self.B @ self.A


class IA3(nn.Module):
    r""":math:`\Delta = W_0 \odot (l - 1)`: one scale l per output row, starting at 1."""

    sized: frozenset[str] = frozenset()

    def __init__(self, weight: Tensor, rank: int = 0, generator: torch.Generator | None = None):
        """Start at l = 1, (out, 1); ``rank`` and ``generator`` are not used."""
        super().__init__()
        self.weight = weight.detach()  # a constant, (out, in), not a part of the module's state
        self.l = nn.Parameter(weight.new_ones(weight.shape[0], 1))

    def forward(self) -> Tensor:
        """Return the change, (out, in)."""
        return self.weight * (self.l - 1)


Delta = Full | LoRA | IA3
"""``sized`` names the parameters that Δ is proportional to, in the unit of the weight."""
KINDS: Mapping[Kind, type[Full] | type[LoRA] | type[IA3]] = {
    Kind.FULL: Full,
    Kind.LORA: LoRA,
    Kind.IA3: IA3,
    Kind.TANGENT: Full,
}


def rank_of(name: str, rank: int) -> int:
    """Return the rank of a weight's LoRA: three times it for a fused qkv, which is 3 matrices."""
    return 3 * rank if "qkv" in name.split(".") else rank


def new_deltas(
    kind: Kind, theta_0: Weights, *, rank: int, generator: torch.Generator
) -> dict[str, Delta]:
    """Make one untrained delta for each target weight, (out, in), by name; each returns zeros.

    A LoRA's A is drawn in the order of names; see :func:`rank_of` for its rank.
    """
    return {
        name: KINDS[kind](theta_0[name], rank_of(name, rank), generator) for name in sorted(theta_0)
    }


def restore_delta(kind: Kind, weight: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """Compute the change of a pre-trained weight, (out, in), with the formula of training.

    Its stored parameters are by name, such as ``A`` and ``B`` of a LoRA.

    Returns:
        (out, in), in the dtype and on the device of ``weight``.
    """
    delta = KINDS[kind](weight, rank=1, generator=torch.Generator())
    for name, _ in list(delta.named_parameters()):
        setattr(delta, name, nn.Parameter(parameters[name].to(weight), requires_grad=False))
    with torch.no_grad():
        return delta()  # type: ignore[no-any-return]


def stored_shapes(kind: Kind, weight: Tensor) -> dict[str, tuple[int | None, ...]]:
    """Return the shapes of a weight's stored parameters; None stands for any rank."""
    out, width = weight.shape
    if kind == Kind.LORA:
        return {"A": (None, width), "B": (out, None)}
    return {"l": (out, 1)} if kind == Kind.IA3 else {"delta": (out, width)}
