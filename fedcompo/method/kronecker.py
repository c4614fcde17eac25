r"""The Fisher of a weight as a Kronecker product: which rows and columns act *together*.

With :math:`M_x` the gradient of :math:`\langle z, f(x)\rangle` with respect to a weight (out, in),
its block of :math:`J^\top J` is :math:`\sum_x \mathrm{vec}(M_x)\,\mathrm{vec}(M_x)^\top`, which

.. math:: \frac{G \otimes A}{\sqrt{\mathrm{tr}\,G\;\mathrm{tr}\,A}}, \qquad
          G = \sum_x M_x M_x^\top, \quad A = \sum_x M_x^\top M_x

stands for. It has the block's partial traces and its trace, and is exact where the block is a
Kronecker product. It is one step of the power iteration for the nearest one, from the identity.
The diagonals of G, (out, out), and A, (in, in), are the row and column sums of the factored form.

G and A are symmetric and not negative, and sums of them add up. What is sent and stored of a matrix
is *thin*: a root :math:`d` and :math:`V`, (dim, k), of few columns, in one tensor [d, V]:

.. math:: \mathrm{diag}(d)^2 + V V^\top

V holds the leading directions, d what the diagonal lacks then: diagonal and trace are kept. No
rounding of the tensor, and nothing that a client may send, makes the matrix negative.

Sources: Morwani et al., *A New Perspective on Shampoo's Preconditioner*, 2024 (arXiv 2406.17748);
Martens & Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate Curvature*, ICML
2015 (arXiv 1503.05671); Gittens & Mahoney, *Revisiting the Nyström Method*, 2016, for V.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedcompo.method.deltas import IA3, Delta, Full, LoRA

LEFT, RIGHT = "/left", "/right"
"""Ends of the names of a weight's two factors."""
RANK = 8
"""Columns of V."""
ITERATIONS = 6
"""Of the search for the leading directions."""


def thin_shape(dim: int) -> tuple[int, int]:
    """Return the shape of a thin factor: never square, and small ones lose nothing."""
    return dim, 1 + (RANK if dim > RANK + 1 else dim)


def thinned(factor: Tensor) -> Tensor:
    """Return a matrix in its thin form, float64; one that is thin already as it is.

    V spans the leading directions, by subspace iteration, as Nyström's approximation: it is never
    more than the matrix, so that what the diagonal lacks is not negative.

    Args:
        factor: Symmetric, not negative, (dim, dim).
    """
    if factor.shape[0] != factor.shape[1]:
        return factor
    matrix = factor.double()
    shape = matrix.shape[0], thin_shape(len(matrix))[1] - 1
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = start.to(matrix.device)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis)[0]
    image = matrix @ basis
    values, vectors = torch.linalg.eigh(basis.mT @ image)
    kept = values > 1e-12 * values[-1].clamp_min(1e-300)
    scales = torch.where(kept, values.clamp_min(1e-300).rsqrt(), 0.0)
    leading = image @ (vectors * scales).flip(1)  # the longest first
    lacking = matrix.diagonal() - leading.square().sum(1)
    return torch.cat([lacking.clamp_min(0).sqrt().unsqueeze(1), leading], dim=1)


def whole(factor: Tensor) -> Tensor:
    """Return a factor as a matrix, (dim, dim), float64; raises nothing, whatever its values."""
    factor = factor.double()
    if factor.shape[0] == factor.shape[1]:
        return factor
    return _product(factor, torch.eye(len(factor)).to(factor))


def diagonal(factor: Tensor) -> Tensor:
    """Return the diagonal of a factor of either form, (dim,)."""
    if factor.shape[0] == factor.shape[1]:
        return factor.diagonal()
    return factor.square().sum(1)


@dataclass(frozen=True)
class Kronecker:
    """A weight's block of the Fisher: the Kronecker product of two thin factors."""

    left: Tensor
    """(out, 1 + k)."""
    right: Tensor
    """(in, 1 + k)."""

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> Kronecker:
        r"""Make the block of two thin factors, over :math:`\sqrt{\mathrm{tr}\,G\;\mathrm{tr}\,A}`.

        It is zero if one of them is.
        """
        traces = [float(factor.double().square().sum()) for factor in (left, right)]
        if 0 in traces:
            return cls(torch.zeros_like(left), torch.zeros_like(right))
        g, a = (f / t**0.25 for f, t in zip((left, right), traces, strict=True))
        return cls(g, a)

    def to(self, device: torch.device) -> Kronecker:
        """Return it on a device."""
        return Kronecker(self.left.to(device), self.right.to(device))

    @property
    def trace(self) -> float:
        """The sum of its diagonal."""
        return float(self.left.double().square().sum() * self.right.double().square().sum())

    def numel(self) -> int:
        """Return the number of the weight's entries."""
        return len(self.left) * len(self.right)

    def applied(self, change: Tensor) -> Tensor:
        """Multiply: G τ A for a change τ, (..., out, in)."""
        g, a = self.left.to(change), self.right.to(change)
        return _product(a, _product(g, change).mT).mT

    @torch.no_grad()
    def shrink(self, delta: Delta, strength: float, pull: Tensor | None) -> None:
        r"""Take a proximal step, in place.

        .. math:: q \leftarrow \arg\min_{q'}\ \tfrac12\lVert q' - q\rVert^2
                  + \tfrac s2\,\tau(q')^\top F\,\tau(q') - \langle\tau(q'), g\rangle

        Exact for full and (IA)³; for a LoRA exact in B with A fixed, then in A with B fixed:

        - full: in the eigenbases of G and A, :math:`\hat\Delta_{ij} / (1 + s\,\gamma_i \alpha_j)`;
        - LoRA: :math:`B' + s\,G B'(A_l\,A\,A_l^\top) = B + g A_l^\top`, and A_l's mirror image;
        - (IA)³: :math:`(I + s\,G \circ (W_0\,A\,W_0^\top))\,x = l - 1 + (g \circ W_0)\mathbf 1`.

        Args:
            delta: Change of this weight.
            strength: s.
            pull: g, (out, in); None: zero.
        """
        if isinstance(delta, LoRA):
            rows = delta.B if pull is None else delta.B + pull @ delta.A.T
            small = strength * delta.A @ _product(self.right.to(delta.A), delta.A.T)
            delta.B.copy_(_solved(self.left, rows, small))
            columns = delta.A.T if pull is None else delta.A.T + pull.T @ delta.B
            small = strength * delta.B.T @ _product(self.left.to(delta.B), delta.B)
            delta.A.copy_(_solved(self.right, columns, small).T)
        elif isinstance(delta, IA3):
            change = delta.l - 1
            if pull is not None:
                change = change + (pull * delta.weight).sum(1, keepdim=True)
            values, basis = self._of_scales(delta.weight)
            rotated = (basis.T @ change) / (1 + strength * values.unsqueeze(1))
            delta.l.copy_(1 + basis @ rotated)
        elif isinstance(delta, Full):
            change = delta.delta if pull is None else delta.delta + pull
            (gamma, g), (alpha, a) = self._bases
            rotated = (g.T @ change @ a) / (1 + strength * torch.outer(gamma, alpha))
            delta.delta.copy_(g @ rotated @ a.T)

    @cached_property
    def _bases(self) -> list[tuple[Tensor, Tensor]]:
        """Eigenvalues and eigenvectors of G and A, once for a whole training."""
        return [_eigen(whole(factor), factor) for factor in (self.left, self.right)]

    def _of_scales(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The same of the matrix that (IA)³'s scales see; of the one weight it belongs to."""
        if "scales" not in self.__dict__:
            seen = weight.double() @ whole(self.right) @ weight.double().T
            self.__dict__["scales"] = _eigen(whole(self.left) * seen, self.left)
        return self.__dict__["scales"]  # type: ignore[no-any-return]


Block = Tensor | Kronecker
"""The Fisher of one weight: a diagonal, (out, in), or a Kronecker product."""
Metric = Mapping[str, Block]
"""A Fisher by weight name."""


def applied(block: Block, change: Tensor) -> Tensor:
    """Multiply a change, (..., out, in), by the Fisher of its weight."""
    return block.applied(change) if isinstance(block, Kronecker) else block * change


def trace_of(block: Block) -> float:
    """Return the trace of the Fisher of one weight."""
    return block.trace if isinstance(block, Kronecker) else float(block.double().sum())


def _product(factor: Tensor, values: Tensor) -> Tensor:
    """Multiply: :math:`(diag(d)^2 + V V^T) X` for X, (..., dim, m)."""
    root, leading = factor[:, :1], factor[:, 1:]
    return root.square() * values + leading @ (leading.mT @ values)


def _eigen(matrix: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp_min(0).to(like), vectors.to(like)


def _solved(factor: Tensor, rows: Tensor, small: Tensor) -> Tensor:
    r"""Solve :math:`X' + F X' S = X`, F a thin factor and S a small symmetric matrix; in float64.

    In the eigenbasis of S, each column j is :math:`(I + s_j F)^{-1} x_j`, by Woodbury's identity:
    with :math:`E = (I + s_j\,\mathrm{diag}(d)^2)^{-1}`, it is :math:`E x - s_j E V (I + s_j V^\top
    E V)^{-1} V^\top E x`.

    Args:
        factor: F, (dim, 1 + k).
        rows: X, (dim, r).
        small: S, (r, r).
    """
    factor, values = factor.double(), small.double()
    s, basis = torch.linalg.eigh((values + values.T) / 2)
    s = s.clamp_min(0)
    leading = factor[:, 1:]
    damped = 1 / (1 + torch.outer(s, factor[:, 0].square()))  # (r, dim)
    x = damped * (rows.double() @ basis).T  # E x
    weighted = damped.unsqueeze(2) * leading  # E V: (r, dim, k)
    inner = torch.eye(leading.shape[1]).to(leading) + s[:, None, None] * (leading.T @ weighted)
    seen = torch.linalg.solve(inner, (x @ leading).unsqueeze(2))  # (r, k, 1)
    solved = x - s.unsqueeze(1) * (weighted @ seen).squeeze(2)
    result: Tensor = (basis @ solved).T
    return result
