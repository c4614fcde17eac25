"""Selects what to compose: whose task vectors, with which coefficients and which head."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fedcompo.backbone.backbone import load_backbone
from fedcompo.backbone.stored import StoredBackbone, save_backbone
from fedcompo.composition.head import head_of
from fedcompo.composition.models import factor_of, stream_composition
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.run import RunConfig
from fedcompo.errors import BackboneMismatch, ConfigError, ContributionError
from fedcompo.method.contribution import Contribution, counts_of
from fedcompo.method.heads import Head
from fedcompo.method.pool import Pool
from fedcompo.registry.admission import admit, outliers
from fedcompo.registry.company import Company
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.state import ABOUT
from fedcompo.storage.files import BACKBONE

LARGEST_SCALE = 10
"""For each client; 1 gives the plain sum."""


@dataclass(frozen=True)
class Selection:
    """Contributions to compose, and with what."""

    pool: Pool
    backbone: StoredBackbone
    settings: CompositionSettings
    head: Head
    factor: float
    r""":math:`\lambda'` on the sum of the task vectors with the registry's own coefficients, or
    :math:`\lambda` on the mean with others."""
    coefficients: Mapping[str, float] | None = None
    """By client; None: the registry's own."""
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    @property
    def shares(self) -> dict[str, float]:
        """Coefficients w by client; they sum to one."""
        if self.coefficients is not None:
            return dict(self.coefficients)
        times = {c.client: self.settings.times(c.num_examples) for c in self.pool}
        return {client: count / sum(times.values()) for client, count in times.items()}

    @property
    def scale(self) -> float:
        r""":math:`\lambda`, as a multiple of the weighted mean."""
        if self.settings.scale is not None and self.settings.made_by.votes:
            return self.settings.scale
        if self.coefficients is not None:
            return self.factor
        return self.factor * sum(self.settings.times(c.num_examples) for c in self.pool)

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Compose the target weights, one at a time, in the order of names."""
        return stream_composition(
            self.pool, self.backbone, self.coefficients, self.settings, self.factor
        )


def from_registry(
    registry: RegistryReader,
    *,
    only: Sequence[str] = (),
    without: Sequence[str] = (),
    weights: Mapping[str, float] | None = None,
    scale: float | None = None,
    rule: str = "",
) -> Selection:
    """Select members of a registry.

    Args:
        registry: Registry of the members.
        only: Clients to take; empty: all, or all that have a weight.
        without: Clients to leave out.
        weights: Coefficients by client; None: the registry's own.
        scale: λ; None: as the registry composes it, after a removal of those who are left out; by
            another rule, that keeps the length of the task vectors.
        rule: Text of a rule; empty: the registry's own.

    Raises:
        ContributionError: If there is no such client, none is left, or weights do not fit.
        ConfigError: If λ is not positive, or far beyond the plain sum; if there is no such rule.
    """
    settings = _ruled(registry.settings, rule)
    members = registry.pool(with_fisher=bool(settings.made_by.needs))
    pool = _chosen(members, only, without, weights)
    settings = _scaled(settings, scale, len(pool))
    everyone = pool.clients == registry.clients and weights is None
    head = registry.joint_head() if everyone else head_of(pool, settings)
    return Selection(
        pool,
        registry.backbone,
        settings,
        head,
        _factor(registry, pool, settings, weights, everyone=everyone),
        weights,
        tuple(only),
        tuple(without),
    )


@contextmanager
def from_folders(
    folders: Sequence[Path],
    *,
    only: Sequence[str] = (),
    without: Sequence[str] = (),
    weights: Mapping[str, float] | None = None,
    scale: float | None = None,
    rule: str = "",
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
        rule: Text of a rule; empty: the mean.
        checkpoint: File of the pre-trained weights; empty: as in this run.
        max_norm_ratio: Refuse a task vector this many times longer than the median; 0: none.

    Raises:
        FileFormatError: If a folder holds no intact contribution.
        BackboneMismatch: If the pre-trained weights are not those of the contributions.
        ContributionError: If the contributions do not go together.
        ConfigError: If λ is not positive or far beyond the plain sum, there is no such rule, or
            settings of the run cannot be used.
    """
    wanted = _ruled(CompositionSettings(), rule).made_by
    with_fisher = bool(wanted.needs)
    members = [Contribution.open(f, with_fisher=with_fisher, check=True) for f in folders]
    if not members:
        raise ContributionError("There is nothing to compose; name at least one folder.")
    pool = _chosen(Pool(tuple(members)), only, without, weights)
    first = pool.contributions[0]
    named = {"checkpoint": checkpoint} if checkpoint else {}
    config = RunConfig.stored({**first.settings, **named})
    settings = _scaled(_ruled(CompositionSettings.of(config), rule), scale, len(pool))
    backbone = load_backbone(config.backbone)
    base = first.task_vector.base
    if backbone.fingerprint != base:
        raise BackboneMismatch(
            f"The contributions were trained on the backbone {base}, found is "
            f"{backbone.fingerprint}. Name the file of its weights with `--checkpoint`."
        )
    company = Company.on(backbone, settings).held_to(max_norm_ratio)
    for member in pool:
        company = company.joined({member.client: admit(member, company)})
    for reason in outliers(pool.clients, company).values():
        raise ContributionError(reason)
    settings = settings.with_caps(counts_of(member.statistics) for member in pool)
    with tempfile.TemporaryDirectory(prefix="fedcompo-") as temporary:
        path = Path(temporary) / BACKBONE
        save_backbone(path, backbone)
        stored = StoredBackbone(path)
        yield Selection(
            pool,
            stored,
            settings,
            head_of(pool, settings),
            factor_of(pool, stored, settings, weights).value,
            weights,
            tuple(only),
            tuple(without),
        )


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


def _chosen(
    pool: Pool, only: Sequence[str], without: Sequence[str], weights: Mapping[str, float] | None
) -> Pool:
    if only or (weights and not without):
        pool = pool.only(*(only or weights or ()))
    pool = pool.without(*without)
    pool.check_composable(weights)
    return pool


def _factor(
    registry: RegistryReader,
    pool: Pool,
    settings: CompositionSettings,
    weights: Mapping[str, float] | None,
    *,
    everyone: bool,
) -> float:
    """Return the factor of some members, as after a removal of the others."""
    same = settings.scale is None and settings.rule == registry.settings.rule
    if same and everyone:
        return registry.factor
    if same and registry.kept_factor is not None:
        together = sum(settings.times(c.num_examples) for c in pool)
        return registry.kept_factor * (1 if weights is None else together)
    return factor_of(pool, registry.backbone, settings, weights).value


def _ruled(settings: CompositionSettings, text: str) -> CompositionSettings:
    """Return settings by another rule, if one is named."""
    if not text:
        return settings
    rule = replace(settings, rule=text).made_by
    return replace(settings, rule=rule.text, scale=settings.scale if rule.votes else None)


def _scaled(
    settings: CompositionSettings, scale: float | None, members: int
) -> CompositionSettings:
    if scale is None:
        return settings
    if not (rule := settings.made_by).votes:
        raise ConfigError(f"The rule {rule.text} says λ itself; leave out `--scale`.")
    most = LARGEST_SCALE * members
    if not 0 < scale <= most:
        raise ConfigError(
            f"`scale` must be a positive number, got {scale:g}; for {members} clients {most} is "
            "the largest. To subtract a client's task vector, see `fedcompo negate`."
        )
    return replace(settings, scale=scale)
