"""Who is to be composed, and how: by a recipe, or by options, which are a short one.

Of that, a :class:`Selection` makes weights, one after the other, and the whole recipe.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Self, TypedDict, Unpack

from torch import Tensor

from fedcompo.backbone.stored import StoredBackbone
from fedcompo.composition.models import stream_composition, times_of
from fedcompo.composition.rules.rule import Changes
from fedcompo.composition.settings import UNLIMITED, CompositionSettings
from fedcompo.config.choices import Coefficients, Kind, Statistics
from fedcompo.data.tasks import members_of
from fedcompo.errors import ConfigError, ContributionError
from fedcompo.export.negation import negated
from fedcompo.export.recipe import MEMBERS, Group, Recipe
from fedcompo.method.contribution import Contribution
from fedcompo.method.heads import Head
from fedcompo.method.pool import Pool
from fedcompo.report.progress import each
from fedcompo.runtime import version
from fedcompo.storage.files import CONTENT, FISHER

LARGEST_SCALE = 10
"""For each client; 1 gives the plain sum."""


class Options(TypedDict, total=False):
    """What may be asked for."""

    only: Sequence[str]
    """Members to take, or clients with all their tasks; empty: all, or all that have a weight."""
    without: Sequence[str]
    """Members to leave out, or clients with all their tasks."""
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
    def of(cls, everyone: Pool, **choice: Unpack[Options]) -> Self:
        """Choose clients; a recipe stands in place of the options.

        Raises:
            ContributionError: If there is no such client, none is left, or weights do not fit.
            ConfigError: If λ is not positive, or far beyond the plain sum.
        """
        negated, recipe = None, choice.get("recipe")
        weights = choice.get("weights")
        only, without = (
            tuple(m for name in names for m in members_of(name, everyone.clients) or (name,))
            for names in (choice.get("only", ()), choice.get("without", ()))
        )
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
            scale = _checked(choice.get("scale"), len(pool))
            recipe = Recipe(weights=weights, scale=scale, rule=choice.get("rule", ""))
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
        scale = recipe.scale
        if recipe.factor:
            scale = recipe.factor * sum(times_of(self.pool, settings).values())
        elif not scale and rule.votes and not recipe.normalise and recipe.weights is not None:
            scale = 1.0  # the weights need not be a mean's
        return replace(settings, scale=scale) if scale else settings


@dataclass(frozen=True, kw_only=True)
class Selection(Asked):
    """Contributions to compose, and with what."""

    backbone: StoredBackbone
    settings: CompositionSettings
    head: Head
    factor: float
    r""":math:`\lambda'` on the sum of the task vectors with the registry's own coefficients, or
    :math:`\lambda` on the mean with others."""
    made_of: str
    """What the head is made of; see :mod:`fedcompo.export.recipe`."""

    @property
    def shares(self) -> dict[str, float]:
        """Coefficients w by client; they sum to one, unless the recipe says otherwise."""
        if self.coefficients is not None:
            return dict(self.coefficients)
        times = times_of(self.pool, self.settings)
        return {client: count / sum(times.values()) for client, count in times.items()}

    @property
    def scale(self) -> float:
        r""":math:`\lambda`, as a multiple of the weighted mean."""
        if self.settings.scale is not None and self.settings.made_by.votes:
            return self.settings.scale
        if self.coefficients is not None:
            return self.factor
        return self.factor * sum(times_of(self.pool, self.settings).values())

    @property
    def multipliers(self) -> dict[str, float] | None:
        r"""How often each product of two factors counts in the change, :math:`\lambda' m_c`.

        By client; None: the change is no sum of such products.
        """
        if not self.settings.made_by.is_sum or any(
            own.task_vector.kind is not Kind.LORA for own in self.pool
        ):
            return None
        times = times_of(self.pool, self.settings, self.coefficients)
        return {c: self.factor * count for c, count in times.items()}

    def change(self, name: str) -> Tensor:
        """Compose the change of one weight, (out, in), float64; of a recipe without groups."""
        times, rule = times_of(self.pool, self.settings, self.coefficients), self.settings.made_by
        rule.check(self.pool.contributions, times)
        weight = self.backbone.tensors[name]
        return self.factor * rule.total(Changes(name, weight, self.pool.contributions, times))

    @property
    def written(self) -> Recipe:
        """The whole recipe: with the same contributions, it gives the same bits."""
        recipe, settings = self.recipe, self.settings
        less, gone = recipe.negated, self.negated
        needed: dict[str, Any] = {}
        if self.coefficients is None:
            needed["coefficients"] = str(settings.coefficients)
        if needed and settings.coefficients is Coefficients.EXAMPLES:
            needed["client-cap"] = settings.client_cap
        if self.made_of == MEMBERS:
            needed["class-cap"] = settings.class_cap
        if settings.statistics is Statistics.MIXTURES:
            drawn = "align-samples", "ridge", "seed"
            needed |= {key: getattr(settings, key.replace("-", "_")) for key in drawn}
        used = self.factor if settings.made_by.votes else 0.0  # else the rule says it again
        return replace(
            recipe,
            fedcompo=version("fedcompo"),
            backbone=self.backbone.fingerprint,
            rule=settings.made_by.text,
            factor=used if self.coefficients is None else 0.0,
            scale=0.0 if self.coefficients is None else used,
            head=self.made_of,
            settings={key: 0 if v == UNLIMITED else v for key, v in needed.items()},
            members=self._digests(CONTENT),
            fisher=self._digests(FISHER) if settings.made_by.needs else {},
            groups=tuple(replace(group, scale=self._scale_of(group)) for group in recipe.groups),
            negated=less and replace(less, sha256=gone.digests.get(CONTENT, "") if gone else ""),
        )

    def _digests(self, file: str) -> dict[str, str]:
        """SHA-256 of the tensors in a file of each member's, by client."""
        return {own.client: own.digests.get(file, "") for own in self.pool}

    def _scale_of(self, group: Group) -> float:
        """λ of a group's weights: its own, the recipe's, or as where the whole has such weights."""
        free = not self.recipe.normalise and group.weights is not None
        of_free = self.settings.made_by.factor or 1.0
        return group.scale or self.recipe.scale or (of_free if free else self.scale)

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Compose the target weights, one at a time, in the order of names."""
        groups = self.recipe.grouped(self.backbone.target_weights)
        rest = set(self.backbone.target_weights).difference(*(names for _, names in groups))
        parts = [(rest, self.coefficients, self.factor)]
        together = sum(times_of(self.pool, self.settings).values())
        for group, names in groups:
            weights = self.coefficients if group.weights is None else group.weights
            factor = self._scale_of(group) / (together if weights is None else 1)
            parts.append(({*names}, weights, factor))
        streams = (
            stream_composition(
                self.pool,
                self.backbone,
                weights,
                self.settings,
                factor,
                names=names,
                normalise=self.recipe.normalise,
            )
            for names, weights, factor in parts
        )
        merged, total = heapq.merge(*streams, key=itemgetter(0)), len(self.backbone.target_weights)
        composed = each(merged, "weights", "composing", total=total)
        if self.negated is None or self.recipe.negated is None:
            return composed
        return negated(
            composed,
            self.negated.task_vector,
            self.backbone.tensors,
            scale=self.recipe.negated.strength,
        )


def _checked(scale: float | None, members: int) -> float:
    """Return λ, or 0 where it is open."""
    most = LARGEST_SCALE * members
    if scale is not None and not 0 < scale <= most:
        raise ConfigError(
            f"`scale` must be a positive number, got {scale:g}; for {members} clients {most} is "
            "the largest. To subtract a client's task vector, see `fedcompo negate`."
        )
    return scale or 0.0
