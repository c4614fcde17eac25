"""Selects what to compose: whose task vectors, with which coefficients and which head."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Unpack

from fedcompo.backbone.backbone import load_backbone
from fedcompo.backbone.stored import StoredBackbone, save_backbone
from fedcompo.composition.head import head_of
from fedcompo.composition.models import factor_of, times_of
from fedcompo.composition.rules.parsing import parse_rule
from fedcompo.composition.settings import MEAN, CompositionSettings
from fedcompo.config.run import RunConfig
from fedcompo.errors import BackboneMismatch, ConfigError, ContributionError
from fedcompo.export.recipe import FROM_FILE, MEMBERS
from fedcompo.export.selected import Asked, Options, Selection
from fedcompo.method.contribution import Contribution, counts_of
from fedcompo.method.heads import Head
from fedcompo.method.pool import Pool
from fedcompo.registry.admission import admit, outliers
from fedcompo.registry.company import Company
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.state import ABOUT
from fedcompo.storage.files import BACKBONE, REALIGNED, completed, is_free


def from_registry(registry: RegistryReader, **choice: Unpack[Options]) -> Selection:
    """Select members of a registry.

    Args:
        registry: Registry of the members.
        choice: See :class:`~fedcompo.export.selected.Options`. A scale that is open is that of the
            registry after a removal of those who are left out; by another rule, that which keeps
            the length of the task vectors.

    Raises:
        ContributionError: If there is no such client, none is left, or weights do not fit; if the
            recipe names other contributions, or statistics that the registry has not.
        BackboneMismatch: If the recipe is for other pre-trained weights.
        ConfigError: If λ is not positive, or far beyond the plain sum; if there is no such rule; if
            a pattern of the recipe fits no weight.
    """
    members = registry.pool(with_fisher=_needs_fisher(choice, registry.settings.rule))
    asked = Asked.of(members, **choice)
    settings = asked.settled(registry.settings)
    asked.recipe.check_sources(registry.backbone.fingerprint, asked.everyone)
    asked.recipe.grouped(registry.backbone.target_weights)
    head, made_of = _head(registry, asked, settings)
    factor = asked.recipe.factor or _factor(registry, asked, settings)
    return Selection(
        **vars(asked),
        backbone=registry.backbone,
        settings=settings,
        head=head,
        made_of=made_of,
        factor=factor,
    )


@contextmanager
def from_folders(
    folders: Sequence[Path],
    *,
    checkpoint: str = "",
    max_norm_ratio: float = 0.0,
    **choice: Unpack[Options],
) -> Iterator[Selection]:
    """Select contributions that lie in folders of their own; no registry, no server.

    Args:
        folders: One contribution each; every tensor that is used is checked.
        checkpoint: File of the pre-trained weights; empty: as in this run.
        max_norm_ratio: Refuse a task vector this many times longer than the median; 0: none.
        choice: As of :func:`from_registry`; without weights, coefficients are those of the run of
            the first by name; a scale that is open keeps the length of the task vectors, or is 1
            with mixtures.

    Raises:
        FileFormatError: If a folder holds no intact contribution.
        BackboneMismatch: If the pre-trained weights are not those of the contributions.
        ContributionError: If the contributions do not go together, or the recipe names others.
        ConfigError: If λ is not positive or far beyond the plain sum, there is no such rule, or the
            recipe or settings of the run cannot be used.
    """
    with_fisher = _needs_fisher(choice, MEAN)
    members = [Contribution.open(f, with_fisher=with_fisher) for f in folders]
    if not members:
        raise ContributionError("There is nothing to compose; name at least one folder.")
    asked = Asked.of(Pool(tuple(members)), **choice)
    pool, first = asked.pool, asked.pool.contributions[0]
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
    asked.recipe.check_sources(base, asked.everyone)
    asked.recipe.grouped(backbone.theta_0)
    company = Company.on(backbone, settings).held_to(max_norm_ratio)
    for member in asked.everyone:
        company = company.joined({member.client: admit(member, company)})
    for reason in outliers(pool.clients, company).values():
        raise ContributionError(reason)
    settings = settings.with_caps(counts_of(member.statistics) for member in pool)
    with tempfile.TemporaryDirectory(prefix="fedcompo-") as temporary:
        path = Path(temporary) / BACKBONE
        save_backbone(path, backbone)
        stored = StoredBackbone(path)
        head = _head_of_members(asked, settings)
        factor = asked.recipe.factor or factor_of(pool, stored, settings, asked.coefficients).value
        yield Selection(
            **vars(asked),
            backbone=stored,
            settings=settings,
            head=head,
            made_of=MEMBERS,
            factor=factor,
        )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to write to, and put it at ``path`` when all went well.

    Raises:
        ConfigError: If something is there already, or it is no place to put a folder.
    """
    place = path.resolve()
    if not is_free(path):
        raise ConfigError(f"{path} holds something already; name a new folder.")
    if place == Path.cwd():
        raise ConfigError(f"{path} is where you stand; name a new folder.")
    if home := next((p for p in place.parents if (p / ABOUT).is_file()), None):
        raise ConfigError(f"{path} lies in the registry {home}; name a folder outside.")
    with completed(path) as draft:
        yield draft


def _needs_fisher(choice: Options, own: str) -> bool:
    recipe = choice.get("recipe")
    rule = choice.get("rule") if recipe is None else recipe.rule
    return bool(parse_rule(rule or own).needs)


def _head(
    registry: RegistryReader, asked: Asked, settings: CompositionSettings
) -> tuple[Head, str]:
    """Return the joint head and what it is made of: of everyone, that of the registry."""
    realigned = registry.state.files.get(REALIGNED)
    own = MEMBERS if realigned is None else f"{FROM_FILE}{realigned}"
    asked_for = asked.recipe.head == own != MEMBERS
    as_it_is = asked_for or not (asked.recipe.head or asked.recipe.settings)
    if as_it_is and asked.pool.clients == registry.clients and asked.coefficients is None:
        return registry.joint_head(), own
    return _head_of_members(asked, settings), MEMBERS


def _head_of_members(asked: Asked, settings: CompositionSettings) -> Head:
    if asked.recipe.head not in ("", MEMBERS):
        raise ContributionError(
            "The recipe's joint head was made again, of features of the composed model (SHA-256 "
            f"{asked.recipe.head.removeprefix(FROM_FILE)}): they lie in a registry, and not here. "
            'Name the registry as it was then, or write `head = "members"` into the recipe for '
            "a head of the members' own statistics, which is another one."
        )
    return head_of(asked.pool, settings)


def _factor(registry: RegistryReader, asked: Asked, settings: CompositionSettings) -> float:
    """Return the factor of some members, as after a removal of the others."""
    open_still = settings.scale is None and not asked.recipe.settings
    open_still = open_still and settings.rule == registry.settings.rule
    if open_still and asked.pool.clients == registry.clients and asked.coefficients is None:
        return registry.factor
    if open_still and registry.kept_factor is not None:
        together = sum(times_of(asked.pool, settings).values())
        return registry.kept_factor * (1 if asked.coefficients is None else together)
    return factor_of(asked.pool, registry.backbone, settings, asked.coefficients).value
