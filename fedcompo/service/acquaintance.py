"""A client insists on what it knows of a registry: its key, and that its journal only grows.

At the first call the key is pinned, as ``ssh`` pins that of a host. Afterwards another key, a
shorter journal, or one that does not continue the journal seen before is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedcompo.errors import ServiceError
from fedcompo.registry import known
from fedcompo.registry.checkpoint import Checkpoint
from fedcompo.registry.known import Known, Pins
from fedcompo.registry.rotation import Rotation
from fedcompo.registry.signing import fingerprint_of
from fedcompo.storage.files import write_atomically


@dataclass(frozen=True)
class Acquaintance:
    """What this machine knew of a server's registry before it called."""

    server: str
    """``host:port``."""
    pins: Pins

    def sequence(self, identity: str = "") -> int:
        """Number of the last line of the registry's journal that was seen; 0: none.

        Args:
            identity: The registry's; empty: of the one that the server had before.
        """
        seen = self.pins.registries.get(identity or self.pins.servers.get(self.server, ""))
        return seen.sequence if seen else 0

    def greet(self, reply: Any) -> Known:
        """Check what a server says of its registry, a ``ListReply``, and write down what is new.

        Raises:
            FileFormatError: If a key or a signed statement cannot be read.
            ServiceError: If it contradicts what is known.
        """
        identity, before = reply.identity, self.pins.servers.get(self.server)
        if before not in (None, identity):
            raise ServiceError(
                f"{self.server} had the registry {before}, and has {identity} now. If its operator "
                f"confirms that, delete the line of {self.server} in {known.place()}."
            )
        held = self.pins.registries.get(identity)
        former = self._follow(held, reply)
        fingerprint = fingerprint_of(reply.public_key)
        seen = held or Known(fingerprint)
        values = {**vars(seen), "fingerprint": fingerprint, "former": former}
        if reply.checkpoint:
            now = self._checked(reply, seen)
            values["checkpoint"] = reply.checkpoint.decode()
            values |= {n: getattr(now, n) for n in ("sequence", "root", "journal_sha256")}
        elif seen.checkpoint:
            raise ServiceError(
                f"{self.server} signs no checkpoint any more; it did at line {seen.sequence} of "
                "its journal. Ask its operator."
            )
        met = Known(**values)
        known.keep(identity, met, server=self.server)
        return met

    def _follow(self, held: Known | None, reply: Any) -> dict[str, int]:
        """Follow the registry's keys to the present one; returns those that it had before."""
        source = f"The rotation of a key that {self.server} sent"
        rotations = [Rotation.parse(data, source=source) for data in reply.rotations]
        befores = [rotation.before for rotation in rotations]
        linked = [*befores[1:], reply.public_key] == [rotation.after for rotation in rotations]
        ours = all(rotation.registry == reply.identity for rotation in rotations)
        if rotations and not (linked and ours):
            raise ServiceError(f"{self.server} sent changes of its key that do not lead to it.")
        former = {fingerprint_of(r.before): r.sequence for r in rotations}
        key = fingerprint_of(reply.public_key)
        if held is None or held.fingerprint in {*former, key}:
            return former
        raise ServiceError(
            f"The registry at {self.server} signs with another key: SHA-256 {key}, expected "
            f"{held.fingerprint}, pinned since {held.since}, and nothing signed by that key leads "
            "to the new one. Somebody may pose as the registry. Ask its operator for the "
            "fingerprint by another way; if the new one is right, delete the entry "
            f"{reply.identity} in {known.place()}."
        )

    def _checked(self, reply: Any, seen: Known) -> Checkpoint:
        """Check a signed checkpoint against the reply, and against the last one."""
        source = f"The checkpoint that {self.server} sent"
        now, envelope = Checkpoint.parse(reply.checkpoint, source=source)
        told = (now.registry, now.sequence, now.root)
        same = told == (reply.identity, reply.sequence, reply.root)
        if not (same and envelope.is_signed_by(reply.public_key)):
            raise ServiceError(f"{source} is not signed by its key, or is of another registry.")
        if seen.checkpoint:
            before, _ = Checkpoint.parse(seen.checkpoint.encode(), source=str(known.place()))
            if why := before.contradicts(now):
                raise ServiceError(
                    f"The registry at {self.server} was set back, or tells two stories: {why}. "
                    f"{self._proof(now, seen.checkpoint.encode(), reply.checkpoint)} Ask its "
                    "operator, and whether other members see the same root."
                )
        return now

    def _proof(self, now: Checkpoint, *signed: bytes) -> str:
        """Keep both checkpoints."""
        name = f"contradiction-{now.registry[:12]}-{now.time.replace(':', '')}"
        files = [known.place().with_name(f"{name}-{moment}.json") for moment in ("before", "now")]
        try:
            for file, data in zip(files, signed, strict=True):
                write_atomically(file, data)
        except OSError as error:
            return f"The two signed checkpoints, which prove it, could not be written: {error}."
        return f"Two signed checkpoints prove it: keep {files[0]} and {files[1]}."
