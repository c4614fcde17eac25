"""Settings by which a registry composes its model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import ceil
from statistics import median_low
from typing import TYPE_CHECKING, Any

from fedcompo.composition.scale import Factor, FactorBy
from fedcompo.config.choices import Coefficients, FisherForm, Method, Statistics
from fedcompo.config.run import RunConfig
from fedcompo.errors import ConfigError

if TYPE_CHECKING:
    from fedcompo.composition.rules.rule import Rule

UNLIMITED = 2**62
"""A cap that nobody reaches."""
MEAN = "mean"
NEWER = "max_norm_ratio", "max_count_ratio", "class_cap", "client_cap", "rule"
"""Settings that older registries do not name."""


def most_of(counts: Iterable[int], ratio: float) -> int:
    """Return so many times the median, of two the lower, as a cap; no ratio: no limit."""
    known = list(counts)
    return ceil(ratio * median_low(known)) if known and ratio else UNLIMITED


@dataclass(frozen=True)
class CompositionSettings:
    """Settings of a composition; fixed when the registry is created."""

    coefficients: Coefficients = Coefficients.UNIFORM
    """Weight of each task vector in the mean: equal, or by number of examples."""
    scale: float | None = None
    """λ, the factor on the weighted mean of the task vectors, or on what the rule makes in its
    place; None: it is chosen. With mixtures it is always a number: None becomes 1."""
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
    max_count_ratio: float = 0.0
    """Chooses the caps, as a multiple of usual counts; 0: none, as in earlier versions."""
    class_cap: int = UNLIMITED
    """Images of a class that a client weighs by at most."""
    client_cap: int = UNLIMITED
    """Images in all that a client weighs by at most."""
    rule: str = MEAN
    """Text of the rule of composition; see :mod:`fedcompo.composition.rules`."""

    def __post_init__(self) -> None:
        """Put a number in place of a scale that nobody chooses."""
        if self.statistics is Statistics.MIXTURES and self.scale is None:
            object.__setattr__(self, "scale", 1.0)

    @classmethod
    def of(cls, config: RunConfig) -> CompositionSettings:
        """Take them from the config of a run.

        Raises:
            ConfigError: If there is no such rule, or it does not go with other settings.
        """
        settings = cls(
            rule=config.compose.rule,
            coefficients=config.compose.coefficients,
            scale=config.compose.fixed_scale,
            statistics=config.head.statistics,
            align_samples=config.head.align_samples,
            ridge=config.head.ridge,
            seed=config.seed,
            keep_versions=config.registry.keep_versions,
            max_norm_ratio=config.server.max_norm_ratio,
            max_count_ratio=config.compose.max_count_ratio,
        )
        if settings.rule == MEAN:
            return settings
        settings.check_run(config)
        rule, mixtures = settings.made_by, settings.statistics is Statistics.MIXTURES
        if not rule.votes and (config.compose.fixed_scale is not None or mixtures):
            raise ConfigError(
                f"`rule = {rule.name}` says λ itself: it goes with `scale = auto` and "
                "`statistics = sums`."
            )
        if not rule.weighted and settings.coefficients is not Coefficients.UNIFORM:
            raise ConfigError(
                f"`rule = {rule.name}` has no weights in its equation: it goes with "
                "`coefficients = uniform`."
            )
        return replace(settings, rule=rule.text)

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
        unset = {f.name: f.default for f in fields(self) if f.name in NEWER}
        return {n: v for n, v in values.items() if n not in unset or v != unset[n]}

    @property
    def made_by(self) -> Rule:
        """The rule of composition; raises ``ConfigError`` if there is none of that text."""
        from fedcompo.composition.rules.parsing import parse_rule  # imports torch

        return parse_rule(self.rule)

    @property
    def factor_given(self) -> str:
        """How λ is given, in words: at a fixed scale, or by the rule; empty: it is open."""
        if not self.made_by.votes:
            return f"by the rule {self.rule}"
        return "" if self.scale is None else f"at the fixed scale {self.scale:g}"

    def check_run(self, config: RunConfig) -> None:
        """Refuse a run whose clients cannot join; raises ``ConfigError``."""
        self.check_method(config.method.method)
        rule, caps = self.made_by, config.caps
        kept = config.server.keep_fisher and caps.fisher_form is not FisherForm.NONE
        if rule.needs and (not kept or (rule.takes_inputs and caps.dp_noise)):
            raise ConfigError(
                f"The rule {self.rule} composes by what clients send with their Fisher: it goes "
                f"with {rule.kept_by}."
            )
        if config.head.statistics is not self.statistics:  # also of an empty one: they never change
            raise ConfigError(
                f"`statistics` is {config.head.statistics}, but the registry's members are "
                f"described by {self.statistics}, and no head can be made of both. Set "
                f"`statistics = {self.statistics}`, or train all clients anew into a new registry."
            )

    def check_method(self, method: Method) -> None:
        """Refuse a method that trains for another model than the rule composes."""
        if self.rule != MEAN and method is not Method.ITA:
            raise ConfigError(
                f"The rule is {self.rule}, but {method} trains for the mean of all clients, in "
                "rounds. Use `method = ita` and no `repair-rounds`, or compose by `rule = mean`."
            )

    def known_factor(self, together: float, voted: float | None = None) -> Factor | None:
        r"""Return the factor :math:`\lambda'`, where it does not follow from lengths.

        Args:
            together: M, how often all members count.
            voted: What the clients chose, if they did.
        """
        rule = self.made_by
        if rule.factor is not None:
            return Factor(rule.factor, FactorBy.RULE)
        if rule.votes and self.scale is not None:
            return Factor(self.scale / together, FactorBy.FIXED)
        if rule.votes and voted is not None:
            return Factor(voted, FactorBy.VOTE)
        return None

    def with_caps(self, counts: Iterable[Mapping[str, int]]) -> CompositionSettings:
        """Choose the caps by the counts of clients, by class, unless they are there already.

        Every client has one say, however many classes it claims.
        """
        if not self.max_count_ratio or self.class_cap < UNLIMITED:
            return self
        stated = [own.values() for own in counts]
        one, every = map(median_low, stated), map(sum, stated)
        ratio = self.max_count_ratio
        return replace(self, class_cap=most_of(one, ratio), client_cap=most_of(every, ratio))

    @property
    def caps(self) -> tuple[int, int] | None:
        """The caps on a class and in all; None: there are none."""
        return (self.class_cap, self.client_cap) if self.class_cap < UNLIMITED else None

    def times(self, num_examples: int) -> int:
        """Return how often a client counts in the sum: once, or once for each of its examples."""
        by_examples = self.coefficients is Coefficients.EXAMPLES
        return min(num_examples, self.client_cap) if by_examples else 1
