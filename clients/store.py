"""What a client keeps between rounds: its own task vector, and the metric that holds it.

The server has a copy of all of it, so losing a store costs one more message and nothing else. It
lies in files of the client's own, not in Flower's client state: that is lost when the node is
restarted, and silently dropped where it is larger than some 120 MB.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fedcompo import tensorfile
from fedcompo.errors import FileFormatError

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

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write tensors in the place of those of that name.

        Returns:
            Their SHA-256, by which they are asked for again.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        digest = tensorfile.tensor_digest(tensors)
        tensorfile.save(self._file(name), tensors, {"content": name})
        return digest

    def recall(self, name: str, digest: str) -> dict[str, Tensor] | None:
        """Read tensors; None if they are not there, or are others than those asked for."""
        try:
            tensors, _ = tensorfile.load(self._file(name))
        except (OSError, FileFormatError):
            return None
        return tensors if tensorfile.tensor_digest(tensors) == digest else None

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
