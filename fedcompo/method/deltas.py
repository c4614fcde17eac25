r"""The trainable change :math:`\Delta` of one weight matrix: one class for each kind.

A kind is a module whose ``forward`` returns :math:`\Delta`; autograd does the rest. A client
trains, sends and stores its parameters. At the start :math:`\Delta = 0`. In training a kind also
says what a linear layer needs (:mod:`fedcompo.backbone.merged`), which is tested against autograd:

- ``merged(base, scale)``: :math:`W + s\Delta`, (out, in), in one pass, without a graph;
- ``gradients(g, x, scale)``: those of its parameters, in their order, from g, (tokens, out), that
  of a linear layer's output, and x, (tokens, in), its input. That of the weight is
  :math:`g^\top x`.

Source: Porrello et al., *A Second-Order Perspective on Model Compositionality and Incremental
Learning*, ICLR 2025 (arXiv 2405.16350), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
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

    def merged(self, base: Tensor, scale: float) -> Tensor:
        r"""Return :math:`W + s\Delta`."""
        return torch.add(base, self.delta.detach(), alpha=scale)

    def gradients(self, g: Tensor, x: Tensor, scale: float) -> list[Tensor]:
        r"""Return :math:`s\,g^\top x`."""
        gradient = (g.T @ x).to(self.delta)
        return [gradient if scale == 1 else scale * gradient]


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

    def merged(self, base: Tensor, scale: float) -> Tensor:
        r"""Return :math:`W + s BA`."""
        return torch.addmm(base, self.B.detach(), self.A.detach(), alpha=scale)

    def gradients(self, g: Tensor, x: Tensor, scale: float) -> list[Tensor]:
        r"""Return :math:`s\,(gB)^\top x` and :math:`s\,g^\top (x A^\top)`.

        Of a product of a tall and a thin matrix, the thin one goes first: CPUs are faster then.
        """
        down = F.linear(x, self.A.detach().to(x))  # (tokens, rank)
        up = F.linear(g, self.B.detach().T.to(g).contiguous())
        return [(scale * (up.T @ x)).to(self.A), (scale * (down.T @ g)).T.to(self.B)]


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

    def merged(self, base: Tensor, scale: float) -> Tensor:
        r"""Return :math:`W + s W_0 \odot (l - 1)`."""
        return torch.addcmul(base, self.weight, self.l.detach() - 1, value=scale)

    def gradients(self, g: Tensor, x: Tensor, scale: float) -> list[Tensor]:
        r"""Return the sums of the rows of :math:`s\,(g^\top x) \odot W_0`."""
        return [scale * ((g.T @ x).to(self.weight) * self.weight).sum(1, keepdim=True)]


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
