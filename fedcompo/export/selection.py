"""Selects what to compose: whose task vectors, with which coefficients and which head."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fedcompo.backbone.backbone import load_backbone
from fedcompo.backbone.stored import StoredBackbone, save_backbone
from fedcompo.composition.head import head_of
from fedcompo.composition.models import factor_of
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.run import RunConfig
from fedcompo.errors import BackboneMismatch, ConfigError, ContributionError
from fedcompo.export.recipe import FROM_FILE, MEMBERS, Recipe
from fedcompo.export.selected import Selection
from fedcompo.method.contribution import Contribution, counts_of
from fedcompo.method.heads import Head
from fedcompo.method.pool import Pool
from fedcompo.registry.admission import admit, outliers
from fedcompo.registry.company import Company
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.state import ABOUT
from fedcompo.storage.files import BACKBONE, REALIGNED

LARGEST_SCALE = 10
"""For each client; 1 gives the plain sum."""


def from_registry(
    registry: RegistryReader,
    *,
    only: Sequence[str] = (),
    without: Sequence[str] = (),
    weights: Mapping[str, float] | None = None,
    scale: float | None = None,
    recipe: Recipe | None = None,
) -> Selection:
    """Select members of a registry.

    Args:
        registry: Registry of the members.
        only: Clients to take; empty: all, or all that have a weight.
        without: Clients to leave out.
        weights: Coefficients by client; None: the registry's own.
        scale: λ; None: as the registry composes it, after a removal of those who are left out.
        recipe: Says all of this, in place of it.

    Raises:
        ContributionError: If there is no such client, none is left, or weights do not fit; if the
            recipe names other contributions, or statistics that the registry has not.
        BackboneMismatch: If the recipe is for other pre-trained weights.
        ConfigError: If λ is not positive, or far beyond the plain sum; if a pattern of the recipe
            fits no weight.
    """
    asked = _asked(registry.pool(), only, without, weights, scale, recipe)
    asked.check(registry.backbone)
    settings = asked.settled(registry.settings)
    head, made_of = _head(registry, asked, settings)
    factor = asked.recipe.factor or _factor(registry, asked, settings)
    return asked.selection(registry.backbone, settings, head, made_of, factor)


@contextmanager
def from_folders(
    folders: Sequence[Path],
    *,
    only: Sequence[str] = (),
    without: Sequence[str] = (),
    weights: Mapping[str, float] | None = None,
    scale: float | None = None,
    recipe: Recipe | None = None,
    checkpoint: str = "",
    max_norm_ratio: float = 0.0,
) -> Iterator[Selection]:
    """Select contributions that lie in folders of their own; no registry, no server.

    Args:
        folders: One contribution each; every byte is checked.
        only: Clients to take; empty: all, or all that have a weight.
        without: Clients to leave out.
        weights: Coefficients by client; None: those of the run of the first by name.
        scale: λ; None: that keeps the length of the task vectors, or 1 with mixtures.
        recipe: Says all of this, in place of it.
        checkpoint: File of the pre-trained weights; empty: as in this run.
        max_norm_ratio: Refuse a task vector this many times longer than the median; 0: none.

    Raises:
        FileFormatError: If a folder holds no intact contribution.
        BackboneMismatch: If the pre-trained weights are not those of the contributions.
        ContributionError: If the contributions do not go together, or the recipe names others.
        ConfigError: If λ is not positive or far beyond the plain sum, or the recipe or settings of
            the run cannot be used.
    """
    members = [Contribution.open(folder, with_fisher=False, check=True) for folder in folders]
    if not members:
        raise ContributionError("There is nothing to compose; name at least one folder.")
    asked = _asked(Pool(tuple(members)), only, without, weights, scale, recipe)
    first = asked.pool.contributions[0]
    named = {"checkpoint": checkpoint} if checkpoint else {}
    config = RunConfig.stored({**first.settings, **named})
    settings = asked.settled(CompositionSettings.of(config))
    backbone = load_backbone(config.backbone)
    base = first.task_vector.base
    if backbone.fingerprint != base:
        raise BackboneMismatch(
            f"The contributions were trained on the backbone {base}, found is "
            f"{backbone.fingerprint}. Name the file of its weights with `--checkpoint`."
        )
    company = Company.on(backbone, settings).held_to(max_norm_ratio)
    for member in asked.everyone:
        company = company.joined({member.client: admit(member, company)})
    for reason in outliers(asked.pool.clients, company).values():
        raise ContributionError(reason)
    settings = settings.with_caps(counts_of(member.statistics) for member in asked.pool)
    with tempfile.TemporaryDirectory(prefix="fedcompo-") as temporary:
        path = Path(temporary) / BACKBONE
        save_backbone(path, backbone)
        stored = StoredBackbone(path)
        asked.check(stored)
        head = _head_of_members(asked, settings)
        factor = asked.recipe.factor or factor_of(asked.pool, stored, settings, asked.weights).value
        yield asked.selection(stored, settings, head, MEMBERS, factor)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to write to, and put it at ``path`` when all went well.

    Raises:
        ConfigError: If something is there already, or it is no place to put a folder.
    """
    place = path.resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} holds something already; name a new folder.")
    if place == Path.cwd():
        raise ConfigError(f"{path} is where you stand; name a new folder.")
    if home := next((p for p in place.parents if (p / ABOUT).is_file()), None):
        raise ConfigError(f"{path} lies in the registry {home}; name a folder outside.")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield draft
        draft.chmod(0o755)
        draft.rename(path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


@dataclass(frozen=True)
class _Asked:
    """Who is to be composed, and how; options are a recipe of their own."""

    pool: Pool
    recipe: Recipe
    only: tuple[str, ...]
    without: tuple[str, ...]
    negated: Contribution | None

    @property
    def everyone(self) -> Iterator[Contribution]:
        """Those who are composed, and who is subtracted."""
        yield from self.pool
        if self.negated is not None:
            yield self.negated

    @property
    def weights(self) -> Mapping[str, float] | None:
        """Coefficients by client; None: the registry's own."""
        return self.recipe.weights

    def settled(self, settings: CompositionSettings) -> CompositionSettings:
        """Return settings with what was asked for in place of their own."""
        settings, scale = self.recipe.settled(settings), self.recipe.chosen_scale
        if self.recipe.factor:
            scale = self.recipe.factor * sum(settings.times(c.num_examples) for c in self.pool)
        return settings if scale is None else replace(settings, scale=scale)

    def check(self, backbone: StoredBackbone) -> None:
        """Refuse what the recipe was not made for, before anything is composed."""
        digests = {c.client: c.tensors_sha256 for c in self.everyone}
        self.recipe.check_sources(backbone.fingerprint, digests)
        self.recipe.grouped(backbone.target_weights)

    def selection(
        self,
        backbone: StoredBackbone,
        settings: CompositionSettings,
        head: Head,
        made_of: str,
        factor: float,
    ) -> Selection:
        """Return what is composed."""
        return Selection(
            self.pool,
            backbone,
            settings,
            head=head,
            made_of=made_of,
            factor=factor,
            recipe=self.recipe,
            only=self.only,
            without=self.without,
            negated=self.negated,
        )


def _asked(
    everyone: Pool,
    only: Sequence[str],
    without: Sequence[str],
    weights: Mapping[str, float] | None,
    scale: float | None,
    recipe: Recipe | None,
) -> _Asked:
    """Choose clients.

    Raises:
        ContributionError: If there is no such client, none is left, or weights do not fit.
        ConfigError: If λ is not positive, or far beyond the plain sum.
    """
    negated = None
    if recipe is not None:
        only, weights = tuple(recipe.members), recipe.weights
        if recipe.negated is not None:
            (negated,) = everyone.only(recipe.negated.client)
            without = () if only or weights else (negated.client,)
    pool = everyone
    if only or (weights and not without):
        pool = pool.only(*(only or weights or ()))
    pool = pool.without(*without)
    free = recipe is not None and not recipe.normalise
    pool.check_composable(weights, normalise=not free)
    for group in () if recipe is None else recipe.groups:
        pool.check_composable(group.weights, normalise=not free)
    if recipe is None:
        recipe = Recipe(weights=weights, scale=_checked(scale, len(pool)))
    return _Asked(pool, recipe, tuple(only), tuple(without), negated)


def _checked(scale: float | None, members: int) -> float:
    """Return λ, or 0 where it is open."""
    most = LARGEST_SCALE * members
    if scale is not None and not 0 < scale <= most:
        raise ConfigError(
            f"`scale` must be a positive number, got {scale:g}; for {members} clients {most} is "
            "the largest. To subtract a client's task vector, see `fedcompo negate`."
        )
    return scale or 0.0


def _head(
    registry: RegistryReader, asked: _Asked, settings: CompositionSettings
) -> tuple[Head, str]:
    """Return the joint head and what it is made of: of everyone, that of the registry."""
    realigned = registry.state.files.get(REALIGNED)
    own = MEMBERS if realigned is None else f"{FROM_FILE}{realigned}"
    asked_for = asked.recipe.head == own != MEMBERS
    as_it_is = asked_for or not (asked.recipe.head or asked.recipe.settings)
    if as_it_is and asked.pool.clients == registry.clients and asked.weights is None:
        return registry.joint_head(), own
    return _head_of_members(asked, settings), MEMBERS


def _head_of_members(asked: _Asked, settings: CompositionSettings) -> Head:
    if asked.recipe.head not in ("", MEMBERS):
        raise ContributionError(
            "The recipe's joint head was made again, of features of the composed model (SHA-256 "
            f"{asked.recipe.head.removeprefix(FROM_FILE)}): they lie in a registry, and not here. "
            'Name the registry as it was then, or write `head = "members"` into the recipe for '
            "a head of the members' own statistics, which is another one."
        )
    return head_of(asked.pool, settings)


def _factor(registry: RegistryReader, asked: _Asked, settings: CompositionSettings) -> float:
    """Return the factor of some members, as after a removal of the others."""
    open_still = settings.scale is None and not asked.recipe.settings
    if open_still and asked.pool.clients == registry.clients and asked.weights is None:
        return registry.factor
    if open_still and registry.kept_factor is not None:
        together = sum(settings.times(c.num_examples) for c in asked.pool)
        return registry.kept_factor * (1 if asked.weights is None else together)
    return factor_of(asked.pool, registry.backbone, settings, asked.weights).value
