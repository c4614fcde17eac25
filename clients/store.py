"""What a client keeps between rounds: its own task vector, and the metric that holds it.

The server has a copy of all of it, so losing a store costs one more message and nothing else. It
lies in files of the client's own, not in Flower's client state: that is lost when the node is
restarted, and silently dropped where it is larger than some 120 MB. The last round clears it.
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

from fedcompo.errors import FileFormatError
from fedcompo.messages.requests import TrainRequest
from fedcompo.storage import tensorfile
from fedcompo.storage.tensorstream import save_streamed

logger = logging.getLogger(__name__)

HOME = "FEDCOMPO_STATE"
"""Environment variable with the folder of all stores on this machine."""


def store_home(stated: str = "") -> Path:
    """Folder of all stores: what the node states, else ``FEDCOMPO_STATE``, else the user's own."""
    default = Path.home() / ".local" / "state" / "fedcompo"
    return Path(stated or os.environ.get(HOME, "") or default).expanduser()


@dataclass(frozen=True)
class Store:
    """Tensors of one client in one federation, by what they are called and their digest."""

    folder: Path

    @classmethod
    def of(cls, home: Path, federation: str, client: str) -> Store:
        """The store of a client.

        Args:
            home: Folder of all stores.
            federation: What the server calls it.
            client: Name of the client.

        Raises:
            FileFormatError: If the federation's name could lead out of the folder.
        """
        if not federation.isalnum():
            raise FileFormatError(
                f"The server calls its federation {federation!r}, expected letters and digits. "
                "Use the same fedcompo version everywhere."
            )
        return cls(home / federation / client)

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write tensors in the place of those of that name, for nobody else to read.

        Returns:
            Their SHA-256, by which they are asked for again; empty if they could not be written.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return save_streamed(self._file(name), tensors, {"content": name})
        except OSError as error:
            logger.warning("%s cannot be kept, and will be sent again: %s", name, error)
            return ""

    def recall(self, name: str, digest: str) -> dict[str, Tensor] | None:
        """Read tensors; None if they are not there, or are others than those asked for."""
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
    """Add to a request what the client was left to keep, and keep what came along.

    Args:
        request: As it came.
        store: What this client keeps between rounds; None: nothing.

    Returns:
        The request with all that the client has of what it needs; SHA-256 of what it will keep.
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
