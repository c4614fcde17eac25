"""The pool on disk: add a client, remove one exactly, and prove it.

README.md shows what lies in the folder. Changes are transactions
(:mod:`fedcompo.registry.transaction`); reading takes no lock (:mod:`fedcompo.registry.reader`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from fedcompo.backbone.backbone import Backbone
from fedcompo.composition.models import composed_model, model_of
from fedcompo.composition.settings import CompositionSettings
from fedcompo.errors import RegistryError
from fedcompo.method.contribution import AnyStatistics, Contribution
from fedcompo.method.statistics import FeatureSums
from fedcompo.registry import changes, known
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.removal import RemovalRecord
from fedcompo.registry.signing import PUBLIC, fingerprint_of
from fedcompo.registry.state import write_new
from fedcompo.storage.files import completed, is_free


class Registry(RegistryReader):
    """Contributions of clients in a folder, and the model composed of them.

    Example::

        registry = Registry("runs/digits/registry")
        model = registry.model()  # a ready timm model of everyone
        specialist = registry.model(only=["client-0", "client-3"])
        record = registry.remove("client-1", requested_by="client-1")
    """

    @classmethod
    def create(
        cls,
        path: Path | str,
        backbone: Backbone,
        settings: CompositionSettings | None = None,
        *,
        key: Path | None = None,
        pinned: bool = True,
    ) -> Registry:
        """Make a registry for contributions to one backbone.

        It is made beside ``path`` and renamed, so that a crash leaves none or a whole one.

        Args:
            path: A new folder.
            backbone: The pre-trained weights.
            settings: How it composes.
            key: File of its private key, made if it is not there; None: ``FEDCOMPO_SIGNING_KEY``,
                else ``key.pem`` in the registry.
            pinned: Let this machine know its key (:mod:`fedcompo.registry.known`).

        Raises:
            RegistryError: If something is at ``path`` already.
        """
        path = Path(path)
        settings = settings or CompositionSettings()
        if not is_free(path):
            raise RegistryError(f"{path} holds something already; name a new folder.")
        try:
            with completed(path) as draft:
                write_new(draft, backbone, settings, key)
        except OSError as error:
            raise RegistryError(f"No registry could be made at {path}: {error}.") from error
        registry = cls(path)
        if pinned:
            key_of_it = fingerprint_of((path / PUBLIC).read_bytes())
            known.keep(registry.identity, known.Known(key_of_it, since=registry.created))
        return registry

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
        pool = pool.without(*without)
        return composed_model(pool, self.backbone, self.settings, self.kept_factor)

    def add(
        self,
        *sources: Contribution | Path,
        replacing: bool = False,
        empty: bool = False,
        requested_by: str = "",
    ) -> None:
        """Add contributions, all or none.

        Args:
            sources: Contributions, or folders that hold one each.
            replacing: Take the place of members of the same name; a removal and an addition.
            empty: Take task vectors of zeros too, as a client that learnt nothing has one.
            requested_by: Person or client who asks for it; for the journal.

        Raises:
            ContributionError: If one cannot be used, its client is there and not replaced, or
                tangents would come beside another kind.
            BackboneMismatch: If one was trained on other pre-trained weights.
            RegistryLocked: If another process keeps changing the registry.
        """
        changes.add(self, sources, replacing=replacing, empty=empty, requested_by=requested_by)

    def remove(
        self,
        client: str,
        *,
        requested_by: str = "",
        reason: str = "",
        keep_versions: bool = False,
        key: Path | None = None,
    ) -> RemovalRecord:
        """Remove a client: its files, its term of the sum, its rows of the head.

        Args:
            client: Client to remove.
            requested_by: Person or client who asks for it; for the record.
            reason: Why; for the record.
            keep_versions: Keep the composition until now, and earlier ones that contain the client.
            key: File of the registry's private key; None: ``FEDCOMPO_SIGNING_KEY``, else
                ``key.pem`` in the registry.

        Returns:
            The signed record, which also lies in ``removals/``.

        Raises:
            ConfigError: If the private key is not there, or is another's; nothing changes.
            ContributionError: If there is no such client.
            RegistryLocked: If another process keeps changing the registry.
        """
        return changes.remove(
            self,
            client,
            requested_by=requested_by,
            reason=reason,
            keep_versions=keep_versions,
            key=key,
        )

    def realign(
        self, statistics: Mapping[str, AnyStatistics] | FeatureSums, *, factor: float | None = None
    ) -> None:
        r"""Make the joint head again, of statistics of the composed model's features.

        Args:
            statistics: By client, of exactly the members; of sums, the sum of all will do.
            factor: :math:`\lambda'` that the clients voted for, under which the features are; the
                model is composed with it, and so are later ones until the next vote. None: the
                present factor.

        Raises:
            ContributionError: If a member's are missing or cannot be used.
            ConfigError: If the registry's scale is fixed, or the factor is out of range.
        """
        changes.realign(self, statistics, factor)
