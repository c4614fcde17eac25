"""Fits one client's contribution on this machine: the two sides of a run without Flower's engine.

Client and server are those of a federation, loaded as Flower loads them: from the app's folder. So
the contribution has the bits that a run leaves of a lone newcomer.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from fedcompo.backbone.backbone import load_backbone
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Method
from fedcompo.config.run import BackboneConfig, RunConfig
from fedcompo.config.setting import Scalar
from fedcompo.data.tasks import shard_of, whole_of
from fedcompo.engine.launcher import add_to_path, find_app
from fedcompo.errors import ConfigError, ContributionError
from fedcompo.names import check_client_name
from fedcompo.registry.registry import Registry
from fedcompo.report.progress import step
from fedcompo.runtime import pick_device


def fit_alone(
    data: Path,
    output: Path,
    settings: Mapping[str, Scalar],
    *,
    registry: Path | None = None,
    client: str = "",
) -> dict[str, Any]:
    """Fit the contribution of one folder of images, as a newcomer to a registry or as the first.

    Args:
        data: Folder or file of the images; see :func:`fedcompo.data.client_data.load_folder`.
        output: An empty folder for the contribution.
        settings: Those that differ from the registry's, or from the defaults; paths absolute.
        registry: Folder of the registry that it is made for, which is only read; None: of none.
        client: The client's name; empty: that of the folder or file.

    Returns:
        JSON values: what was fitted, how accurate it is on the test images, and notes.

    Raises:
        FedcompoError: If a setting, the registry, the name or the images cannot be used.
    """
    name = check_client_name(client or (data.stem if data.is_file() else data.absolute().name))
    add_to_path(find_app())
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        step("loading the backbone")
        joined, config = _opened(registry, settings, scratch)
        if name in joined.clients and not config.registry.replace:
            raise ContributionError(
                f"Client {name!r} is in the registry {joined.path} already. Give another name "
                "(`--client`), or fit it anew with `--set replace=true`."
            )
        shard, shards = shard_of(name), config.data.shards
        if (shard is None) != (shards == 1) or (shard or 0) >= shards:
            raise ConfigError(
                f"`shards` is {shards}, and {name!r} cannot be fitted by it. A client with shards "
                "is fitted shard by shard, such as `--set shards=4 --client NAME.shard-2`; one "
                "without, by `--set shards=1` and a name of its own."
            )
        step("reading the images")
        local, apps, server = map(import_module, ("clients.local", "clients.work", "server.alone"))
        node = {"data": str(data), "client": whole_of(name)}
        backbone = joined.backbone.load(pick_device(config.device))
        own = local.LocalClient.from_node(config.flat(), node, backbone=backbone, shard=shard)
        step(f"training on {len(own.data.train.labels)} images")
        made, told = server.contribute(joined, config, name, apps.answering(own), scratch)
        shutil.copytree(made, output, dirs_exist_ok=True)
        return dict(told)


def _opened(
    path: Path | None, settings: Mapping[str, Scalar], scratch: Path
) -> tuple[Registry, RunConfig]:
    """Open the registry, or make an empty one to throw away; settle the settings."""
    if path is None:
        config = RunConfig.parse(settings)
        backbone = load_backbone(config.backbone)
        composing, key = CompositionSettings.of(config), scratch / "key.pem"
        registry = Registry.create(scratch / "registry", backbone, composing, key=key, pinned=False)
    else:
        registry = Registry(path)
        own = _settings_of(registry)
        config = RunConfig.parse({**own, **settings})
        if config.backbone != RunConfig.parse(own).backbone:
            keys = ", ".join(sorted(settings.keys() & BackboneConfig().__dict__.keys()))
            raise ConfigError(
                f"The registry {path} has a backbone; leave out --set {keys}, or --registry."
            )
        registry.settings.check_run(config)
    if config.method.method is not Method.ITA:
        raise ConfigError(
            f"`method` is {config.method.method}, which trains in rounds with others. Alone, a "
            "client is fitted by `--set method=ita`."
        )
    return registry, config


def _settings_of(registry: Registry) -> dict[str, Scalar]:
    """The settings that the members of a registry were trained with, and its own."""
    own, backbone = registry.settings, registry.backbone
    if registry.clients:
        values = RunConfig.stored(registry.card(registry.clients[0])["settings"]).flat()
    else:
        targets = ",".join(backbone.target_weights)
        name = str(backbone.tensors.manifest["name"])
        values = {"backbone": name, "target-weights": targets, "statistics": str(own.statistics)}
    ratios = {"max-count-ratio": own.max_count_ratio, "max-norm-ratio": own.max_norm_ratio}
    return {**values, **ratios}
