"""A checkpoint: the registry's root and the end of its journal at one moment, signed.

Who keeps one, or finds it published, notices when the registry is set back or rewritten. Two of one
registry that contradict each other prove that whoever has its key told two stories.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedcompo.errors import FileFormatError
from fedcompo.registry.envelope import Envelope, opened, sealed, statement_of
from fedcompo.registry.journal import utc_now

if TYPE_CHECKING:
    from fedcompo.registry.signing import Signer
    from fedcompo.registry.state import State

PREDICATE = "https://fedcompo.org/checkpoint/v1"


@dataclass(frozen=True)
class Checkpoint:
    """What a registry states of itself."""

    registry: str
    """Its identity."""
    root: str
    sequence: int
    """Number of the journal's last line."""
    journal_sha256: str
    """SHA-256 of that line."""
    time: str
    """UTC, ISO 8601."""
    earlier: tuple[int, str]
    """Number and SHA-256 of an earlier line that somebody asked for; 0 and empty: nobody did, or
    there is no such line."""

    @classmethod
    def of(cls, identity: str, state: State, earlier: tuple[int, str] = (0, "")) -> Checkpoint:
        """Describe a registry as it is now."""
        return cls(identity, state.root, state.sequence, state.journal_sha256, utc_now(), earlier)

    def sealed(self, signer: Signer) -> bytes:
        """Sign it; returns a DSSE envelope."""
        return sealed(self._statement(), signer)

    @classmethod
    def parse(cls, data: bytes, *, source: str) -> tuple[Checkpoint, Envelope]:
        """Read what :meth:`sealed` returned; whose signature it bears is not checked yet.

        Raises:
            FileFormatError: If it is no checkpoint.
        """
        envelope = opened(data, source=source)
        try:
            (subject,) = envelope.statement["subject"]
            told = dict(envelope.statement["predicate"])
            number, sha256 = told.pop("earlier")
            found = cls(**told, root=subject["digest"]["sha256"], earlier=(number, sha256))
            intact = found._statement() == envelope.statement and found.sequence > 0
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{source} is no checkpoint of a registry: {error}.") from error
        if not intact:
            raise FileFormatError(f"{source} is no checkpoint of a registry.")
        return found, envelope

    def contradicts(self, later: Checkpoint) -> str:
        """Why a registry that stated this cannot honestly state the other one later; else empty."""
        if later.sequence < self.sequence:
            return f"its journal had {self.sequence} lines, and has {later.sequence} now"
        if later.sequence == self.sequence:
            here, there = (self.root, self.journal_sha256), (later.root, later.journal_sha256)
            what = f"its journal has {self.sequence} lines as before, but root and last line were "
            return "" if here == there else f"{what}{' '.join(here)}, and are {' '.join(there)}"
        number, sha256 = later.earlier
        if (number, sha256) == (self.sequence, self.journal_sha256):
            return ""
        return (
            f"line {self.sequence} of its journal was {self.journal_sha256}, and is "
            f"{sha256 if number == self.sequence else 'not shown'} now"
        )

    def _statement(self) -> dict[str, object]:
        told = {
            "registry": self.registry,
            "sequence": self.sequence,
            "journal_sha256": self.journal_sha256,
            "time": self.time,
            "earlier": list(self.earlier),
        }
        return statement_of(PREDICATE, {f"fedcompo registry {self.registry}": self.root}, told)
