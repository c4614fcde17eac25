"""The task vector and head that each client sent last, in files: memory does not grow with them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fedcompo.config.choices import Kind
from fedcompo.method.heads import Head
from fedcompo.method.task_vector import TaskVector
from fedcompo.storage.files import put_in_place
from fedcompo.storage.tensorstream import Section, StreamedTensors, save_streamed


@dataclass(frozen=True)
class LastSent:
    """A folder with a file a client; what has just come lies beside it until it is taken."""

    folder: Path

    def arrive(self, client: str, vector: TaskVector, tensors: Mapping[str, Tensor]) -> str:
        """Put what a client sent beside what it sent before.

        Args:
            client: Its name.
            vector: Its task vector.
            tensors: Its answer's: task vector and head, under the names they travelled by.

        Returns:
            SHA-256 of the tensors.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        own = {n: t for n, t in tensors.items() if n.split("/")[0] in ("task_vector", "head")}
        about = {"content": "round", "kind": str(vector.kind), "base": vector.base}
        return save_streamed(self._arriving(client), own, about)

    def refuse(self, client: str) -> None:
        """Delete what has just come."""
        self._arriving(client).unlink()

    def take(self, client: str) -> None:
        """Let what has just come take the place of what was sent before."""
        put_in_place(self._arriving(client), self._settled(client))

    def forget(self, client: str) -> None:
        """Delete what a client sent last."""
        self._settled(client).unlink()

    def read(
        self, client: str, kind: Kind, base: str, classes: tuple[str, ...], *, arriving: bool
    ) -> tuple[TaskVector, Head]:
        """Open what a client sent; the task vector is read weight by weight, when it is needed.

        Args:
            client: Its name.
            kind: Of its task vector.
            base: Fingerprint of the pre-trained weights.
            classes: Rows of its head.
            arriving: What has just come, not what was taken.
        """
        path = self._arriving(client) if arriving else self._settled(client)
        tensors = StreamedTensors(path)
        vector = TaskVector(kind, Section(tensors, "task_vector"), base)
        return vector, Head(classes, tensors["head/weight"], tensors["head/bias"])

    def clear(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _settled(self, client: str) -> Path:
        return self.folder / f"{client}.safetensors"

    def _arriving(self, client: str) -> Path:
        return self.folder / f"{client}.arriving"
