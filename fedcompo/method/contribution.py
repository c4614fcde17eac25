"""All that a client sends, and all that must go when it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedcompo.config.choices import Kind
from fedcompo.errors import FileFormatError
from fedcompo.method.features import FeatureMixture
from fedcompo.method.fisher import FisherDiagonal, load_fisher, open_fisher, save_fisher
from fedcompo.method.heads import Head
from fedcompo.method.task_vector import TaskVector
from fedcompo.storage import tensorfile
from fedcompo.storage.files import CARD, CONTENT, FISHER, tuples, write_atomically
from fedcompo.storage.tensorstream import Section, StreamedTensors, save_streamed


@dataclass(frozen=True)
class Lineage:
    """Whose data a contribution was made with, besides the client's own; names of clients."""

    method: str = "ita"
    anchored_by: tuple[str, ...] = ()
    """Clients whose Fisher anchored the training."""
    aligned_with: tuple[str, ...] = ()
    """Clients whose feature statistics shaped the head that training started from."""
    ensemble: tuple[str, ...] = ()
    """Clients whose task vectors were in the model that was trained."""

    def joined(self, later: Lineage, *, ensemble: Iterable[str] = ()) -> Lineage:
        """This lineage and that of a later round of the same training; the method stays.

        Args:
            later: Whose data the later round was made with.
            ensemble: Clients whose task vectors were in its model besides.
        """
        return replace(
            self,
            anchored_by=tuple(sorted({*self.anchored_by, *later.anchored_by})),
            aligned_with=tuple(sorted({*self.aligned_with, *later.aligned_with})),
            ensemble=tuple(sorted({*self.ensemble, *later.ensemble, *ensemble})),
        )


@dataclass(frozen=True)
class Contribution:
    """A client's part in a composition."""

    client: str
    task_vector: TaskVector
    head: Head
    """Rows of the client's own classes, after training."""
    features: dict[str, FeatureMixture]
    """Mixtures of θ₀'s features, by class name."""
    num_examples: int
    """Training images."""
    lineage: Lineage
    fisher: FisherDiagonal | None = None
    """Fisher *sum* at θ₀; None where it is not kept."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The run config it was trained with."""

    def save(self, folder: Path) -> dict[str, str]:
        """Write the contribution into a folder of its own: tensors, and a card for people.

        Returns:
            SHA-256 of each file's content, by file name.
        """
        tensors = {f"task_vector/{name}": t for name, t in self.task_vector.tensors.items()}
        tensors |= {"head/weight": self.head.weight, "head/bias": self.head.bias}
        tensors |= mixture_tensors(self.features)
        card = {
            "content": "contribution",
            "client": self.client,
            "kind": str(self.task_vector.kind),
            "base": self.task_vector.base,
            "classes": list(self.head.classes),
            "num_examples": self.num_examples,
            "mixtures": {name: m.num_examples for name, m in sorted(self.features.items())},
            "lineage": asdict(self.lineage),
            "settings": dict(sorted(self.settings.items())),
        }
        files = {CONTENT: save_streamed(folder / CONTENT, tensors, card)}
        (folder / FISHER).unlink(missing_ok=True)
        if self.fisher is not None:
            files[FISHER] = save_fisher(
                folder / FISHER, self.fisher, client=self.client, base=self.task_vector.base
            )
        card_text = json.dumps({**card, "tensors_sha256": files}, indent=2, default=list)
        write_atomically(folder / CARD, (card_text + "\n").encode())
        return files

    @classmethod
    def load(cls, folder: Path, *, with_fisher: bool = True) -> Contribution:
        """Read what :meth:`save` wrote.

        Args:
            folder: The contribution's own folder.
            with_fisher: Read the Fisher too, where there is one.

        Raises:
            FileFormatError: If a file is missing, truncated, altered, or not this client's.
            BackboneMismatch: If its Fisher was estimated at other pre-trained weights.
        """
        tensors, manifest = tensorfile.load(folder / CONTENT)
        _expect(manifest, "contribution", folder / CONTENT)
        stated = _checked_card(folder, manifest)
        fisher = None
        if with_fisher and FISHER in stated:
            fisher = load_fisher(folder / FISHER, **_owner(manifest))
            _same_digest(folder, FISHER, stated, tensorfile.tensor_digest(fisher.sums))
        return _built(folder, tensors, manifest, fisher)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        with_fisher: bool = True,
        guard: Callable[[Path], None] = lambda path: None,
    ) -> Contribution:
        """Like :meth:`load`, but task vector and Fisher are read tensor by tensor when asked for.

        Args:
            folder: The contribution's own folder.
            with_fisher: Offer the Fisher too, where there is one.
            guard: Called with a file's path before a tensor is read from it; raises if the file is
                not to be trusted. Without it, bytes are not held against their digests.
        """
        path, fisher_path = folder / CONTENT, folder / FISHER
        tensors = StreamedTensors(path, guard=lambda: guard(path))
        _expect(tensors.manifest, "contribution", folder / CONTENT)
        stated = _checked_card(folder, tensors.manifest)
        fisher = None
        if with_fisher and FISHER in stated:
            fisher = open_fisher(
                fisher_path, **_owner(tensors.manifest), guard=lambda: guard(fisher_path)
            )
            found = StreamedTensors(fisher_path).manifest["tensors_sha256"]
            _same_digest(folder, FISHER, stated, found)
        return _built(folder, tensors, tensors.manifest, fisher)


def _built(
    folder: Path,
    tensors: Mapping[str, Tensor],
    manifest: Mapping[str, Any],
    fisher: FisherDiagonal | None,
) -> Contribution:
    try:
        return Contribution(**_unpacked(tensors, manifest), fisher=fisher)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(
            f"The manifest of {folder / CONTENT} cannot be used ({type(error).__name__}: "
            f"{error}). It was written by something else than this fedcompo."
        ) from error


def _unpacked(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a contribution, but for its Fisher."""
    return {
        "client": manifest["client"],
        "task_vector": TaskVector(
            Kind(manifest["kind"]), Section(tensors, "task_vector"), manifest["base"]
        ),
        "head": Head(tuple(manifest["classes"]), tensors["head/weight"], tensors["head/bias"]),
        "features": mixtures_from(tensors, manifest["mixtures"]),
        "num_examples": manifest["num_examples"],
        "lineage": Lineage(**tuples(manifest["lineage"])),
        "settings": manifest["settings"],
    }


def mixture_tensors(mixtures: Mapping[str, FeatureMixture]) -> dict[str, Tensor]:
    """Flatten mixtures to tensors, ``features/<class>/<part>``."""
    return {
        f"features/{name}/{part}": getattr(mixture, part)
        for name, mixture in mixtures.items()
        for part in ("weights", "means", "variances")
    }


def mixtures_from(
    tensors: Mapping[str, Tensor], examples: Mapping[str, int]
) -> dict[str, FeatureMixture]:
    """Rebuild mixtures from :func:`mixture_tensors` and the number of examples a class."""
    return {
        name: FeatureMixture(
            tensors[f"features/{name}/weights"],
            tensors[f"features/{name}/means"],
            tensors[f"features/{name}/variances"],
            count,
        )
        for name, count in examples.items()
    }


def _owner(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Whose Fisher belongs to a contribution, and at which weights."""
    return {key: str(manifest.get(key)) for key in ("client", "base")}


def _expect(manifest: Mapping[str, Any], content: str, path: Path) -> None:
    if manifest.get("content") != content:
        raise FileFormatError(
            f"{path} holds a {manifest.get('content')!r}, expected a {content!r}."
        )


def _checked_card(folder: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """The card is for people, but it must say what the tensors say; returns its digests."""
    own = {"format_version", "fedcompo_version", "tensors_sha256", "sha256"}
    expected = {key: value for key, value in manifest.items() if key not in own}
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        stated = {str(name): str(digest) for name, digest in card.pop("tensors_sha256").items()}
        wrong = sorted(
            key
            for key in card.keys() | expected
            if key not in card or key not in expected or card[key] != expected[key]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileFormatError(
            f"{folder / CARD} cannot be read ({type(error).__name__}: {error}). "
            "Restore the folder from where it came."
        ) from error
    if wrong:
        raise FileFormatError(
            f"{folder / CARD} and {CONTENT} disagree on {', '.join(wrong)}. "
            "One of them was altered or exchanged; restore the folder from where it came."
        )
    _same_digest(folder, CONTENT, stated, manifest["tensors_sha256"])
    return stated


def _same_digest(folder: Path, file: str, stated: Mapping[str, str], found: str) -> None:
    if stated.get(file) != found:
        raise FileFormatError(
            f"{folder / CARD} and {file} disagree on the tensors. "
            "One of them was altered or exchanged; restore the folder from where it came."
        )
