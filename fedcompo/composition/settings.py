"""Settings by which a registry composes its model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedcompo.composition.claims import most_of, usual
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
    max_count_ratio: float = 0.0
    """What the caps are chosen by, as multiples of usual counts; 0: none is chosen, as in
    registries of earlier versions."""
    class_cap: int = 0
    """Images of one class that a client can weigh by; 0: all that it states."""
    client_cap: int = 0
    """Images in all that a client can weigh by; 0: all that it states."""

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
            max_count_ratio=config.compose.max_count_ratio,
        )

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> CompositionSettings:
        """Rebuild them from :attr:`values`; raises ``ValueError`` or ``TypeError``."""
        statistics = Statistics(values.get("statistics", Statistics.MIXTURES))
        coefficients = Coefficients(values["coefficients"])
        return cls(**{**values, "coefficients": coefficients, "statistics": statistics})

    @property
    def values(self) -> dict[str, Any]:
        """JSON values; what is older than sums and caps does not name them."""
        values = asdict(self)
        if self.statistics is Statistics.MIXTURES:
            del values["statistics"]
        caps = ("max_count_ratio", "class_cap", "client_cap")
        return {name: value for name, value in values.items() if value or name not in caps}

    def with_caps(self, counts: Iterable[Mapping[str, int]]) -> CompositionSettings:
        """Choose the caps by the usual counts, unless they are chosen, or none are wanted.

        Every client has one say, however many classes it claims.

        Args:
            counts: Images of each class, of each client; at least one.
        """
        if not self.max_count_ratio or self.class_cap:
            return self
        stated = [own.values() for own in counts]
        one = most_of(map(usual, stated), self.max_count_ratio)
        return replace(
            self, class_cap=one, client_cap=most_of(map(sum, stated), self.max_count_ratio)
        )

    @property
    def caps(self) -> tuple[int, int] | None:
        """The caps on the images of one class, and in all; None: there are none."""
        return (self.class_cap, self.client_cap) if self.class_cap or self.client_cap else None

    def times(self, num_examples: int) -> int:
        """Return how often a client counts in the sum: once, or once for each of its examples."""
        if self.coefficients is not Coefficients.EXAMPLES:
            return 1
        return min(num_examples, self.client_cap or num_examples)
