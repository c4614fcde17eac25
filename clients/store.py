"""What a client keeps between rounds: its own task vector with its head, and its metric.

The server has a copy, so a lost store costs one more message and nothing else. The store is a
folder of files. Flower's client state would not do: it is lost when the node restarts, and silently
dropped above some 120 MB. The last round deletes the store.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fedcompo.config.run import RunConfig
from fedcompo.data.cache import cache_home
from fedcompo.data.shards import maps_beside
from fedcompo.engine.run_folder import LOGS
from fedcompo.errors import FileFormatError
from fedcompo.messages.requests import TrainRequest
from fedcompo.storage import tensorfile
from fedcompo.storage.tensorstream import save_streamed

logger = logging.getLogger(__name__)

HOME = "FEDCOMPO_STATE"
"""Environment variable with the folder of all stores on this machine."""


def store_home(stated: str = "") -> Path:
    """Folder of all stores: the node's setting, else ``FEDCOMPO_STATE``, else the user's own."""
    default = Path.home() / ".local" / "state" / "fedcompo"
    return Path(stated or os.environ.get(HOME, "") or default).expanduser()


def images_home(stated: str, *, keep: bool) -> Path:
    """Folder of decoded images: beside the stores, or where they outlast the run (`keep-cache`)."""
    return cache_home() if keep and not stated else store_home(stated) / "images"


def maps_home(stated: str, config: RunConfig) -> Path:
    """Folder of the maps from sample to shard: the node's own; a simulation's is its registry's.

    So a later run with that registry finds them. See :mod:`fedcompo.data.shards`.
    """
    if stated or not os.environ.get(LOGS):
        return store_home(stated) / "shards"
    return maps_beside(Path(config.registry.registry or Path(config.output, "registry")))


@dataclass(frozen=True)
class Store:
    """Tensors of one client in one federation, by name and digest."""

    folder: Path

    @classmethod
    def of(cls, home: Path, federation: str, client: str) -> Store:
        """The store of a client, in a folder of the federation's name, which the server gives.

        Raises:
            FileFormatError: If the federation's name could lead out of the folder.
        """
        if not federation.isalnum():
            raise FileFormatError.public(
                f"The server calls its federation {federation!r}, expected letters and digits. "
                "Use the same fedcompo version everywhere."
            )
        return cls(home / federation / client)

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Replace the tensors of a name; only this user can read the file.

        Returns:
            Their SHA-256, to recall them by; empty if they could not be written.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return save_streamed(self._file(name), tensors, {"content": name})
        except OSError as error:
            logger.warning("%s cannot be kept, and will be sent again: %s", name, error)
            return ""

    def recall(self, name: str, digest: str) -> dict[str, Tensor] | None:
        """Read tensors; None if they are missing or have another digest."""
        try:
            tensors, manifest = tensorfile.load(self._file(name))
        except FileFormatError:
            return None
        return tensors if manifest["tensors_sha256"] == digest else None

    def clear(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # another client of this machine keeps something
            self.folder.parent.rmdir()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def completed(request: TrainRequest, store: Store | None) -> tuple[TrainRequest, dict[str, str]]:
    """Add the tensors that the client has kept to a request; keep those that came with it.

    Returns:
        The request with all that the client has; SHA-256 of what it keeps, by name.
    """
    sent, holds = dict(request.sent), {}
    for name, digest in request.needs.items():
        if store is None:
            continue
        if name in sent:
            digest = store.keep(name, sent[name])
        elif kept := store.recall(name, digest):
            sent[name] = kept
        if digest:
            holds[name] = digest
    return replace(request, sent=sent), holds
