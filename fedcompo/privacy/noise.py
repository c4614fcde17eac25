r"""The Gaussian mechanism: clip what one example may add, add noise, and account for it.

An example adds several parts (a count, features, a Fisher), each clipped to its own limit C.
Divided by their limits, the parts of one example together have at most the length
:math:`\sqrt{\text{parts}}`. This is the *sensitivity*: how far the sums can move when one example
is added or removed. Noise of :math:`\sigma` sensitivities on every number of the sums,

.. math:: \tilde S = \sum_x \mathrm{clip}(s(x)) + \mathcal N\big(0, (\sigma\sqrt{\text{parts}}\,
          C)^2\big),

makes the sums :math:`(\varepsilon, \delta)`-private for each example, and with them all that is
computed from :math:`\tilde S` alone. Source: Dwork & Roth, *The Algorithmic Foundations of
Differential Privacy*, 2014, appendix A; clipping after Abadi et al., CCS 2016 (arXiv 1607.00133).

Releases with noises :math:`\sigma_i` together are exactly as private as one with
:math:`1/\sigma = \mu = \sqrt{\sum_i \sigma_i^{-2}}`, whose :math:`\varepsilon` solves

.. math:: \delta = \Phi\Big(\frac\mu2 - \frac\varepsilon\mu\Big)
          - e^\varepsilon\,\Phi\Big(-\frac\mu2 - \frac\varepsilon\mu\Big).

Source: Balle & Wang, *Improving the Gaussian Mechanism for Differential Privacy*, ICML 2018 (arXiv
1805.06530), theorem 8; composition: Dong, Roth & Su, *Gaussian Differential Privacy*, 2019 (arXiv
1905.02383), corollary 3.3. No example is drawn by chance, so nothing is amplified.

The noise comes from the operating system's entropy, number by number. The server knows the run's
seed, but no seed can draw this noise again. It is drawn and added in float64, and sums are taken in
floating point; what their last bits may reveal (Mironov, CCS 2012) is not accounted for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

Entropy = Callable[[int], bytes]
"""Returns the requested number of unpredictable bytes."""
STRONGEST_SIGNAL = 1e6
r"""Above this :math:`\mu` privacy is negligible, and :math:`\varepsilon` counts as infinite."""


def normal(shape: torch.Size | tuple[int, ...], entropy: Entropy = os.urandom) -> Tensor:
    """Draw standard normal numbers, float64: each the quantile of 52 random bits.

    Args:
        shape: Of the result.
        entropy: Source of bytes; only tests use another than the operating system's.
    """
    count = math.prod(shape)
    bits = np.frombuffer(entropy(8 * count), dtype=np.uint64) >> np.uint64(12)
    uniform = torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-52)  # never 0 or 1
    drawn: Tensor = torch.special.ndtri(uniform)
    return drawn.reshape(shape)


def clip_factors(norms: Tensor, limit: float) -> Tensor:
    r"""Return each example's factor that keeps the limit: :math:`\min(1, C / \lVert x\rVert)`."""
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
        limits: C of each; entries of one part have the same C, since they are clipped together.
        parts: Number of parts of an example.
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


def composed_epsilon(noises: Iterable[float], *, delta: float) -> float:
    r"""Compute the exact :math:`\varepsilon` of several releases together.

    With :math:`a = \varepsilon/\mu - \mu/2`, the equation above is :math:`\delta = \Phi(-a) -
    \tfrac12 e^{-a^2/2}\,\mathrm{erfcx}\big((a + \mu)/\sqrt2\big)`, in which nothing overflows.

    Args:
        noises: :math:`\sigma_i` of each release, in sensitivities, above 0.
        delta: :math:`\delta`, above 0 and below 1.

    Returns:
        :math:`\varepsilon`, at least 0; infinite where there is hardly any noise.

    Raises:
        ValueError: If a noise or :math:`\delta` is out of range.
    """
    noises = tuple(noises)
    if not (0 < delta < 1 and all(noise > 0 for noise in noises)):
        raise ValueError(f"`delta` must be in (0, 1), noises above 0; got {delta} and {noises}.")
    # Imported here because it takes a third of a second, and only a server accounts for noise.
    from scipy.optimize import brentq
    from scipy.special import erfcx, ndtr, ndtri

    mu = math.hypot(*(1 / noise for noise in noises))
    if mu > STRONGEST_SIGNAL:
        return math.inf
    lowest = -mu / 2  # of a, where ε is 0

    def excess(a: float) -> float:
        second = math.exp(-(a**2) / 2) / 2 * erfcx((a + mu) / math.sqrt(2))
        return float(ndtr(-a) - second - delta)

    if excess(lowest) <= 0:
        return 0.0
    a = brentq(excess, lowest, 1 - ndtri(delta))  # Φ(−a) alone is below δ there
    return float(mu * (a + mu / 2))
