"""Composes the models that an audit compares, and loads the client's images."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.tangent import feature_map
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData, Share, client_names, client_share, set_aside
from fedcompo.data.shards import dealt
from fedcompo.data.tasks import shard_of, whole_of
from fedcompo.errors import BackboneMismatch, ConfigError, DataError
from fedcompo.export.selection import from_registry
from fedcompo.method.contribution import Contribution, counts_of
from fedcompo.method.deltas import Weights
from fedcompo.method.features import extract_features
from fedcompo.method.heads import Head, zero_head
from fedcompo.method.images import Images, joined
from fedcompo.registry.reader import RegistryReader

BEFORE, AFTER, GOLD, REPAIRED = "before", "after", "gold", "repaired"
FROZEN = "frozen"
"""The pre-trained weights alone: what no client taught."""
MAY_DIFFER = {"device"}
"""Settings that a gold run may have otherwise."""
DERIVED = "class_cap", "client_cap"
"""Settings that follow from the first members' counts, where `max-count-ratio` is set."""


@dataclass(frozen=True)
class AuditedModel:
    """A composition in memory."""

    theta: Weights
    """Composed target weights, by name."""
    head: Head
    """Its joint head."""
    clients: tuple[str, ...]
    realigned: bool = False
    """Whether the head was made of features of the composed model."""
    linearised: bool = False
    """Whether it is composed of tangents."""

    def features(self, backbone: Backbone, images: Images) -> Tensor:
        """Features of uint8 images (count, ...), (count, features), float32, on the CPU."""
        forward = feature_map(backbone, self.theta, tangent=self.linearised)
        return extract_features(forward, images)


def audited_images(
    contribution: Contribution, backbone: Backbone, config: RunConfig, *, maps: Path | None = None
) -> ClientData:
    """Load a member's images and check that its contribution describes them.

    Args:
        contribution: The member's; it may be a shard of a client.
        backbone: Says what images must look like.
        config: Says which images.
        maps: Folder of the map from sample to shard; without a map, images are dealt anew, which
            the seed does as in a first run.

    Returns:
        Its test images, and of its training images those that it did not keep aside.

    Raises:
        DataError: If the client is not among them, or had other classes or, where these were sent
            without noise, other numbers of training images.
    """
    client, source, seed = contribution.client, config.data.data, config.seed
    names, whole = client_names(config.data), whole_of(client)
    if whole not in names:
        raise DataError(
            f"`data` {source!r} has no client {whole!r}, whose images the audit needs. "
            "Name the source of the run with `--data`."
        )
    share, dealing = client_share(config.data, partition=names.index(whole), seed=seed), None
    if (shard := shard_of(client)) is not None:
        share, dealing = _dealt(share, config, maps)
    data = replace(share.read(backbone.preprocessing), name=client, shards=dealing)
    data = data if shard is None else data.shard(shard)
    counts = torch.bincount(data.train.labels, minlength=len(data.classes)).tolist()
    trained_on = counts_of(contribution.statistics)
    at_hand = dict(zip(data.classes, counts, strict=True))
    noised = config.caps.dp_noise > 0  # then counts are not those of the images
    if at_hand.keys() != trained_on.keys() or (at_hand != trained_on and not noised):
        raise DataError(
            f"The training images of {client} in {source!r} are {at_hand}, by class, but it was "
            f"trained on {trained_on}. Name the images it was trained on with `--data`."
        )
    kept, _ = set_aside(data.train, share=config.train.aside, seed=seed, client=client)
    return replace(data, train=kept)


def _dealt(share: Share, config: RunConfig, maps: Path | None) -> tuple[Share, Tensor]:
    """Deal a client's images to its shards, by a copy of its map: the map is not changed."""
    count, cap = config.data.shards, config.data.images_per_class
    with TemporaryDirectory(prefix="fedcompo-") as folder:
        copy = Path(folder) / "map.csv"
        if maps is not None and (known := map_of(share.name, config, maps)).is_file():
            shutil.copyfile(known, copy)
        return dealt(share, count, seed=config.seed, cap=cap, needed=1, file=copy)


def map_of(client: str, config: RunConfig, maps: Path) -> Path:
    """Return where the map from a client's samples to its shards is kept, if it is there."""
    return maps / f"{whole_of(client)}.shards-{config.data.shards}.csv"


def audited_models(
    registry: RegistryReader, client: str, **others: RegistryReader | None
) -> dict[str, AuditedModel]:
    """Compose before, after and those of other registries, where there is one; by name.

    After the last member, nothing but the pre-trained weights is left.
    """
    after = frozen(registry)
    if registry.clients != (client,):
        left = from_registry(registry, without=(client,))
        pool, theta = left.pool, dict(left.stream())
        after = AuditedModel(theta, left.head, pool.clients, linearised=pool.linearised)
    return {
        BEFORE: _composition_of(registry),
        AFTER: after,
        **{name: _composition_of(other) for name, other in others.items() if other is not None},
    }


def frozen(registry: RegistryReader) -> AuditedModel:
    """Return the pre-trained weights, under a head of no class."""
    return AuditedModel({}, zero_head((), registry.backbone.num_features), ())


def all_images(data: ClientData) -> tuple[Images, Tensor]:
    """A client's images, training images first, (examples, ...), and labels, (examples,)."""
    parts = data.train, data.test
    return joined(*(p.images for p in parts)), torch.cat([p.labels for p in parts])


def distances_to_gold(models: Mapping[str, AuditedModel]) -> dict[str, float]:
    r"""Lengths :math:`\lVert\theta - \theta_{gold}\rVert_2` over all target weights, by model.

    Zero if and only if the weights are the same, bit for bit. Empty where there is no gold.
    """
    if GOLD not in models:
        return {}
    gold = models[GOLD].theta
    return {
        name: math.sqrt(
            sum(float((model.theta[w].double() - gold[w].double()).square().sum()) for w in gold)
        )
        for name, model in models.items()
        if name != GOLD
    }


def check_gold(registry: RegistryReader, gold: RegistryReader, client: str) -> None:
    """Refuse a gold registry that is not of the same run without the client.

    Raises:
        BackboneMismatch: If it is of another backbone.
        ConfigError: If its members or settings are not those expected, or none are.
    """
    expected, made = (
        _staying(registry, client),
        f"Make it by the same run with `exclude = {client}`.",
    )
    if gold.state.base != registry.state.base:
        raise BackboneMismatch(
            f"The gold registry {gold.path} is of the backbone {gold.state.base}, expected "
            f"{registry.state.base}. {made}"
        )
    if gold.clients != expected:
        raise ConfigError(
            f"The gold registry {gold.path} holds {', '.join(gold.clients) or 'nobody'}, expected "
            f"exactly {', '.join(expected)}. {made}"
        )
    ours, theirs = _comparable(registry, expected), _comparable(gold, expected)
    if differing := sorted(key for key in ours.keys() | theirs if ours.get(key) != theirs.get(key)):
        key, *more = differing
        raise ConfigError(
            f"The gold registry {gold.path} was made with other settings: {key} is "
            f"{theirs.get(key)!r}, expected {ours.get(key)!r}"
            f"{f' (and {len(more)} more)' if more else ''}. "
            "Only with the same settings does it show what the client's absence does."
        )


def check_repaired(registry: RegistryReader, repaired: RegistryReader, client: str) -> None:
    """Refuse a registry that is not a copy of this one from which the client was removed.

    Raises:
        ConfigError: If it is of another origin, has other members or none, or its journal has no
            removal.
    """
    expected = _staying(registry, client)
    removed = any(e.event == "removed" and client in e.clients for e in repaired.entries())
    if repaired.identity != registry.identity or repaired.clients != expected or not removed:
        raise ConfigError(
            f"The repaired registry {repaired.path} holds {', '.join(repaired.clients) or 'nobody'}"
            f", expected a copy of {registry.path} from which {client} was removed, and whose "
            f"others stay: {', '.join(expected)}. Copy the registry, and remove the client there "
            "by a run with `action = remove` and `repair-rounds`."
        )


def _staying(registry: RegistryReader, client: str) -> tuple[str, ...]:
    """Return the other members; refuses where there are none."""
    if registry.clients == (client,):
        raise ConfigError(
            f"{client} is the last member: without it the pre-trained weights are left, which no "
            "run is needed for. Leave `--gold` and `--repaired` out."
        )
    return tuple(name for name in registry.clients if name != client)


def _comparable(registry: RegistryReader, clients: Iterable[str]) -> dict[str, Any]:
    """Return the settings that a gold run shares, of the registry and of clients."""
    values = registry.settings.values
    derived = DERIVED if values.get("max_count_ratio") else ()
    settings = {f"the registry's {k}": v for k, v in values.items() if k not in derived}
    for client in clients:
        own = registry.contribution(client).settings
        settings |= {f"{key} of {client}": v for key, v in own.items() if key not in MAY_DIFFER}
    return settings


def _composition_of(registry: RegistryReader) -> AuditedModel:
    return AuditedModel(
        registry.theta_p(),
        registry.joint_head(),
        registry.clients,
        realigned=registry.realigned,
        linearised=registry.linearised,
    )
