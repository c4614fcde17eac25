"""What a registry holds, as one JSON file: the only thing that readers go by.

The *root* is the SHA-256 over what the registry consists of: its settings, its members' files, the
composition. It knows no time, no folder and no order of arrival: two registries of the same members
have the same root.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedcompo.config.choices import Coefficients
from fedcompo.config.run import RunConfig
from fedcompo.errors import RegistryDamaged
from fedcompo.method.contribution import Contribution, Lineage
from fedcompo.method.pool import are_tangents
from fedcompo.registry.transaction import require_inside
from fedcompo.storage.files import canonical, tuples

FORMAT_VERSION = 1


@dataclass(frozen=True)
class RegistrySettings:
    """How a registry composes; fixed when it is made."""

    coefficients: Coefficients = Coefficients.UNIFORM
    """How much of each task vector enters."""
    scale: float = 1.0
    """Factor on the weighted mean of the task vectors."""
    align_samples: int = 256
    """Features a class drawn to align the joint head."""
    ridge: float = 0.001
    """Pull of the joint head's fit to zero."""
    seed: int = 0
    """Seed of the draws."""
    keep_versions: bool = False
    """Keep earlier compositions when a new one takes their place."""

    @classmethod
    def of(cls, config: RunConfig) -> RegistrySettings:
        """Take them from the settings of a run."""
        return cls(
            coefficients=config.compose.coefficients,
            scale=config.compose.scale,
            align_samples=config.head.align_samples,
            ridge=config.head.ridge,
            seed=config.seed,
            keep_versions=config.registry.keep_versions,
        )

    def times(self, num_examples: int) -> int:
        """How often a client counts in the sum: once, or once an example."""
        return num_examples if self.coefficients is Coefficients.EXAMPLES else 1


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
    """SHA-256 of its head and mixtures, and of how many examples these were fitted to."""
    rounded_sha256: str
    """SHA-256 of its task vector on the grid of the running sum."""
    lineage: Lineage
    added: int
    """Number of the journal's line that tells of its coming."""

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
        """What enters the root: no folder, no time of arrival."""
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
    settings: RegistrySettings
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
        """Every file that it names, relative to the registry."""
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
            found = values.pop("format_version")
            if found != FORMAT_VERSION:
                raise RegistryDamaged(
                    f"{path} has format version {found!r}, this fedcompo reads {FORMAT_VERSION}. "
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


def settings_from(values: Mapping[str, Any]) -> RegistrySettings:
    """Rebuild settings from JSON; raises ``ValueError`` or ``TypeError``."""
    return RegistrySettings(**{**values, "coefficients": Coefficients(values["coefficients"])})


def _member(values: dict[str, Any]) -> Member:
    return Member(**{**tuples(values), "lineage": Lineage(**tuples(values["lineage"]))})
