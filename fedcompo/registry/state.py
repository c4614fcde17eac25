"""The state of a registry, one JSON file: it names every file that counts, with its SHA-256.

The *root* is the SHA-256 over what the registry consists of: its settings, its members' files, the
composition. It knows no time, no folder and no order of arrival: two registries of the same members
have the same root.

Here too: writing the files of a new registry that never change, and replaying the journal to
learn what the registry held at any earlier moment.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcompo.backbone.stored import save_backbone
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Coefficients, are_tangents
from fedcompo.errors import RegistryDamaged
from fedcompo.method.lineage import Lineage
from fedcompo.registry import journal, signing
from fedcompo.registry.journal import Entry
from fedcompo.registry.transaction import JOURNAL, STATE, require_inside
from fedcompo.runtime import version
from fedcompo.storage.files import BACKBONE, canonical, tuples, write_atomically
from fedcompo.storage.tensorstream import file_sha256

if TYPE_CHECKING:
    from fedcompo.backbone.backbone import Backbone
    from fedcompo.method.contribution import Contribution

FORMAT_VERSION = 1
ABOUT, PRIVATE, PUBLIC = "registry.json", "key.pem", "public.pem"


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
    """SHA-256 of each of its files, by name."""
    statistics_sha256: str
    """SHA-256 of its head, its mixtures, and their numbers of examples."""
    rounded_sha256: str
    """SHA-256 of its task vector on the grid of the running sum."""
    lineage: Lineage
    added: int
    """Number of the journal's line that added it."""

    @classmethod
    def of(
        cls,
        contribution: Contribution,
        *,
        folder: str,
        files: Mapping[str, str],
        statistics_sha256: str,
        added: int,
    ) -> Member:
        """Describe a contribution; its rounded form is not known yet."""
        return cls(
            contribution.client,
            folder,
            str(contribution.task_vector.kind),
            contribution.num_examples,
            contribution.head.classes,
            dict(files),
            statistics_sha256,
            "",
            contribution.lineage,
            added,
        )

    @property
    def essence(self) -> dict[str, Any]:
        """Values that enter the root: all but the folder and the time of arrival."""
        values = asdict(self)
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
    """SHA-256 of the files that never change."""
    members: Mapping[str, Member] = field(default_factory=dict)
    """By client, sorted."""
    version: str = ""
    """Folder of the composition, relative to the registry; empty: nobody is there."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the composition's files, by name."""
    kept: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Earlier compositions, by folder: their ``clients`` and ``files``."""

    @property
    def root(self) -> str:
        """SHA-256 over settings, members and composition; hexadecimal."""
        content = {
            "base": self.base,
            "settings": asdict(self.settings),
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
    def places(self) -> list[str]:
        """Every file that the state names, relative to the registry."""
        files = {m.folder: m.files for m in self.members.values()}
        files |= {folder: kept["files"] for folder, kept in self.kept.items()}
        files |= {self.version: self.files} if self.version else {}
        return [*self.fixed, *(f"{folder}/{name}" for folder in files for name in files[folder])]

    @property
    def text(self) -> str:
        """The state as a file."""
        values = {"format_version": FORMAT_VERSION, "root": self.root, **asdict(self)}
        values["sha256"] = hashlib.sha256(canonical(values).encode()).hexdigest()
        return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> State:
        """Read what :attr:`text` is.

        Raises:
            RegistryDamaged: If it cannot be read, or is not exactly what this fedcompo writes.
        """
        try:
            text = path.read_bytes().decode()
            values = json.loads(text)
            written = values.pop("format_version")
            if written != FORMAT_VERSION:
                raise RegistryDamaged(
                    f"{path} has format version {written!r}, this fedcompo reads {FORMAT_VERSION}. "
                    "Use the fedcompo version that wrote it."
                )
            del values["root"], values["sha256"]  # derived; the text is compared as a whole
            values["settings"] = settings_from(values["settings"])
            values["members"] = {n: _member(m) for n, m in sorted(values["members"].items())}
            if any(set(kept) != {"clients", "files"} for kept in values["kept"].values()):
                raise ValueError("a kept composition is described by its clients and files alone")
            state = cls(**values)
            for place in state.places:
                require_inside(path.parent, place)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RegistryDamaged(
                f"{path} cannot be read ({type(error).__name__}: {error}). "
                "Restore the registry from a copy."
            ) from error
        if state.text != text:
            raise RegistryDamaged(f"{path} was altered. Restore the registry from a copy.")
        return state


def settings_from(values: Mapping[str, Any]) -> CompositionSettings:
    """Rebuild settings from JSON; raises ``ValueError`` or ``TypeError``."""
    return CompositionSettings(**{**values, "coefficients": Coefficients(values["coefficients"])})


def _member(values: Mapping[str, Any]) -> Member:
    return Member(**{**tuples(values), "lineage": Lineage.parse(values["lineage"])})


def write_new(folder: Path, backbone: Backbone, settings: CompositionSettings) -> None:
    """Write the files of a registry without members."""
    save_backbone(folder / BACKBONE, backbone)
    about = {
        "content": "registry",
        "format_version": FORMAT_VERSION,
        "fedcompo_version": version("fedcompo"),
        "identity": uuid.uuid4().hex,
        "created": journal.utc_now(),
        "base": backbone.fingerprint,
        "settings": asdict(settings),
    }
    write_atomically(folder / ABOUT, f"{json.dumps(about, indent=2)}\n".encode())
    signing.create_key(folder / PRIVATE, folder / PUBLIC)
    fixed = {name: file_sha256(folder / name) for name in (ABOUT, BACKBONE, PUBLIC)}
    details = {"identity": about["identity"], "base": backbone.fingerprint, "fixed": fixed}
    (entry,) = journal.follow(None, [("created", details)])
    write_atomically(folder / JOURNAL, f"{entry.line}\n".encode())
    state = State(entry.sequence, entry.sha256, backbone.fingerprint, settings, fixed)
    write_atomically(folder / STATE, state.text.encode())


def read_about(path: Path, state: State) -> tuple[str, str]:
    """Read the registry's identity and time of creation."""
    if file_sha256(path) != state.fixed.get(ABOUT):
        raise RegistryDamaged(
            f"{path} was altered, or what {STATE} says of it. Restore the registry from a copy."
        )
    about = json.loads(path.read_text(encoding="utf-8"))
    return about["identity"], about["created"]


def members_after(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """Replay the journal: the members after these lines, by client."""
    members: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry.event == "added":
            members |= {member["client"]: member for member in entry.details["clients"]}
        elif entry.event == "removed":
            members.pop(entry.details["client"], None)
        for client, sha256 in entry.details.get("rounded", {}).items():
            members[client] = {**members[client], "rounded_sha256": sha256}
    return members


def root_of(
    state: State, members: Mapping[str, Mapping[str, Any]], files: Mapping[str, str]
) -> str:
    """Compute the root of the registry with these members.

    Args:
        state: Says backbone and settings, which never change.
        members: By client, each as its line of the journal describes it.
        files: SHA-256 of the composition's files, by name.
    """
    known = {
        client: _member({**values, "folder": ""}) for client, values in sorted(members.items())
    }
    return replace(state, members=known, files=dict(files)).root


def line_of(folder: str) -> int:
    """Number of the journal's line that wrote a composition, by its folder; 0: not known."""
    number = folder.rpartition("/")[2]
    return int(number) if number.isdecimal() else 0


def end_of_change(entries: Sequence[Entry], line: int) -> Entry | None:
    """Find the last line of the change that begins with a line, counted from 1."""
    after = entries[line - 1 :] if line > 0 else ()
    return next((entry for entry in after if "root_after" in entry.details), None)
