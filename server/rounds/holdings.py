"""What clients keep between rounds, as far as the server knows; what they lack, it sends.

The task vector and head that each client sent last, in files: memory does not grow with them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fedcompo.config.choices import Kind
from fedcompo.messages.requests import ANCHOR, OWN, TASK_VECTOR
from fedcompo.method.heads import Head, head_from
from fedcompo.method.task_vector import TaskVector
from fedcompo.storage import tensorfile
from fedcompo.storage.files import put_in_place
from fedcompo.storage.tensorstream import Section, StreamedTensors, save_streamed


@dataclass
class Holdings:
    """Compares what each client needs with what it said it would keep; by SHA-256."""

    current: dict[tuple[str, str], str] = field(default_factory=dict)
    """Of what a client needs, by client and name; missing: not known yet."""
    kept: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of what a client keeps, by client and name."""

    def request(
        self, client: str, names: Iterable[str], wanted: Callable[[str, str], Mapping[str, Tensor]]
    ) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, str]]:
        """What to send a client, and what to ask it to use.

        Args:
            client: Its name.
            names: Of what it needs.
            wanted: Makes the server's copy, given client and name.

        Returns:
            The tensors of what it does not keep, and SHA-256 of all it needs, by name.
        """
        sent: dict[str, Mapping[str, Tensor]] = {}
        needs: dict[str, str] = {}
        for name in names:
            digest = self.current.get((client, name), "")
            if not digest or digest != self.kept.get(client, {}).get(name):
                copy = wanted(client, name)
                digest = self.current[client, name] = tensorfile.tensor_digest(copy)
                sent[name] = copy
            needs[name] = digest
        return sent, needs

    def sent(self, client: str, own: str, kept: Mapping[str, str]) -> None:
        """Take note of what a client sent, and of what it says it keeps."""
        self.current[client, OWN], self.kept[client] = own, dict(kept)

    def lost(self, client: str) -> None:
        """Count on nothing that a client keeps."""
        self.kept.pop(client, None)

    def change_anchors(self) -> None:
        """Let all clients be sent their metrics anew."""
        self.current = {at: digest for at, digest in self.current.items() if at[1] != ANCHOR}


@dataclass(frozen=True)
class LastSent:
    """A folder with a file a client; what has just come lies beside it until it is taken."""

    folder: Path

    def arrive(self, client: str, vector: TaskVector, own: Mapping[str, Tensor]) -> str:
        """Put what a client sent beside what it sent before.

        Args:
            client: Its name.
            vector: Its task vector.
            own: Task vector and head, under the names they travelled by.

        Returns:
            SHA-256 of the tensors.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
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
        vector = TaskVector(kind, Section(tensors, TASK_VECTOR), base)
        return vector, head_from(tensors, classes)

    def clear(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _settled(self, client: str) -> Path:
        return self.folder / f"{client}.safetensors"

    def _arriving(self, client: str) -> Path:
        return self.folder / f"{client}.arriving"
