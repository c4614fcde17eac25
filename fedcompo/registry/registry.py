r"""The pool on disk: add a client, remove one exactly, and prove it.

::

    registry.json        what it is, and how it composes
    backbone.safetensors the pre-trained weights; nothing else is ever needed to compose
    clients/<name>/      contributions: tensors, Fisher, a card to read
    versions/<n>/        running sum, composed model and joint head; ``model`` links to the last
    state.json           who is in it, and the SHA-256 of every file: what readers go by
    journal.jsonl        what happened, one chained line each
    removals/            signed records of removals
    key.pem, public.pem  Ed25519; whoever has key.pem can sign in the registry's name

Changes are transactions (:mod:`fedcompo.registry.transaction`); readers take no lock.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.stored import StoredBackbone
from fedcompo.composition.models import composed_model, model_of
from fedcompo.composition.settings import CompositionSettings
from fedcompo.composition.version import REALIGNED, SUM
from fedcompo.errors import FileFormatError, RegistryDamaged, RegistryError
from fedcompo.method.contribution import Contribution
from fedcompo.method.features import Mixtures
from fedcompo.method.heads import Head
from fedcompo.method.pool import Pool, require_known
from fedcompo.registry import changes as registry_changes
from fedcompo.registry import journal
from fedcompo.registry.removal import Influence, RemovalRecord
from fedcompo.registry.state import ABOUT, Member, State, read_about, write_new
from fedcompo.registry.transaction import JOURNAL, STATE, recover_if_idle
from fedcompo.storage.files import BACKBONE, CARD, WEIGHTS, put_in_place
from fedcompo.storage.tensorstream import StreamedTensors, file_sha256


class Registry:
    """Contributions of clients in a folder, and the model composed of them.

    Example::

        registry = Registry("runs/digits/registry")
        model = registry.model()  # a ready timm model of everyone
        specialist = registry.model(only=["client-0", "client-3"])
        record = registry.remove("client-1", requested_by="client-1")
    """

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
        self._trusted: set[tuple[str, int, int]] = set()
        self.refresh()
        self.identity, self.created = read_about(self.path / ABOUT, self.state)
        path, digest = self.path / BACKBONE, self.state.fixed.get(BACKBONE, "")
        with self._reading(path):
            self.backbone = StoredBackbone(path, guard=lambda: self.check_file(path, digest))
        if self.backbone.fingerprint != self.state.base:
            raise RegistryDamaged(
                f"{path} holds {self.backbone.fingerprint}, the registry was made "
                f"for {self.state.base}. Restore the registry from a copy."
            )

    @classmethod
    def create(
        cls, path: Path | str, backbone: Backbone, settings: CompositionSettings | None = None
    ) -> Registry:
        """Make a registry for contributions to one backbone.

        It is made beside ``path`` and renamed, so that a crash leaves none or a whole one.

        Raises:
            RegistryError: If something is at ``path`` already.
        """
        path = Path(path)
        settings = settings or CompositionSettings()
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise RegistryError(f"{path} holds something already; name a new folder.")
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            draft.mkdir(parents=True)
            write_new(draft, backbone, settings)
            put_in_place(draft, path)
        except BaseException as error:
            shutil.rmtree(draft, ignore_errors=True)
            if isinstance(error, OSError):
                raise RegistryError(f"No registry could be made at {path}: {error}.") from error
            raise
        return cls(path)

    # -- reading ----------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Take note of changes that others made."""
        self.state = State.read(self.path / STATE)

    @property
    def clients(self) -> tuple[str, ...]:
        """Names of the members, sorted."""
        return tuple(self.state.members)

    @property
    def settings(self) -> CompositionSettings:
        """How it composes."""
        return self.state.settings

    @property
    def realigned(self) -> bool:
        """Whether the joint head was fitted to features of the composed model."""
        return REALIGNED in self.state.files

    @property
    def linearised(self) -> bool:
        """Whether the composition is to be evaluated linearised: all members are tangents."""
        return self.state.linearised

    def member(self, client: str) -> Member:
        """Return what is known of a member; raises ``ContributionError`` if there is none."""
        require_known([client], self.clients, "registry")
        return self.state.members[client]

    def contribution(self, client: str, *, with_fisher: bool = False) -> Contribution:
        """Open a member's contribution; its tensors are read when asked for, and checked once."""
        member = self.member(client)
        folder = self.path / member.folder

        def guard(file: Path) -> None:
            self.check_file(file, member.files.get(file.name, ""))

        guard(folder / CARD)
        with self._reading(folder):
            return Contribution.open(folder, with_fisher=with_fisher, guard=guard)

    def influence_of(self, client: str) -> Influence:
        """Which other members were trained with something of a client's."""
        others = tuple(name for name in self.clients if name != client)
        return registry_changes.foreseen_influence(self.entries(), client, others)

    def pool(self, *, with_fisher: bool = False) -> Pool:
        """Open the members as a pool, to be composed with any coefficients."""
        return Pool(tuple(self.contribution(c, with_fisher=with_fisher) for c in self.clients))

    def joint_head(self) -> Head:
        """Read the joint head of the current composition."""
        model = self.composed()
        classifier = self.backbone.classifier
        return Head(self.classes, model[f"{classifier}.weight"], model[f"{classifier}.bias"])

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the joint head's classes, sorted."""
        return self.state.classes

    def composed(self) -> StreamedTensors:
        """All weights of the current composition, classifier included; read when asked for.

        Raises:
            RegistryError: If nobody is in the registry.
        """
        return self._version_file(WEIGHTS)

    def running_sum(self) -> StreamedTensors:
        """The integer sum behind the current composition, by weight name; int64."""
        return self._version_file(SUM)

    def theta_p(self) -> dict[str, Tensor]:
        """Read the composed target weights, by name."""
        model = self.composed()
        return {name: model[name] for name in self.backbone.target_weights}

    def model(self, *, only: Sequence[str] | None = None, without: Sequence[str] = ()) -> nn.Module:
        """Return a ready timm model: all members, or some; a ``TangentModel`` of tangents.

        Args:
            only: Members to compose; None: all.
            without: Members to leave out.
        """
        if only is None and not without:
            return model_of(
                self.backbone, self.composed(), self.classes, linearised=self.linearised
            )
        pool = self.pool() if only is None else self.pool().only(*only)
        return composed_model(pool.without(*without), self.backbone, self.settings)

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

    def check_file(self, path: Path, sha256: str) -> None:
        """Hold a file against its SHA-256; once for each opening of the registry.

        Raises:
            RegistryDamaged: If it is missing, altered, or was replaced.
        """
        try:
            status = path.stat()
            key = (str(path), status.st_mtime_ns, status.st_ino)
            if key in self._trusted:
                return
            found = file_sha256(path)
        except OSError as error:
            raise self._fault(f"{path} cannot be read: {error.strerror}") from error
        if found != sha256:
            raise self._fault(
                f"{path} has SHA-256 {found[:16]}…, expected {sha256[:16]}…: it was altered"
            )
        self._trusted.add(key)

    def _version_file(self, name: str) -> StreamedTensors:
        if not self.state.version:
            raise RegistryError(
                f"Nobody is in the registry {self.path}, so nothing is composed. Add a client."
            )
        path, digest = self.path / self.state.version / name, self.state.files[name]
        with self._reading(path):
            return StreamedTensors(path, guard=lambda: self.check_file(path, digest))

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        try:
            yield
        except FileFormatError as error:
            raise self._fault(f"{path} cannot be read ({error})") from error

    def _fault(self, what: str) -> RegistryError:
        """A file is not as the state says: the registry was changed meanwhile, or is damaged."""
        if State.read(self.path / STATE) != self.state:
            return RegistryError(
                f"The registry {self.path} was changed while it was being read. Try again."
            )
        return RegistryDamaged(f"{what}. Restore the registry from a copy.")

    # -- changing ---------------------------------------------------------------------------------

    def add(
        self,
        *sources: Contribution | Path,
        replacing: bool = False,
        requested_by: str = "",
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        """Add contributions, all or none.

        Args:
            sources: Contributions, or folders that hold one each.
            replacing: Take the place of members of the same name; a removal and an addition.
            requested_by: On whose request; stands in the journal.
            on_step: Told what is being done.

        Raises:
            ContributionError: If one cannot be used, its client is there and not replaced, or
                tangents would come beside another kind.
            BackboneMismatch: If one was trained on other pre-trained weights.
            RegistryLocked: If another process keeps changing the registry.
        """
        registry_changes.add(
            self, sources, replacing=replacing, requested_by=requested_by, on_step=on_step
        )

    def remove(
        self,
        client: str,
        *,
        requested_by: str = "",
        reason: str = "",
        keep_versions: bool = False,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> RemovalRecord:
        """Remove a client: its files, its term of the sum, its rows of the head.

        Args:
            client: Who goes.
            requested_by: On whose request; for the record.
            reason: Why; for the record.
            keep_versions: Keep the composition until now, and earlier ones that contain the client.
            on_step: Told what is being done.

        Returns:
            The signed record, which also lies in ``removals/``.

        Raises:
            ContributionError: If there is no such client.
            RegistryLocked: If another process keeps changing the registry.
        """
        return registry_changes.remove(
            self,
            client,
            requested_by=requested_by,
            reason=reason,
            keep_versions=keep_versions,
            on_step=on_step,
        )

    def realign(self, mixtures: Mapping[str, Mixtures]) -> None:
        """Fit the joint head again, to mixtures of the composed model's features.

        Args:
            mixtures: By client and class, of exactly the members.

        Raises:
            ContributionError: If a member's are missing or cannot be used.
        """
        registry_changes.realign(self, mixtures)
