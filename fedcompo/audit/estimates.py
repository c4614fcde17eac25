"""A figure and its bootstrap interval over images.

The interval is of percentiles over resampled images, by ``scipy.stats.bootstrap``. Samples are
resampled apart, so members and non-members keep their numbers. It is about which images were drawn,
not about another run of training, and shrinks to a point where nothing varies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
LEVEL = 0.95

Numbers = NDArray[Any]


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float
    draws: Numbers = field(repr=False, compare=False)
    """The figure of each resampling; equal seeds and sizes resample the same images."""

    @classmethod
    def of(cls, value: float, draws: Numbers) -> Estimate:
        """Take the interval from the figures of all resamplings, (resamplings,)."""
        low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
        return cls(float(value), low, high, draws)

    def __sub__(self, other: Estimate) -> Estimate:
        """Return the difference; its interval pairs resamplings of the same images."""
        return Estimate.of(self.value - other.value, self.draws - other.draws)

    def covers(self, value: float) -> bool:
        """Whether the value lies within the interval, ends included."""
        return self.low <= value <= self.high

    def json(self) -> dict[str, float]:
        """Return the figure and its interval as JSON values."""
        return {"value": self.value, "low": self.low, "high": self.high}


def estimated(statistic: Callable[..., Any], *samples: Numbers, seed: int) -> Estimate:
    """Compute a figure of samples of images, and its interval.

    Args:
        statistic: Takes the samples, each (..., images), and ``axis``, which it reduces.
        samples: Each (images,), at least two.
        seed: Seed of the resampling.
    """
    from scipy.stats import bootstrap  # takes a second to import

    result = bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Estimate.of(statistic(*samples, axis=-1), result.bootstrap_distribution)


def as_json(table: Any) -> Any:
    """Return nested figures, each with a method ``json``, as JSON values."""
    if isinstance(table, Mapping):
        return {key: as_json(value) for key, value in table.items()}
    return table.json()
