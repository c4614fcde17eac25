"""All that a client sends, and all that must be deleted when it leaves.

On disk it is a folder: tensors, the Fisher sum where it is kept, and a card for people.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fedcompo.config.choices import Kind
from fedcompo.config.presets import IMPORTED, STAND_IN
from fedcompo.errors import FileFormatError
from fedcompo.method.features import FeatureMixture, Mixtures
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.method.fisher_file import load_fisher, save_fisher
from fedcompo.method.heads import Head, head_from, head_tensors
from fedcompo.method.lineage import Lineage
from fedcompo.method.statistics import FeatureSums
from fedcompo.method.task_vector import TaskVector
from fedcompo.storage.files import CARD, CONTENT, FISHER, write_atomically
from fedcompo.storage.manifest import OWN, require_content
from fedcompo.storage.tensorstream import Section, StreamedTensors, save_streamed


@dataclass(frozen=True)
class Contribution:
    """All that a client sends."""

    client: str
    task_vector: TaskVector
    head: Head
    """Rows of the client's own classes, after training."""
    statistics: AnyStatistics
    """Of θ₀'s features on all of the client's training images, by class."""
    num_examples: int
    """Number of training images."""
    lineage: Lineage
    fisher: FisherDiagonal | None = None
    """Fisher *sum* at θ₀; None if it is not kept."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the run that it was trained with."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the tensors in each file that it was read from, by its name."""

    @property
    def without_images(self) -> bool:
        """Whether the statistics are made of a classifier alone, and no images were counted."""
        return self.settings.get(f"{IMPORTED}statistics") == STAND_IN

    def save(self, folder: Path) -> dict[str, str]:
        """Write tensors, Fisher and card into a folder of the contribution's own.

        Returns:
            SHA-256 of each file's content, by file name.
        """
        tensors = {f"task_vector/{name}": t for name, t in self.task_vector.tensors.items()}
        tensors |= head_tensors(self.head) | statistics_tensors(self.statistics)
        card = {
            "content": "contribution",
            "client": self.client,
            "kind": str(self.task_vector.kind),
            "base": self.task_vector.base,
            "classes": list(self.head.classes),
            "num_examples": self.num_examples,
            **statistics_entry(self.statistics),
            "lineage": dict(vars(self.lineage)),
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
    def open(
        cls,
        folder: Path,
        *,
        with_fisher: bool = True,
        check: bool = False,
        guard: Callable[[Path, str], None] = lambda path, wrong: None,
    ) -> Contribution:
        """Open a folder that :meth:`save` wrote; each tensor is read when it is used.

        Args:
            folder: The contribution's own folder.
            with_fisher: Open the Fisher too, if there is one.
            check: Read every tensor now and compare it with its digest.
            guard: Called with a file's path before a tensor is read from it, and with what is wrong
                with the tensor, else nothing; raises if the file is not to be trusted.

        Raises:
            FileFormatError: If a file is missing, truncated, altered, or not this client's.
            BackboneMismatch: If its Fisher was estimated at other pre-trained weights.
        """
        path, fisher_path = folder / CONTENT, folder / FISHER
        tensors = StreamedTensors(path, guard=partial(guard, path))
        manifest = tensors.manifest
        require_content(manifest, "contribution", path)
        stated = _checked_card(folder, manifest)
        if check:
            tensors.check()
        fisher = None
        if with_fisher and FISHER in stated:
            owner = {key: str(manifest.get(key)) for key in ("client", "base")}
            fisher = load_fisher(fisher_path, **owner, guard=partial(guard, fisher_path))
            file = StreamedTensors(fisher_path)
            _same_digest(folder, FISHER, stated, file.manifest["tensors_sha256"])
            if check:
                file.check()
        try:
            return cls(
                client=manifest["client"],
                task_vector=TaskVector(
                    Kind(manifest["kind"]), Section(tensors, "task_vector"), manifest["base"]
                ),
                head=head_from(tensors, manifest["classes"]),
                statistics=statistics_from(tensors, manifest),
                num_examples=manifest["num_examples"],
                lineage=Lineage.parse(manifest["lineage"]),
                fisher=fisher,
                settings=manifest["settings"],
                digests=stated,
            )
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise FileFormatError(
                f"The manifest of {path} cannot be used ({type(error).__name__}: {error}). "
                "It was written by something else than this fedcompo."
            ) from error


AnyStatistics = FeatureSums | Mixtures
"""Statistics of one client's features: sums, or a mixture for each class."""
SUMS, MIXTURES = "sums", "mixtures"
"""Entries of a manifest: the number of images of each class, by the kind of statistics."""


def statistics_tensors(statistics: AnyStatistics) -> dict[str, Tensor]:
    """Name the tensors of statistics in a file or message; see :func:`statistics_entry`."""
    if isinstance(statistics, FeatureSums):
        return statistics.tensors()
    return {
        f"features/{name}/{part}": getattr(mixture, part)
        for name, mixture in statistics.items()
        for part in ("weights", "means", "variances")
    }


def statistics_entry(statistics: AnyStatistics) -> dict[str, dict[str, int]]:
    """Return what a manifest says of statistics: their kind, and the images of each class."""
    kind = SUMS if isinstance(statistics, FeatureSums) else MIXTURES
    return {kind: counts_of(statistics)}


def statistics_from(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> AnyStatistics:
    """Rebuild statistics from :func:`statistics_tensors` and the manifest's entry."""
    if SUMS in manifest:
        return FeatureSums.from_tensors(tensors, sorted(manifest[SUMS]))
    return {
        name: FeatureMixture(
            tensors[f"features/{name}/weights"],
            tensors[f"features/{name}/means"],
            tensors[f"features/{name}/variances"],
            count,
        )
        for name, count in manifest[MIXTURES].items()
    }


def counts_of(statistics: AnyStatistics) -> dict[str, int]:
    """Number of images of each class, by name, sorted."""
    if isinstance(statistics, FeatureSums):
        return dict(zip(statistics.classes, statistics.counts.tolist(), strict=True))
    return {name: mixture.num_examples for name, mixture in sorted(statistics.items())}


def _checked_card(folder: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Refuse a card that differs from the manifest of the tensors; return the card's digests."""
    expected = {key: value for key, value in manifest.items() if key not in OWN}
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        stated = {str(name): str(digest) for name, digest in card.pop("tensors_sha256").items()}
        wrong = sorted(
            key
            for key in card.keys() | expected
            if key not in card or key not in expected or card[key] != expected[key]
        )
        wrong += sorted(stated.keys() - {CONTENT, FISHER})
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


def _same_digest(folder: Path, file: str, stated: Mapping[str, str], digest: str) -> None:
    if stated.get(file) != digest:
        raise FileFormatError(
            f"{folder / CARD} and {file} disagree on the tensors. "
            "One of them was altered or exchanged; restore the folder from where it came."
        )
