"""Reads a registry without a lock, and compares every file with its SHA-256.

Torch is imported where tensors are read: members and settings are read without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcompo.backbone.stored import StoredBackbone
from fedcompo.composition.scale import FactorBy
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Statistics
from fedcompo.errors import FileFormatError, RegistryDamaged, RegistryError
from fedcompo.names import require_known
from fedcompo.registry import journal
from fedcompo.registry.removal import Influence, foreseen_influence
from fedcompo.registry.state import ABOUT, Member, State, read_about
from fedcompo.registry.transaction import JOURNAL, STATE, recover_if_idle
from fedcompo.storage.files import (
    BACKBONE,
    CARD,
    CONTENT,
    OLD_TOTALS,
    REALIGNED,
    RULED,
    SUM,
    TOTALS,
    WEIGHTS,
)
from fedcompo.storage.identity import identity
from fedcompo.storage.tensorstream import StreamedTensors

if TYPE_CHECKING:
    from torch import Tensor

    from fedcompo.method.contribution import Contribution
    from fedcompo.method.heads import Head
    from fedcompo.method.pool import Pool
    from fedcompo.method.statistics import FeatureSums


class RegistryReader:
    """A registry as it was when it was opened, or last refreshed."""

    def __init__(self, path: Path | str) -> None:
        """Open a registry; a change that a crash interrupted is completed or undone first.

        Raises:
            RegistryError: If there is none.
            RegistryDamaged: If its files do not say what they should.
        """
        self.path = Path(path)
        if not (self.path / ABOUT).is_file():
            raise RegistryError(
                f"There is no registry at {self.path}: no {ABOUT}. "
                "Name the folder of a registry, such as <output>/registry of a run."
            )
        recover_if_idle(self.path)
        self._trusted: set[tuple[str, int, int, int, int]] = set()
        self.state = State.read(self.path / STATE)
        self.identity, self.created = read_about(self.path / ABOUT, self.state)
        path, digest = self.path / BACKBONE, self.state.fixed.get(BACKBONE, "")
        with self._reading(path):
            self.backbone = StoredBackbone(path, guard=partial(self.check_file, path, digest))
        if self.backbone.fingerprint != self.state.base:
            raise RegistryDamaged(
                f"{path} holds {self.backbone.fingerprint}, the registry was made "
                f"for {self.state.base}. Restore the registry from a copy."
            )

    def refresh(self) -> None:
        """Read the state again: another process may have changed the registry."""
        self.state = State.read(self.path / STATE, known=self.state)

    @property
    def clients(self) -> tuple[str, ...]:
        """Names of the members, sorted."""
        return tuple(self.state.members)

    @property
    def settings(self) -> CompositionSettings:
        """Settings by which it composes."""
        return self.state.settings

    @property
    def realigned(self) -> bool:
        """Whether the joint head was made of features of the composed model."""
        return REALIGNED in self.state.files

    @property
    def factor(self) -> float:
        r""":math:`\lambda'`, the factor on the sum of task vectors; 0 if nobody is there."""
        return self.state.factor

    @property
    def kept_factor(self) -> float | None:
        """The factor that stays when members change; None: it is computed anew."""
        return self.factor if self.state.factor_by == FactorBy.VOTE else None

    @property
    def scale(self) -> float:
        r""":math:`\lambda`, as a multiple of the weighted mean; 0 if nobody is there."""
        return self.state.scale

    @property
    def linearised(self) -> bool:
        """Whether the composition is to be evaluated linearised: all members are tangents."""
        return self.state.linearised

    def member(self, client: str) -> Member:
        """Describe a member; raises ``ContributionError`` if there is none of that name."""
        require_known([client], self.state.members, "registry")
        return self.state.members[client]

    def contribution(self, client: str, *, with_fisher: bool = False) -> Contribution:
        """Open a member's contribution; tensors are read when they are used, and checked once."""
        from fedcompo.method.contribution import Contribution

        member = self.member(client)
        folder = self.path / member.folder

        def guard(file: Path, wrong: str = "") -> None:
            self.check_file(file, member.files.get(file.name, ""), wrong)

        guard(folder / CARD)
        with self._reading(folder):
            return Contribution.open(folder, with_fisher=with_fisher, guard=guard)

    def card(self, client: str) -> dict[str, Any]:
        """Read the card of a member's contribution, which holds its settings; reads no tensor."""
        member = self.member(client)
        folder = self.path / member.folder
        for name in (CARD, CONTENT):
            self.check_file(folder / name, member.files[name])
        card: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))
        return card

    def influence_of(self, client: str) -> Influence:
        """List the other members that were trained with data of a client."""
        others = tuple(name for name in self.clients if name != client)
        return foreseen_influence(self.entries(), client, others)

    def pool(self, *, with_fisher: bool = False) -> Pool:
        """Open the members as a pool, with what the registry's rule needs of them."""
        from fedcompo.method.pool import Pool

        with_fisher = with_fisher or bool(self.settings.made_by.needs)
        return Pool(tuple(self.contribution(c, with_fisher=with_fisher) for c in self.clients))

    def joint_head(self) -> Head:
        """Read the joint head of the current composition."""
        from fedcompo.method.heads import Head

        model = self.composed()
        classifier = self.backbone.classifier
        return Head(self.classes, model[f"{classifier}.weight"], model[f"{classifier}.bias"])

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the joint head's classes, sorted."""
        return self.state.classes

    def composed(self) -> StreamedTensors:
        """All weights of the current composition, classifier included; read when they are used.

        Raises:
            RegistryError: If nobody is in the registry.
        """
        return self._version_file(WEIGHTS)

    def running_sum(self) -> StreamedTensors:
        """The integer sum behind the current composition, by weight name; int64."""
        return self._version_file(SUM)

    def total(self) -> StreamedTensors:
        """What the rule made of the members, on the grid of the running sum; int64."""
        return self._version_file(RULED if RULED in self.state.files else SUM)

    def total_statistics(self) -> FeatureSums:
        """Read the sum of the members' statistics.

        Raises:
            RegistryError: If nobody is in the registry, or its members are described by mixtures.
        """
        from fedcompo.composition.totals import read_total

        if self.settings.statistics is not Statistics.SUMS:
            raise RegistryError(
                f"The members of {self.path} describe their features by mixtures, which do not add "
                "up. Read them one by one."
            )
        old = OLD_TOTALS in self.state.files
        return read_total(self._version_file(OLD_TOTALS if old else TOTALS))

    def theta_p(self) -> dict[str, Tensor]:
        """Read the composed target weights, by name."""
        model = self.composed()
        return {name: model[name] for name in self.backbone.target_weights}

    def entries(self) -> list[journal.Entry]:
        """Read the journal and check its chain.

        Raises:
            RegistryDamaged: If a line was altered, or the last one is not what the state says.
        """
        entries = journal.read(self.path / JOURNAL, upto=self.state.sequence)
        if entries[-1].sha256 != self.state.journal_sha256:
            raise RegistryDamaged(
                f"The journal {self.path / JOURNAL} ends otherwise than {STATE} says: one of them "
                "was altered or exchanged. Restore the registry from a copy."
            )
        return entries

    def check_file(self, path: Path, stated: str, wrong: str = "") -> None:
        """Compare a file with its identity, once for each opening of the registry.

        Raises:
            RegistryDamaged: If it is missing, altered, or was replaced, or something else is wrong.
        """
        if wrong:
            raise self._fault(wrong)
        try:
            now = path.stat()
            key = (str(path), now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
            if key in self._trusted:
                return
            digest = identity(path)
        except OSError as error:
            raise self._fault(f"{path} cannot be read: {error.strerror}") from error
        if digest != stated:
            raise self._fault(
                f"{path} has SHA-256 {digest[:16]}…, expected {stated[:16]}…: it was altered"
            )
        self._trusted.add(key)

    def _version_file(self, name: str) -> StreamedTensors:
        if not self.state.version:
            raise RegistryError(
                f"Nobody is in the registry {self.path}, so nothing is composed. Add a client."
            )
        path, digest = self.path / self.state.version / name, self.state.files[name]
        with self._reading(path):
            return StreamedTensors(path, guard=partial(self.check_file, path, digest))

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        try:
            yield
        except FileFormatError as error:
            raise self._fault(f"{path} cannot be read ({error})") from error

    def _fault(self, what: str) -> RegistryError:
        """Make the error for a file that differs from the state: a change meanwhile, or damage."""
        if State.read(self.path / STATE, known=self.state) != self.state:
            return RegistryError(
                f"The registry {self.path} was changed while it was being read. Try again."
            )
        return RegistryDamaged(f"{what}. Restore the registry from a copy.")
