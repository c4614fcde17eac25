"""The record of a removal: what was deleted, what stays, and which members it still influences.

A removal is always *composition-exact*: the model is, bit for bit, the one that was never given the
client. It is *influence-exact* only if no survivor was trained with anything of the client's. The
record says which survivors were, and is signed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from types import UnionType
from typing import Any, get_origin, get_type_hints

from fedcompo.errors import FileFormatError
from fedcompo.method.lineage import Lineage
from fedcompo.registry.envelope import MALFORMED, Envelope, opened, statement_of
from fedcompo.registry.history import stays_in
from fedcompo.registry.journal import Entry
from fedcompo.registry.signing import Signer
from fedcompo.storage.files import canonical, tuples

CONTENT = "removal-record"
REMOVALS = "removals"
PREDICATE = "https://fedcompo.org/removal/v1"
"""What kind of statement a record is."""
REVEALS = (
    "Whoever has the models of before and after this removal can subtract them, and gets the "
    "removed task vector."
)
LIMITS = (
    "Not found is a task vector that was changed by a bit or scaled, merged into another's before "
    "it was sent, or stored by other factors or as another kind; nor are "
    "changed statistics, nor copies outside the registry."
)


@dataclass(frozen=True)
class Influence:
    """Which survivors were trained with data of the removed client; names, sorted."""

    fisher: tuple[str, ...]
    """Anchored by its Fisher."""
    statistics: tuple[str, ...]
    """Trained under a joint head made with its feature statistics."""
    ensemble: tuple[str, ...]
    """Trained inside a model that held its task vector."""
    indirect: tuple[str, ...]
    """Trained with something of a client that was itself influenced; none of the above."""

    @property
    def to_retrain(self) -> tuple[str, ...]:
        """Survivors to train again for the removal to be influence-exact too."""
        return tuple(sorted({*self.fisher, *self.statistics, *self.ensemble, *self.indirect}))

    @property
    def exact(self) -> bool:
        """Whether nothing of the client is left in any survivor."""
        return not self.to_retrain


class Lineages:
    """Whose data shaped whom; a set of clients is an integer, with a bit for each of them.

    So the influence of each of thousands is found in seconds, though everyone shaped everyone.
    """

    def __init__(self, lineages: Iterable[tuple[str, Lineage]]) -> None:
        """Turn them round: who names a client.

        Args:
            lineages: Of every contribution, also of those that were replaced or have left, through
                which influence may have passed; the last one of a name is its present one.
        """
        every = [*lineages]
        self._names = sorted({client for client, _ in every})
        self._bits = {client: 1 << i for i, client in enumerate(self._names)}
        self._ever: dict[str, int] = {}
        self._now: list[dict[str, int]] = [{}, {}, {}]
        for client, own in every:
            self._note(client, own.shaped_by, self._ever)
        for client, own in dict(every).items():
            named = own.anchored_by, own.aligned_with, own.ensemble
            for names, by in zip(named, self._now, strict=True):
                self._note(client, names, by)

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Lineages:
        """Those that a journal tells of."""
        return cls((s.client, Lineage.parse(s.values["lineage"])) for s in stays_in(entries))

    def influence(self, client: str, survivors: Iterable[str]) -> Influence:
        """Follow a client's influence, which is removed, on those who stay.

        A lineage knows names, not which of the contributions that bore a name: if one of them was
        influenced, all who name it count as influenced.
        """
        staying = set(survivors)
        fresh: tuple[str, ...] = (client,)
        direct = [by.get(client, 0) for by in self._now]
        touched = indirect = 0
        while fresh:
            more = 0
            for name in fresh:
                more |= self._ever.get(name, 0)
                for by in self._now:
                    indirect |= by.get(name, 0)
            fresh, touched = self._named(more & ~touched), touched | more
        indirect &= ~(direct[0] | direct[1] | direct[2])
        parts = map(self._named, (*direct, indirect))
        return Influence(*(tuple(n for n in part if n in staying) for part in parts))

    def _note(self, client: str, named: Iterable[str], by: dict[str, int]) -> None:
        for name in named:
            by[name] = by.get(name, 0) | self._bits[client]

    def _named(self, clients: int) -> tuple[str, ...]:
        """Names of a set's clients, sorted."""
        bits = reversed(f"{clients:b}")
        return tuple(n for n, bit in zip(self._names, bits, strict=False) if bit == "1")


def foreseen_influence(
    entries: Sequence[Entry], client: str, survivors: Sequence[str]
) -> Influence:
    """List the survivors that a removed client still influences, by the journal's lineages."""
    return Lineages.of(entries).influence(client, survivors)


@dataclass(frozen=True)
class RemovalRecord:
    """A signed record of a removal: all that the registry knows of it."""

    registry: str
    """Identity of the registry."""
    sequence: int
    """Number of the journal's line that records it."""
    time: str
    """UTC, ISO 8601."""
    client: str
    requested_by: str
    reason: str
    kind: str
    num_examples: int
    classes: tuple[str, ...]
    """The client's own."""
    removed_files: Mapping[str, str]
    """Identity of each file that was deleted, by name; see :mod:`fedcompo.storage.identity`."""
    removed_rounded_sha256: str
    """Digest of the task vector, see :class:`~fedcompo.registry.state.Member`."""
    added: int
    """Number of the journal's line that added it."""
    root_before: str
    root_after: str
    journal_before: str
    """SHA-256 of the journal's line before."""
    composition_before: Mapping[str, str]
    """Identity of the composition's files, by name."""
    composition_after: Mapping[str, str]
    survivors: tuple[str, ...]
    classes_after: tuple[str, ...]
    kept_versions: tuple[str, ...]
    """Earlier compositions that contain the client and were kept on request."""
    recomposed: bool
    """Whether an earlier version took the sum anew, because its machine rounded otherwise."""
    influence: Influence
    fedcompo_version: str
    removed_content: Mapping[str, str] = field(default_factory=dict)
    """Digests of the task vector and of the statistics, which hold no name of a client or a class;
    empty: an earlier version wrote the record, in a format of its own."""
    reveals: str = REVEALS
    limits: str = LIMITS
    """What the digests cannot find."""
    signature: str = ""
    """Ed25519 over everything else, hexadecimal."""
    keyid: str = ""
    """Fingerprint of the key that signed it."""
    factor_before: float | None = None
    r""":math:`\lambda'`, the factor on the sum of task vectors; None: the registry's format fixes
    the scale, and the record's is 1. Otherwise it is 2."""
    factor_after: float | None = None
    factor_by: str = ""
    """Where the factor after comes from: ``vote`` (the one that the clients chose stays), ``rule``,
    ``norms`` (computed from the survivors' lengths) or ``fixed``; empty: nobody is left."""

    caps: tuple[int, int] | None = None
    """Images of one class, and in all, that a member weighs by at most. The registry's first
    members chose them by their counts, perhaps the removed one among them; None: no caps."""
    rule: str = ""
    """Rule that composes the survivors; one of class O(T) read all of them. Empty: the mean."""

    @property
    def format_version(self) -> int:
        """Version of the registry's files, and of the records that were written then."""
        return 1 if self.factor_before is None else 2

    @property
    def place(self) -> str:
        """Path of its file, relative to the registry."""
        return f"{REMOVALS}/{self.sequence:06d}-{self.client}.json"

    @property
    def text(self) -> str:
        """The record as a file: an in-toto statement in a DSSE envelope."""
        if self.removed_content:
            signature = self.keyid, bytes.fromhex(self.signature)
            return replace(self._envelope, signatures=(signature,)).data.decode()
        values = {**self._old_values(), "signature": self.signature}
        text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return f"{text}\n"

    @property
    def signed_bytes(self) -> bytes:
        """Bytes that the signature covers."""
        if self.removed_content:
            return self._envelope.signed_bytes
        return canonical(self._old_values()).encode()

    def signed(self, signer: Signer) -> RemovalRecord:
        """Return the record with its signature."""
        record = replace(self, keyid=signer.fingerprint)
        return replace(record, signature=signer.sign(record.signed_bytes).hex())

    @classmethod
    def parse(cls, data: bytes, *, source: str) -> RemovalRecord:
        """Rebuild a record from :attr:`text`.

        Raises:
            FileFormatError: If it is not exactly what this fedcompo, or an earlier one, writes.
        """
        try:
            if "content" in (given := json.loads(data.decode())):  # of an earlier version
                del given["content"], given["format_version"]
            else:
                envelope = opened(data, source=source)
                signature = envelope.signatures[0][1].hex()
                given = {**envelope.statement["predicate"], "signature": signature}
            lineage = given.pop("lineage")
            names = {own.name: tuple(lineage[own.name]) for own in fields(Influence)}
            record = cls(**tuples(given), influence=Influence(**names))
            intact = record._is_typed and record.text.encode() == data
        except MALFORMED as error:
            raise FileFormatError(
                f"{source} is no removal record ({type(error).__name__}: {error}). "
                "It was altered, or is something else."
            ) from error
        if not intact:
            raise FileFormatError(
                f"{source} is not written as a removal record is: it was altered."
            )
        return record

    @property
    def _is_typed(self) -> bool:
        """Whether its values are texts, numbers, lists and tables where they should be."""
        kinds = {
            name: get_origin(hint) or hint for name, hint in get_type_hints(type(self)).items()
        }
        return all(isinstance(getattr(self, n), k) for n, k in kinds.items() if k is not UnionType)

    @property
    def _envelope(self) -> Envelope:
        """The statement, about the files that the removal left, without a signature."""
        subject = self.composition_after or {"root": self.root_after}
        statement = statement_of(PREDICATE, subject, self._values())
        return Envelope(canonical(statement).encode(), ())

    def _values(self) -> dict[str, Any]:
        values = asdict(self)
        del values["influence"], values["signature"]
        lineage = {
            **asdict(self.influence),
            "composition_exact": True,
            "influence_exact": self.influence.exact,
            "to_retrain": self.influence.to_retrain,
        }
        return {**values, "lineage": lineage}

    def _old_values(self) -> dict[str, Any]:
        """Values as earlier versions wrote them; nothing writes them any more."""
        values = self._values()
        del values["removed_content"], values["reveals"], values["limits"], values["keyid"]
        if self.format_version == 1:
            del values["factor_before"], values["factor_after"], values["factor_by"]
        if self.caps is None:
            del values["caps"]
        if not self.rule:
            del values["rule"]
        about = {"content": CONTENT, "format_version": self.format_version}
        return {**about, **values}
