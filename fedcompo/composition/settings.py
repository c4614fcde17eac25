"""How a registry composes: the settings that are fixed when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from fedcompo.config.choices import Coefficients
from fedcompo.config.run import RunConfig


@dataclass(frozen=True)
class CompositionSettings:
    """How a registry composes; fixed when it is made."""

    coefficients: Coefficients = Coefficients.UNIFORM
    """How much of each task vector enters."""
    scale: float = 1.0
    """Factor on the weighted mean of the task vectors."""
    align_samples: int = 256
    """Features a class drawn to align the joint head."""
    ridge: float = 0.001
    """Pull of the joint head's fit to zero."""
    seed: int = 0
    """Seed of the draws."""
    keep_versions: bool = False
    """Keep earlier compositions when a new one takes their place."""

    @classmethod
    def of(cls, config: RunConfig) -> CompositionSettings:
        """Take them from the settings of a run."""
        return cls(
            coefficients=config.compose.coefficients,
            scale=config.compose.scale,
            align_samples=config.head.align_samples,
            ridge=config.head.ridge,
            seed=config.seed,
            keep_versions=config.registry.keep_versions,
        )

    def times(self, num_examples: int) -> int:
        """How often a client counts in the sum: once, or once an example."""
        return num_examples if self.coefficients is Coefficients.EXAMPLES else 1
