"""Settings by which a registry composes its model."""

from __future__ import annotations

from dataclasses import dataclass

from fedcompo.config.choices import Coefficients
from fedcompo.config.run import RunConfig


@dataclass(frozen=True)
class CompositionSettings:
    """Settings of a composition; fixed when the registry is created."""

    coefficients: Coefficients = Coefficients.UNIFORM
    """Weight of each task vector in the mean: equal, or by number of examples."""
    scale: float = 1.0
    """Factor on the weighted mean of the task vectors."""
    align_samples: int = 256
    """Features drawn for each class to fit the joint head."""
    ridge: float = 0.001
    """Pull of the joint head to zero."""
    seed: int = 0
    """Seed of the draws."""
    keep_versions: bool = False
    """Whether earlier compositions are kept when a new one replaces them."""

    @classmethod
    def of(cls, config: RunConfig) -> CompositionSettings:
        """Take them from the config of a run."""
        return cls(
            coefficients=config.compose.coefficients,
            scale=config.compose.scale,
            align_samples=config.head.align_samples,
            ridge=config.head.ridge,
            seed=config.seed,
            keep_versions=config.registry.keep_versions,
        )

    def times(self, num_examples: int) -> int:
        """Return how often a client counts in the sum: once, or once for each of its examples."""
        return num_examples if self.coefficients is Coefficients.EXAMPLES else 1
