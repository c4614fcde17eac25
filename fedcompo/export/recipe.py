r"""A recipe: how a model is composed. The same recipe with the same members gives the same bits.

That holds for the same version of fedcompo. On another machine, the last bits may differ where
members have weights or the rule takes singular vectors: matrix products of libraries differ.

By hand it names only what differs from the defaults; README.md of :mod:`fedcompo.composition` has
an example. ``normalise = false`` takes weights that are negative or have any sum; λ is then 1.

What fedcompo writes holds more: SHA-256 of each member's tensors, the fingerprint of the
pre-trained weights, :math:`\lambda'` in all digits (``factor``), and what the head was made of.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from fedcompo.composition.settings import UNLIMITED, CompositionSettings
from fedcompo.config.setting import POSITIVE, Check, setting
from fedcompo.errors import BackboneMismatch, ConfigError, ContributionError
from fedcompo.method.contribution import Contribution
from fedcompo.storage.files import CONTENT, FISHER
from fedcompo.storage.identity import HEADER

MEMBERS, FROM_FILE = "members", "realigned:"
"""What a joint head is made of: the members' statistics, or a file of which the SHA-256 follows."""
SHA256: Check = (
    lambda value: bool(re.fullmatch("([0-9a-f]{64})?", value)),
    "must be a SHA-256, 64 hexadecimal digits",
)
HEAD: Check = (
    lambda value: bool(re.fullmatch(f"{MEMBERS}|{FROM_FILE}({HEADER})?[0-9a-f]{{64}}", value)),
    f"must be `{MEMBERS}`, or `{FROM_FILE}` and a SHA-256",
)
CAPS = "class-cap", "client-cap"
"""Settings that a registry chooses: images of a class, and in all, by which a client weighs."""
NOT_EMPTY: Check = (bool, "must not be empty")


class Dtype(StrEnum):
    """How weights are written."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@dataclass(frozen=True)
class Group:
    """Weights of the model with members' weights, or a λ, of their own."""

    pattern: str = setting("", "Shell pattern over names of weights.", NOT_EMPTY)
    scale: float = setting(0.0, "λ; 0: the recipe's.", POSITIVE)
    weights: Mapping[str, float] | None = None
    """Coefficients by client; None: the recipe's."""


@dataclass(frozen=True)
class Negation:
    """A client whose task vector is subtracted from what is composed of the others."""

    client: str = setting("", "Its name.", NOT_EMPTY)
    sha256: str = setting("", "Of its contribution's tensors; empty: of any.", SHA256)
    strength: float = setting(1.0, "How much of it is subtracted.", POSITIVE)


@dataclass(frozen=True)
class Recipe:
    """How a model is composed; what is not given is as without a recipe."""

    fedcompo: str = setting("", "Version that wrote the recipe.")
    backbone: str = setting("", "Fingerprint of the pre-trained weights.")
    rule: str = setting("", "How changes are put together, such as `ties:density=0.2`.")
    factor: float = setting(0.0, "λ′, on the sum of the task vectors; not with weights.", POSITIVE)
    scale: float = setting(0.0, "λ, as a multiple of the weighted mean.", POSITIVE)
    normalise: bool = setting(True, "Whether weights must be >= 0 and sum to 1.")
    dtype: Dtype = setting(Dtype.FLOAT32, "Of the written weights.")
    head: str = setting("", "What the joint head is made of.", HEAD)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of :class:`~fedcompo.composition.settings.CompositionSettings`, by key of a run's settings,
    those that are given; a cap of 0 is none."""
    members: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each contribution's tensors, by client; empty: of any."""
    fisher: Mapping[str, str] = field(default_factory=dict)
    """And of its Fisher, if the rule needs it."""
    weights: Mapping[str, float] | None = None
    """Coefficients by client; None: the registry's own."""
    groups: tuple[Group, ...] = ()
    negated: Negation | None = None

    def settled(self, settings: CompositionSettings) -> CompositionSettings:
        """Put the recipe's settings in place of others."""
        caps = {key: self.settings[key] or UNLIMITED for key in CAPS if key in self.settings}
        own = {key.replace("-", "_"): value for key, value in {**self.settings, **caps}.items()}
        own |= {"max_count_ratio": 0.0} if caps else {}  # which would choose caps
        return replace(settings, **own, rule=self.rule or settings.rule)

    def contradictions(self) -> Iterator[str]:
        """Find what cannot stand in one recipe."""
        if self.factor and (self.scale or self.weights is not None):
            yield "`factor` goes with neither `scale` nor weights: it is λ′, on the plain sum."
        every = [self.weights, *(group.weights for group in self.groups)]
        given = [own for own in every if own is not None]
        for own in given:
            clients = self.members or self.weights or own
            if odd := sorted(own.keys() ^ clients.keys()):
                yield f"Weights are given for exactly the members; {odd[0]!r} is on one side only."
        if self.negated is not None and self.negated.client in (self.members or self.weights or ()):
            yield f"{self.negated.client!r} is subtracted, so it cannot be a member too."
        known = {*self.members, *([self.negated.client] if self.negated else [])}
        if self.members and (odd := sorted(self.fisher.keys() - known)):
            yield f"`fisher` names {odd[0]!r}, who is no member."
        if not self.normalise and not given:
            yield "`normalise = false` is said of weights, and there are none."

    def check_sources(self, base: str, members: Iterable[Contribution]) -> None:
        """Refuse other pre-trained weights or contributions than the recipe names.

        Args:
            base: Fingerprint of the pre-trained weights.
            members: Those who are composed, and who is subtracted.

        Raises:
            BackboneMismatch: If the fingerprint is another one.
            ContributionError: If a digest is another one.
        """
        if self.backbone not in ("", base):
            raise BackboneMismatch(
                f"The recipe is for the backbone {self.backbone}, found is {base}. Compose it of "
                "contributions to the recipe's backbone."
            )
        less = {} if self.negated is None else {self.negated.client: self.negated.sha256}
        for own in members:
            for file, named in ((CONTENT, {**self.members, **less}), (FISHER, self.fisher)):
                wanted, found = named.get(own.client, ""), own.digests.get(file, "unknown")
                if wanted not in ("", found):
                    raise ContributionError(
                        f"The tensors in {file} of client {own.client!r} have SHA-256 {found}, the "
                        f"recipe names {wanted}: it is another contribution. Bring the one that "
                        "the recipe names, or take its SHA-256 out."
                    )

    def grouped(self, names: Collection[str]) -> list[tuple[Group, list[str]]]:
        """Return each group with the names of its weights.

        Args:
            names: All target weights.

        Raises:
            ConfigError: If a pattern fits no weight, or two of them fit one.
        """
        found = [(g, [n for n in names if fnmatchcase(n, g.pattern)]) for g in self.groups]
        owner: dict[str, str] = {}
        for group, fitting in found:
            if not fitting:
                raise ConfigError(
                    f"The pattern {group.pattern!r} of the recipe fits no weight that is composed. "
                    f"Write one that fits names such as {min(names)}."
                )
            for name in fitting:
                if name in owner:
                    raise ConfigError(
                        f"{name} fits two patterns of the recipe, {owner[name]!r} and "
                        f"{group.pattern!r}. Write patterns that share no weight."
                    )
                owner[name] = group.pattern
        return found
