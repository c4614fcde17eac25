r"""The Gaussian mechanism: what one example may add is bounded, and noise hides whether it did.

An example adds several parts (a count, features, a Fisher), each clipped to its own limit. Divided
by their limits, the parts of one example together have at most the length
:math:`\sqrt{\text{parts}}`: that is how far the sums can move when one example is added or removed
(the *sensitivity*). Noise of :math:`\sigma` sensitivities on every number of the sums,

.. math:: \tilde S = \sum_x \mathrm{clip}(s(x)) + \mathcal N\big(0, (\sigma\sqrt{\text{parts}}\,
          C)^2\big),

makes the answer :math:`(\varepsilon, \delta)`-private for each example; whatever is computed from
:math:`\tilde S` alone is so, too. Source: Dwork & Roth, *The Algorithmic Foundations of
Differential Privacy*, 2014, appendix A; clipping after Abadi et al., CCS 2016 (arXiv 1607.00133).

The noise comes from the operating system's entropy, number by number: no seed of the run, which the
server knows, can draw it again. It is drawn and added in float64, and sums are taken in floating
point; what is hidden in their last bits (Mironov, CCS 2012) is not accounted for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

Entropy = Callable[[int], bytes]
"""Returns so many unpredictable bytes."""


def normal(shape: torch.Size | tuple[int, ...], entropy: Entropy = os.urandom) -> Tensor:
    """Draw standard normal numbers, float64: the quantiles of 52 random bits each.

    Args:
        shape: Of the result.
        entropy: Source of bytes; another than the operating system's for tests alone.
    """
    count = math.prod(shape)
    bits = np.frombuffer(entropy(8 * count), dtype=np.uint64) >> np.uint64(12)
    uniform = torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-52)  # never 0 or 1
    drawn: Tensor = torch.special.ndtri(uniform)
    return drawn.reshape(shape)


def clip_factors(norms: Tensor, limit: float) -> Tensor:
    r"""Factor of each example that brings it to the limit: :math:`\min(1, C / \lVert x\rVert)`.

    Args:
        norms: (examples,).
        limit: C.
    """
    return (limit / norms.clamp_min(1e-300)).clamp_max(1.0)


def noised(
    sums: Mapping[str, Tensor],
    limits: Mapping[str, float],
    *,
    parts: int,
    noise: float,
    entropy: Entropy = os.urandom,
) -> dict[str, Tensor]:
    r"""Add noise to sums of clipped parts.

    Args:
        sums: By name, any shapes.
        limits: C of each; entries of one part have the same, and are clipped together.
        parts: Into how many parts an example was divided.
        noise: :math:`\sigma`, in sensitivities.
        entropy: See :func:`normal`.

    Returns:
        :math:`\tilde S` by name, float64.
    """
    return {
        name: total.double().cpu()
        + noise * math.sqrt(parts) * limits[name] * normal(total.shape, entropy)
        for name, total in sums.items()
    }
