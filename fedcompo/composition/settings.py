"""Settings by which a registry composes its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedcompo.config.choices import Coefficients, Statistics
from fedcompo.config.run import RunConfig


@dataclass(frozen=True)
class CompositionSettings:
    """Settings of a composition; fixed when the registry is created."""

    coefficients: Coefficients = Coefficients.UNIFORM
    """Weight of each task vector in the mean: equal, or by number of examples."""
    scale: float | None = None
    """λ, the factor on the weighted mean of the task vectors; None: it is chosen. With mixtures it
    is always a number: None becomes 1."""
    statistics: Statistics = Statistics.SUMS
    """What every member describes its features by."""
    align_samples: int = 256
    """mixtures: features drawn for each class to fit the joint head."""
    ridge: float = 0.001
    """mixtures: pull of the joint head to zero."""
    seed: int = 0
    """mixtures: seed of the draws."""
    keep_versions: bool = False
    """Whether earlier compositions are kept when a new one replaces them."""
    max_norm_ratio: float = 0.0
    """A task vector this many times longer than the median of all is refused; 0: none."""

    def __post_init__(self) -> None:
        """Put a number in place of a scale that nobody chooses."""
        if self.statistics is Statistics.MIXTURES and self.scale is None:
            object.__setattr__(self, "scale", 1.0)

    @classmethod
    def of(cls, config: RunConfig) -> CompositionSettings:
        """Take them from the config of a run."""
        return cls(
            coefficients=config.compose.coefficients,
            scale=config.compose.fixed_scale,
            statistics=config.head.statistics,
            align_samples=config.head.align_samples,
            ridge=config.head.ridge,
            seed=config.seed,
            keep_versions=config.registry.keep_versions,
            max_norm_ratio=config.server.max_norm_ratio,
        )

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> CompositionSettings:
        """Rebuild them from :attr:`values`; raises ``ValueError`` or ``TypeError``."""
        statistics = Statistics(values.get("statistics", Statistics.MIXTURES))
        coefficients = Coefficients(values["coefficients"])
        return cls(**{**values, "coefficients": coefficients, "statistics": statistics})

    @property
    def values(self) -> dict[str, Any]:
        """JSON values; without those that older registries do not name and that change nothing."""
        values = asdict(self)
        if self.statistics is Statistics.MIXTURES:
            del values["statistics"]
        if not self.max_norm_ratio:
            del values["max_norm_ratio"]
        return values

    def times(self, num_examples: int) -> int:
        """Return how often a client counts in the sum: once, or once for each of its examples."""
        return num_examples if self.coefficients is Coefficients.EXAMPLES else 1
