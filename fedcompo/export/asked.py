"""Who is to be composed, and how: by a recipe, or by options, which are a short one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypedDict

from fedcompo.composition.settings import CompositionSettings
from fedcompo.errors import ConfigError, ContributionError
from fedcompo.export.recipe import Recipe
from fedcompo.method.contribution import Contribution
from fedcompo.method.pool import Pool

LARGEST_SCALE = 10
"""For each client; 1 gives the plain sum."""


class Choice(TypedDict, total=False):
    """What may be asked for."""

    only: Sequence[str]
    """Clients to take; empty: all, or all that have a weight."""
    without: Sequence[str]
    """Clients to leave out."""
    weights: Mapping[str, float] | None
    """Coefficients by client; None: the registry's own, or of the run."""
    scale: float | None
    """λ; None: it is chosen."""
    rule: str
    """Text of a rule; empty: the registry's own, or the mean."""
    recipe: Recipe | None
    """Says all of this, in place of it."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Members of a pool, and a recipe for them."""

    pool: Pool
    recipe: Recipe = Recipe()
    only: tuple[str, ...] = ()
    """Clients that were chosen by name; empty: all."""
    without: tuple[str, ...] = ()
    """Clients that were left out by name."""
    negated: Contribution | None = None
    """Who is subtracted from what is composed of the pool."""

    @classmethod
    def of(
        cls,
        everyone: Pool,
        *,
        only: Sequence[str] = (),
        without: Sequence[str] = (),
        weights: Mapping[str, float] | None = None,
        scale: float | None = None,
        rule: str = "",
        recipe: Recipe | None = None,
    ) -> Self:
        """Choose clients; a recipe stands in place of the options.

        Raises:
            ContributionError: If there is no such client, none is left, or weights do not fit.
            ConfigError: If λ is not positive, or far beyond the plain sum.
        """
        negated = None
        if recipe is not None:
            only, without, weights = tuple(recipe.members), (), recipe.weights
            if recipe.negated is not None:
                (negated,) = everyone.only(recipe.negated.client)
                without = () if only or weights else (negated.client,)
        some = tuple(only or (() if without else sorted(weights or ())))
        pool = (everyone.only(*some) if some else everyone).without(*without)
        free = recipe is not None and not recipe.normalise
        for own in (weights, *(group.weights for group in (recipe.groups if recipe else ()))):
            pool.check_composable(own, normalise=not free)
        if recipe is None:
            recipe = Recipe(weights=weights, scale=_checked(scale, len(pool)), rule=rule)
        if len(pool) + len(without) == len(everyone):
            some = ()
        return cls(pool=pool, recipe=recipe, only=some, without=tuple(without), negated=negated)

    @property
    def everyone(self) -> Iterator[Contribution]:
        """Those who are composed, and who is subtracted."""
        yield from self.pool
        if self.negated is not None:
            yield self.negated

    @property
    def coefficients(self) -> Mapping[str, float] | None:
        """By client; None: the registry's own."""
        return self.recipe.weights

    def settled(self, settings: CompositionSettings) -> CompositionSettings:
        """Return settings with what was asked for in place of their own.

        Raises:
            ConfigError: If there is no such rule, or it says λ itself.
            ContributionError: If it cannot take weights that are no mean's.
        """
        recipe = self.recipe
        settings = recipe.settled(settings)
        rule = settings.made_by
        kept = settings.scale if rule.votes else None
        settings = replace(settings, rule=rule.text, scale=kept)
        if (recipe.scale or recipe.factor) and not rule.votes:
            raise ConfigError(f"The rule {rule.text} says λ itself; leave out `scale`.")
        if not recipe.normalise and not (rule.is_sum and (rule.votes or rule.factor)):
            raise ContributionError(
                f"The rule {rule.text} takes weights that are >= 0 and sum to 1. With "
                "`normalise = false`, the rules mean and task-arithmetic take any."
            )
        scale = recipe.chosen_scale if rule.votes else None
        if recipe.factor:
            scale = recipe.factor * sum(settings.times(c.num_examples) for c in self.pool)
        return settings if scale is None else replace(settings, scale=scale)

    def check(self, base: str, names: Collection[str]) -> None:
        """Refuse what the recipe was not made for, before anything is composed.

        Args:
            base: Fingerprint of the pre-trained weights.
            names: Of the target weights.
        """
        self.recipe.check_sources(base, self.everyone)
        self.recipe.grouped(names)


def _checked(scale: float | None, members: int) -> float:
    """Return λ, or 0 where it is open."""
    most = LARGEST_SCALE * members
    if scale is not None and not 0 < scale <= most:
        raise ConfigError(
            f"`scale` must be a positive number, got {scale:g}; for {members} clients {most} is "
            "the largest. To subtract a client's task vector, see `fedcompo negate`."
        )
    return scale or 0.0
