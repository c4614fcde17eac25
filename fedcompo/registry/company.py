"""Who is there already, as far as a newcomer's checks need it, and what a newcomer may cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from fedcompo.composition.settings import CompositionSettings
from fedcompo.method.deltas import Weights
from fedcompo.method.ranges import MOST_IMAGES
from fedcompo.registry.owners import Owners, owners_in
from fedcompo.registry.removed import Removed

if TYPE_CHECKING:
    from fedcompo.backbone.backbone import Backbone
    from fedcompo.registry.reader import RegistryReader


@dataclass(frozen=True)
class Limits:
    """What a contribution may ask for."""

    classes: int = 10_000
    """Classes of one contribution."""
    class_names: int = 1 << 20
    """Bytes of their names, which stand in the journal."""
    all_classes: int = 20_000
    """Classes of all members."""
    drawn_classes: int = 256
    """The same with mixtures: the time of the head, which is fitted to features drawn of every
    class, grows with the square."""
    components: int = 256
    """Gaussians in a mixture."""
    examples: int = MOST_IMAGES
    """Images in all."""
    lineage: int = 4096
    """Names in each list of a lineage."""
    settings: int = 1 << 16
    """Bytes of the settings, as JSON."""


LIMITS = Limits()


@dataclass(frozen=True)
class Known:
    """What the door has to know of those who are there."""

    classes: tuple[str, ...]
    norm: float | None = None
    """Length of its task vector; None: not known."""
    rounded_sha256: str = ""
    """Digest of its task vector, see :class:`~fedcompo.registry.state.Member`; empty: not known."""


@dataclass(frozen=True)
class Company:
    """What a contribution has to go together with."""

    settings: CompositionSettings
    base: str
    """Fingerprint of the pre-trained weights."""
    num_features: int
    shapes: Weights
    """The target weights; only their shapes matter."""
    weights: Mapping[str, Tensor]
    """The target weights, perhaps among others; read when they are used."""
    members: Mapping[str, Known] = field(default_factory=dict)
    """By client; one of the same name as the newcomer is what it replaces."""
    owners: Owners = field(default_factory=dict)
    """Clients that may have a class, by class; an open one is not named."""
    removed: Removed = field(default_factory=Removed)
    """What nobody may bring back under another name."""

    @classmethod
    def of(cls, registry: RegistryReader, backbone: Backbone | None = None) -> Company:
        """The members of a registry; its backbone may be in memory already."""
        state, stored = registry.state, registry.backbone
        members = {
            client: Known(m.classes, m.norm, m.rounded_sha256)
            for client, m in state.members.items()
        }
        owners = owners_in(registry.path)
        if backbone is not None:
            company = cls.on(backbone, state.settings)
        else:
            shapes, width = stored.theta_shapes, stored.num_features
            company = cls(state.settings, state.base, width, shapes, stored.tensors)
        return replace(company, members=members, owners=owners, removed=Removed(registry))

    @classmethod
    def on(cls, backbone: Backbone, settings: CompositionSettings) -> Company:
        """Nobody yet, on a backbone in memory."""
        theta_0, width = backbone.theta_0, backbone.num_features
        return cls(settings, backbone.fingerprint, width, theta_0, theta_0)

    def held_to(self, ratio: float) -> Company:
        """The same with the stricter of two ratios of norms; 0: none."""
        ratios = filter(None, (ratio, self.settings.max_norm_ratio))
        settings = replace(self.settings, max_norm_ratio=min(ratios, default=0.0))
        return replace(self, settings=settings)

    def joined(self, newcomers: Mapping[str, Known]) -> Company:
        """The same with newcomers, each in the place of a member of its name."""
        return replace(self, members={**self.members, **newcomers})
