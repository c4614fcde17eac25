"""What clients and server keep between two rounds.

A client keeps the Fisher that anchors it and its own last task vector; the server sends only what
the client lacks. The server keeps each client's last task vector in a file, so that its memory does
not grow with the number of clients.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fedcompo.config.choices import Kind
from fedcompo.messages.body import TASK_VECTOR
from fedcompo.messages.requests import ANCHOR, OWN
from fedcompo.method.heads import Head, head_from
from fedcompo.method.task_vector import TaskVector
from fedcompo.storage.digests import content_digest
from fedcompo.storage.files import put_in_place
from fedcompo.storage.tensorstream import Section, StreamedTensors, save_streamed

ROUNDS = "rounds"
"""Folder of a run for the clients' last task vectors."""


@dataclass
class Holdings:
    """Compares what each client needs with what it keeps, by SHA-256."""

    current: dict[tuple[str, str], str] = field(default_factory=dict)
    """SHA-256 of what a client needs, by client and name; missing: not known yet."""
    kept: dict[str, dict[str, str]] = field(default_factory=dict)
    """SHA-256 of what a client keeps, by client and name."""

    def request(
        self, client: str, names: Iterable[str], wanted: Callable[[str, str], Mapping[str, Tensor]]
    ) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, str]]:
        """What a client is sent, and what it is to use.

        Args:
            client: Its name.
            names: Names of what it needs.
            wanted: Returns the server's copy, by client and name.

        Returns:
            The tensors of what it does not keep, and SHA-256 of all it needs, by name.
        """
        sent: dict[str, Mapping[str, Tensor]] = {}
        needs: dict[str, str] = {}
        for name in names:
            digest = self.current.get((client, name), "")
            if not digest or digest != self.kept.get(client, {}).get(name):
                copy = wanted(client, name)
                digest = self.current[client, name] = content_digest(copy)
                sent[name] = copy
            needs[name] = digest
        return sent, needs

    def sent(self, client: str, own: str, kept: Mapping[str, str]) -> None:
        """Note the digest of what a client sent, and the digests of what it says it keeps."""
        self.current[client, OWN], self.kept[client] = own, dict(kept)

    def lost(self, client: str) -> None:
        """Assume that a client keeps nothing."""
        self.kept.pop(client, None)

    def change_anchors(self) -> None:
        """Forget the digests of all anchors: they changed, and are sent again."""
        self.current = {at: digest for at, digest in self.current.items() if at[1] != ANCHOR}


@dataclass(frozen=True)
class LastSent:
    """The last task vector of each client, in one file; a new one lies beside it until accepted."""

    folder: Path

    def arrive(self, client: str, vector: TaskVector, own: Mapping[str, Tensor]) -> str:
        """Write a client's new task vector and head beside the last ones; returns their SHA-256.

        ``own`` are both, under the names of the message.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"content": "round", "kind": str(vector.kind), "base": vector.base}
        return save_streamed(self._arriving(client), own, about)

    def refuse(self, client: str) -> None:
        """Delete the new ones."""
        self._arriving(client).unlink()

    def take(self, client: str) -> None:
        """Let the new ones take the place of the last ones."""
        put_in_place(self._arriving(client), self._settled(client))

    def forget(self, client: str) -> None:
        """Delete the last ones."""
        self._settled(client).unlink()

    def read(
        self, client: str, kind: Kind, base: str, classes: tuple[str, ...], *, arriving: bool
    ) -> tuple[TaskVector, Head]:
        """Open a client's task vector, read weight by weight, and head: the last or new ones."""
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
