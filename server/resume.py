"""Files in a run's output with which the same run, started again, can be resumed.

``run.json`` holds the settings of the run, the registry's members when it began, the kinds that
were dealt, and the finished rounds or arrivals. ``answers/`` holds the clients' answers
(:mod:`server.exchange.kept_answers`).
Both are deleted when the results are on disk. To give a run up, delete its folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcompo.config.choices import Kind
from fedcompo.config.run import RunConfig
from fedcompo.engine.run_folder import RUN
from fedcompo.errors import ConfigError
from fedcompo.registry.registry import Registry
from fedcompo.storage.files import write_atomically
from fedcompo.storage.identity import identity
from server.exchange.kept_answers import KeptAnswers

FORMAT_VERSION = 1
ANSWERS = "answers"
MAY_DIFFER = (
    *("output", "resume", "num-clients", "min-clients", "timeout", "in-flight"),
    *("track", "keep-cache"),
)
"""Settings that may differ when a run is resumed: they do not change its results."""


@dataclass
class Working:
    """The working files of one run."""

    output: Path
    settings: Mapping[str, Any]
    """Settings that the run was begun with."""
    members: tuple[str, ...]
    """Members of the registry when the run began."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Finished rounds or arrivals, as JSON values."""
    kinds: dict[str, Kind] = field(default_factory=dict)
    """Kind that was dealt to each client. Another one may be connected when the run is resumed."""
    resumed: bool = False
    """Whether this is a run that was interrupted."""

    @classmethod
    def open(cls, output: Path, config: RunConfig, registry: Registry) -> Working:
        """Begin a run in its own folder, or read where an interrupted one stands.

        Raises:
            ConfigError: If the run was begun with other settings.
        """
        path, settings = output / RUN, config.flat()
        if not config.server.resume:
            working = cls(output, settings, registry.clients)
            working._write()
            return working
        begun = json.loads(path.read_text(encoding="utf-8"))
        check_same(path, begun["settings"], settings)
        members = tuple(begun["members"])
        kinds = {client: Kind(kind) for client, kind in begun.get("kinds", {}).items()}
        return cls(output, begun["settings"], members, begun["steps"], kinds, resumed=True)

    @property
    def answers(self) -> KeptAnswers:
        """The answers that are kept."""
        return KeptAnswers(self.output / ANSWERS)

    def step(self, entries: Mapping[str, Any]) -> None:
        """Note that a round or an arrival is finished."""
        self.steps.append(dict(entries))
        self._write()

    def deal(self, kinds: Mapping[str, Kind]) -> None:
        """Note the kinds that were dealt."""
        if kinds != self.kinds:
            self.kinds = dict(kinds)
            self._write()

    def joined(self, registry: Registry, folders: Mapping[str, Path]) -> bool:
        """Whether these contributions were added to the registry before an interruption."""
        return self.resumed and all(
            client in registry.clients and _same(registry.member(client).files, folder)
            for client, folder in folders.items()
        )

    def _write(self) -> None:
        entries = {
            "format_version": FORMAT_VERSION,
            "settings": dict(self.settings),
            "members": list(self.members),
            "kinds": self.kinds,
            "steps": self.steps,
        }
        write_atomically(self.output / RUN, (json.dumps(entries, indent=1) + "\n").encode())


def check_same(path: Path, begun: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings; raises ``ConfigError``, naming them."""
    names = sorted((begun.keys() | settings.keys()) - set(MAY_DIFFER))
    differing = [
        f"  {name} = {settings.get(name)!r}, begun with {begun.get(name)!r}"
        for name in names
        if settings.get(name) != begun.get(name)
    ]
    if differing:
        raise ConfigError(
            f"{path} was begun with other settings; give the same, or start a run of its own:\n"
            + "\n".join(differing)
        )


def clear(output: Path) -> None:
    """Delete the working files of a run that is finished, if it has any."""
    KeptAnswers(output / ANSWERS).clear()
    (output / RUN).unlink(missing_ok=True)


def _same(known: Mapping[str, str], folder: Path) -> bool:
    """Whether a member's files are those of a folder."""
    return all(known.get(path.name) == identity(path) for path in folder.iterdir())
