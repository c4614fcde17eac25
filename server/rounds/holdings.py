"""What clients keep between rounds, as far as the server knows; what they lack, it sends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedcompo.messages.records import prefixed
from fedcompo.storage import tensorfile

ANCHOR, OWN = "anchor", "own"
"""The metric; a client's own last task vector, with its head."""


@dataclass
class Holdings:
    """Compares what each client needs with what it said it would keep; by SHA-256."""

    current: dict[tuple[str, str], str] = field(default_factory=dict)
    """Of what a client needs, by client and name; missing: not known yet."""
    kept: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of what a client keeps, by client and name."""

    def request(
        self, client: str, names: Iterable[str], wanted: Callable[[str, str], Mapping[str, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What to send a client, and what to ask it to use.

        Args:
            client: Its name.
            names: Of what it needs.
            wanted: Makes the server's copy, given client and name.

        Returns:
            Tensors that it does not keep, each under its name; SHA-256 of all it needs, by name.
        """
        tensors: dict[str, Tensor] = {}
        needs: dict[str, str] = {}
        for name in names:
            digest = self.current.get((client, name), "")
            if not digest or digest != self.kept.get(client, {}).get(name):
                copy = wanted(client, name)
                digest = self.current[client, name] = tensorfile.tensor_digest(copy)
                tensors |= prefixed(name, copy)
            needs[name] = digest
        return tensors, needs

    def sent(self, client: str, own: str, kept: Mapping[str, str]) -> None:
        """Take note of what a client sent, and of what it says it keeps."""
        self.current[client, OWN], self.kept[client] = own, dict(kept)

    def lost(self, client: str) -> None:
        """Count on nothing that a client keeps."""
        self.kept.pop(client, None)

    def change_anchors(self) -> None:
        """Let all clients be sent their metrics anew."""
        self.current = {at: digest for at, digest in self.current.items() if at[1] != ANCHOR}
