"""The backbone and the images of a node, loaded once for all phases of a run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedcompo.backbone.backbone import load_backbone
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.data import DataConfig
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData, client_names, client_share, folder_share
from fedcompo.data.shards import dealt
from fedcompo.data.tasks import check_whole
from fedcompo.errors import DataError, FedcompoError
from fedcompo.names import check_client_name

load_shared_backbone = lru_cache(maxsize=1)(load_backbone)
"""Loads the backbone once for all phases and clients of this process."""
simulated_names = lru_cache(maxsize=1)(client_names)
"""Names the clients of a source once: with a thousand folders, each look takes a while."""


@lru_cache(maxsize=2)
def load_images(
    config: DataConfig,
    preprocessing: Preprocessing,
    seed: int,
    own: str,
    partition: int,
    cache: Path,
    client: str = "",
    maps: Path | None = None,
    needed: int = 1,
) -> ClientData:
    """Load the images of one client once for all phases; raises ``DataError``.

    ``own`` is the folder or file of the node's own images; of a manifest of several clients it
    owns the rows of the client. Without one, it owns this part of the source; a negative part is
    none. Images of files are kept in the folder ``cache``, for the later phases. With ``maps``, the
    folder of the map from sample to shard, they are dealt to shards, each of which needs so many
    images of a class.
    """
    cap = config.images_per_class
    if own:
        share = folder_share(own, seed=seed, images_per_class=cap, client=client)
    elif partition < 0:
        raise DataError.public(
            "This node says neither where its images are nor which part of `data` it owns. "
            'Start it with --node-config \'client="name" data="/path/of/its/images"\'.'
        )
    else:
        share = client_share(config, partition=partition, seed=seed)
    if maps is None:
        return share.read(preprocessing, cache=cache)
    count, name = config.shards, check_whole(check_client_name(client or share.name))
    file = maps / f"{name}.shards-{count}.csv"
    share, dealing = dealt(share, count, seed=seed, cap=cap, needed=needed, file=file)
    return replace(share.read(preprocessing, cache=cache), shards=dealing)


def known_name(run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> str:
    """Name of a node's client before its images are read; empty if there is none.

    The name of a folder is one in a simulation alone: elsewhere nobody else knows it.
    """
    own = str(node_config.get("client", ""))
    partition = int(node_config.get("partition-id", -1))
    if not own and partition >= 0:
        with suppress(FedcompoError, IndexError):
            return simulated_names(RunConfig.parse(run_config).data)[partition]
    return own
