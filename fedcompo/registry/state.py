"""The state of a registry, one JSON file: it names every file that counts, with its identity.

The *root* is the SHA-256 over what the registry consists of: its settings, its members' files, the
composition. It knows no time, no folder and no order of arrival: two registries of the same members
have the same root.

Here too: writing the files of a new registry that never change.
"""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcompo.backbone.stored import save_backbone
from fedcompo.composition.scale import FactorBy
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Statistics, are_tangents
from fedcompo.errors import RegistryDamaged
from fedcompo.method.lineage import Lineage
from fedcompo.registry import journal, signing
from fedcompo.registry.transaction import JOURNAL, STATE, require_inside
from fedcompo.runtime import version
from fedcompo.storage.files import BACKBONE, canonical, tuples, write_atomically
from fedcompo.storage.identity import identity

if TYPE_CHECKING:
    from fedcompo.backbone.backbone import Backbone

FORMATS = {Statistics.MIXTURES: 1, Statistics.SUMS: 2}
"""Version of the files, by what members describe their features by."""
CHOSEN = "factor", "factor_by", "shrinkage"
"""Values of a state that follow from the settings where members are described by mixtures."""
ABOUT, PRIVATE, PUBLIC = "registry.json", signing.PRIVATE, signing.PUBLIC


@dataclass(frozen=True)
class Member:
    """A client in the registry."""

    client: str
    folder: str
    """Where its contribution lies, relative to the registry."""
    kind: str
    num_examples: int
    classes: tuple[str, ...]
    files: Mapping[str, str]
    """Identity of each of its files, by name; see :mod:`fedcompo.storage.identity`."""
    statistics_sha256: str
    """SHA-256 of its head, its statistics, and their numbers of examples."""
    rounded_sha256: str
    """Marked SHA-256 of its task vector's tensors; where earlier versions began the registry, that
    of its task vector on the grid of the running sum; empty: not known yet."""
    lineage: Lineage
    added: int
    """Number of the journal's line that added it."""
    squared_norm: float | None = None
    """Squared length of its task vector, to six significant digits; None: not known yet, or the
    members' features are described by mixtures."""

    @property
    def norm(self) -> float | None:
        """Length of its task vector; None: not known."""
        return None if self.squared_norm is None else math.sqrt(self.squared_norm)

    @property
    def values(self) -> dict[str, Any]:
        """JSON values; a length that is not known is left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # asdict copies each class
        values |= {"files": dict(self.files), "lineage": dict(vars(self.lineage))}
        if self.squared_norm is None:
            del values["squared_norm"]
        return values

    @property
    def essence(self) -> dict[str, Any]:
        """Values that enter the root: all but the folder and the time of arrival."""
        values = self.values
        del values["folder"], values["added"]
        return values


@dataclass(frozen=True)
class State:
    """A registry at one moment."""

    sequence: int
    """Number of the journal's last line."""
    journal_sha256: str
    """SHA-256 of that line."""
    base: str
    """Fingerprint of the pre-trained weights."""
    settings: CompositionSettings
    fixed: Mapping[str, str]
    """Identity of the files that never change."""
    members: Mapping[str, Member] = field(default_factory=dict)
    """By client, sorted."""
    version: str = ""
    """Folder of the composition, relative to the registry; empty: nobody is there."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Identity of the composition's files, by name."""
    kept: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Earlier compositions, by folder: their ``clients`` and ``files``."""
    factor: float = 0.0
    r""":math:`\lambda'`, the factor on the sum of task vectors; 0 if nobody is there."""
    factor_by: str = ""
    """Where it comes from, see :class:`~fedcompo.composition.scale.FactorBy`; empty: nobody is
    there."""
    shrinkage: float | None = None
    """Shrinkage of the joint head; None: it was not made of sums."""

    @property
    def format_version(self) -> int:
        """Version of the files."""
        return FORMATS[self.settings.statistics]

    @property
    def chosen(self) -> dict[str, Any]:
        """How the members are composed, as JSON values; empty with mixtures, where it is fixed."""
        if self.settings.statistics is Statistics.MIXTURES:
            return {}
        return {name: getattr(self, name) for name in CHOSEN}

    @cached_property
    def root(self) -> str:
        """SHA-256 over settings, members and composition; hexadecimal."""
        content = {
            "base": self.base,
            "settings": self.settings.values,
            "members": {client: member.essence for client, member in self.members.items()},
            "composition": dict(self.files),
        }
        return hashlib.sha256(canonical(content).encode()).hexdigest()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of all classes, sorted."""
        return tuple(sorted({name for m in self.members.values() for name in m.classes}))

    @property
    def linearised(self) -> bool:
        """Whether the composition is to be evaluated linearised: all members are tangents."""
        return are_tangents(member.kind for member in self.members.values())

    @property
    def count(self) -> int:
        """M: how often all members together count in the sum."""
        return sum(self.settings.times(m.num_examples) for m in self.members.values())

    @property
    def lengths(self) -> dict[str, tuple[float, float]]:
        """How often each member counts, and the squared length of its task vector, by client."""
        times = self.settings.times
        return {c: (times(m.num_examples), m.squared_norm or 0) for c, m in self.members.items()}

    @property
    def scale(self) -> float:
        r""":math:`\lambda`, as a multiple of the weighted mean."""
        if self.settings.scale is not None and self.members:
            return self.settings.scale
        return self.factor * self.count

    @property
    def about(self) -> dict[str, Any]:
        """What the composed file says of the composition."""
        return {"scale": self.scale, **self.chosen}

    @property
    def places(self) -> list[str]:
        """Every file that the state names, relative to the registry."""
        files = {m.folder: m.files for m in self.members.values()}
        files |= {folder: kept["files"] for folder, kept in self.kept.items()}
        files |= {self.version: self.files} if self.version else {}
        return [*self.fixed, *(f"{folder}/{name}" for folder in files for name in files[folder])]

    @cached_property
    def text(self) -> str:
        """The state as a file: one line, which is written a dozen times faster than many."""
        return f"{canonical(self._values())}\n"

    @property
    def old_text(self) -> str:
        """The same as earlier versions wrote it."""
        return json.dumps(self._values(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def _values(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in CHOSEN}
        values = {
            "format_version": self.format_version,
            "root": self.root,
            **own,
            **self.chosen,
            "settings": self.settings.values,
            "members": {client: member.values for client, member in self.members.items()},
        }
        return {**values, "sha256": hashlib.sha256(canonical(values).encode()).hexdigest()}

    @classmethod
    def read(cls, path: Path, *, known: State | None = None) -> State:
        """Read what :attr:`text` is.

        Args:
            path: The file.
            known: A state, which is returned as it is if the file says the same.

        Raises:
            RegistryDamaged: If it cannot be read, or is not exactly what this fedcompo writes.
        """
        try:
            text = path.read_bytes().decode()
            if known is not None and known.text == text:
                return known
            values = json.loads(text)
            written = values.pop("format_version")
            if written not in FORMATS.values():
                raise RegistryDamaged(
                    f"{path} has format version {written!r}, this fedcompo reads "
                    f"{' and '.join(map(str, FORMATS.values()))}. Use the version that wrote it."
                )
            del values["root"], values["sha256"]  # derived; the text is compared as a whole
            values["settings"] = CompositionSettings.parse(values["settings"])
            values["members"] = {n: member_from(m) for n, m in sorted(values["members"].items())}
            if any(set(kept) != {"clients", "files"} for kept in values["kept"].values()):
                raise ValueError("a kept composition is described by its clients and files alone")
            state = cls(**values)
            if not state.chosen and state.members:
                factor = (state.settings.scale or 0) / state.count
                state = replace(state, factor=factor, factor_by=FactorBy.FIXED)
            require_inside(path.parent, state.places)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RegistryDamaged(
                f"{path} cannot be read ({type(error).__name__}: {error}). "
                "Restore the registry from a copy."
            ) from error
        if state.text != text and state.old_text != text:
            raise RegistryDamaged(f"{path} was altered. Restore the registry from a copy.")
        return state


def member_from(values: Mapping[str, Any]) -> Member:
    """Rebuild a member from JSON; raises ``KeyError`` or ``TypeError``."""
    return Member(**{**tuples(values), "lineage": Lineage.parse(values["lineage"])})


def write_new(
    folder: Path, backbone: Backbone, settings: CompositionSettings, key: Path | None = None
) -> None:
    """Write the files of a registry without members.

    Args:
        folder: Where to.
        backbone: The pre-trained weights.
        settings: How it composes.
        key: File of its private key, which is made if it is not there; None: the registry's own.
    """
    save_backbone(folder / BACKBONE, backbone)
    about = {
        "content": "registry",
        "format_version": FORMATS[settings.statistics],
        "fedcompo_version": version("fedcompo"),
        "identity": uuid.uuid4().hex,
        "created": journal.utc_now(),
        "base": backbone.fingerprint,
        "settings": settings.values,
    }
    signer = signing.read_or_create(signing.place_of_key(folder, key))
    write_atomically(folder / ABOUT, f"{json.dumps(about, indent=2)}\n".encode())
    write_atomically(folder / PUBLIC, signer.public_pem)
    fixed = {name: identity(folder / name) for name in (ABOUT, BACKBONE, PUBLIC)}
    details = {"identity": about["identity"], "base": backbone.fingerprint, "fixed": fixed}
    (entry,) = journal.follow(None, [("created", details)])
    write_atomically(folder / JOURNAL, f"{entry.line}\n".encode())
    state = State(entry.sequence, entry.sha256, backbone.fingerprint, settings, fixed)
    write_atomically(folder / STATE, state.text.encode())


def read_about(path: Path, state: State) -> tuple[str, str]:
    """Read the registry's identity and time of creation."""
    if identity(path) != state.fixed.get(ABOUT):
        raise RegistryDamaged(
            f"{path} was altered, or what {STATE} says of it. Restore the registry from a copy."
        )
    about = json.loads(path.read_text(encoding="utf-8"))
    return about["identity"], about["created"]
