"""The answers of clients; the names of their entries stand here and nowhere else.

Reading an answer raises if an entry is missing. The server checks whether the values can be true.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from fedcompo.config.choices import FisherForm, Kind
from fedcompo.errors import FileFormatError
from fedcompo.messages.body import FISHER, TASK_VECTOR, Body, Content, count, counts, entry, floats
from fedcompo.messages.requests import own_tensors
from fedcompo.method.contribution import (
    MIXTURES,
    SUMS,
    AnyStatistics,
    counts_of,
    statistics_entry,
    statistics_from,
    statistics_tensors,
)
from fedcompo.method.heads import Head, head_from
from fedcompo.report.confusion import Tally
from fedcompo.report.pictures import Facts
from fedcompo.storage.tensorfile import prefixed, section


def _statistics_from(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> AnyStatistics:
    """Rebuild statistics; raises ``FileFormatError`` on counts or numbers that cannot be true."""
    kind = SUMS if SUMS in manifest else MIXTURES
    stated = counts(manifest[kind])
    statistics = statistics_from(tensors, {kind: stated})
    if counts_of(statistics) != dict(sorted(stated.items())):
        raise FileFormatError(
            f"The statistics count {counts_of(statistics)}, their manifest says {stated}."
        )
    return statistics


@dataclass(frozen=True, kw_only=True)
class Process(Content):
    """Memory and packages of the client's process; part of every answer."""

    peak_memory: Mapping[str, int] = entry(counts)
    """Bytes; see :func:`fedcompo.runtime.peak_bytes`."""
    versions: Mapping[str, str] = entry()
    """By package."""


@dataclass(frozen=True, kw_only=True)
class Answer(Content):
    """What all answers have in common."""

    CONTENT: ClassVar[str]

    base: str = entry(str)
    """Fingerprint of the client's backbone."""
    caps: Mapping[str, Any] = entry(default={})
    """Limits that the client kept to; ``wire``: the number format of the tensors."""

    @property
    def figures(self) -> dict[str, Any]:
        """The accuracies that it reports, by name."""
        values = {f: getattr(self, f.name) for f in fields(self) if f.name.endswith("_accuracy")}
        return {f.name: value for f, value in values.items() if value is not f.default}

    def to_body(self) -> Body:
        """Tensors and manifest."""
        tensors, manifest = super().to_body()
        if not self.caps:
            del manifest["caps"]
        wire = {"wire": self.caps["wire"]} if "wire" in self.caps else {}
        return tensors, {"content": self.CONTENT} | manifest | wire


def caps_of(answer: Body) -> list[Any]:
    """Limits that an answer states, and those of the Fisher inside it; not checked."""
    parts = answer[1], answer[1].get("fisher")
    stated = [part.get("caps") for part in parts if isinstance(part, Mapping)]
    return [caps for caps in stated if caps]


@dataclass(frozen=True, kw_only=True)
class NoticeAnswer(Answer):
    """Confirms a notice. All answers but those of averaging have these entries."""

    CONTENT: ClassVar[str] = "notice"

    client: str = entry(str)
    classes: tuple[str, ...] = entry(tuple)
    """The client's own, sorted."""


@dataclass(frozen=True, kw_only=True)
class IdentifyAnswer(NoticeAnswer):
    """Name, classes and test images of a client."""

    CONTENT: ClassVar[str] = "identify"

    num_test_examples: int = entry(count)
    noised: bool = entry(bool, default=False)
    """Whether its statistics are under noise; each further one then costs privacy."""


@dataclass(frozen=True, kw_only=True)
class _WithTensors(Answer):
    """An answer whose tensors may travel in fewer bits."""

    tensors: Mapping[str, Tensor]
    """Under the names that they travel by."""

    def _write(self) -> Body:
        return dict(self.tensors), {}

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> dict[str, Any]:
        return {"tensors": tensors}


@dataclass(frozen=True, kw_only=True)
class FisherAnswer(_WithTensors, NoticeAnswer):
    """The *sum* of the Fisher diagonal over a client's images."""

    CONTENT: ClassVar[str] = "fisher"

    num_examples: int = entry(count)
    form: FisherForm = entry(FisherForm, default=FisherForm.DENSE)
    report: Mapping[str, Any] = entry(dict)
    """Report of the estimator, such as its cost."""

    @property
    def parts(self) -> dict[str, Tensor]:
        """The sum in its form, under the names of :class:`FisherDiagonal`; none: empty."""
        return section(FISHER, self.tensors)


@dataclass(frozen=True, kw_only=True)
class DescribeAnswer(IdentifyAnswer):
    """Statistics of θ₀'s features and, where asked for, their Fisher sum: all in one message."""

    CONTENT: ClassVar[str] = "describe"

    statistics: AnyStatistics
    kind: Kind | None = None
    """Kind of task vector that the client insists on."""
    pictures: Facts | None = entry(counts, default=None)
    """Facts on its pictures; none under noise, as they are exact."""
    fisher: FisherAnswer | None = None
    """None: not asked for."""

    @property
    def num_examples(self) -> int:
        """Training images."""
        return sum(counts_of(self.statistics).values())

    def _write(self) -> Body:
        entries: dict[str, Any] = {"kind": str(self.kind or "")}
        entries |= statistics_entry(self.statistics)
        tensors = statistics_tensors(self.statistics)
        if self.fisher is not None:
            own, entries["fisher"] = self.fisher.to_body()
            tensors |= own
            if wire := entries["fisher"].get("wire"):
                entries["wire"] = wire
        return tensors, entries

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> dict[str, Any]:
        fisher = None
        if "fisher" in manifest:
            own = {name: t for name, t in tensors.items() if name.startswith(f"{FISHER}/")}
            fisher = FisherAnswer.from_body((own, manifest["fisher"]))
        return {
            "statistics": _statistics_from(tensors, manifest),
            "kind": Kind(manifest["kind"]) if manifest.get("kind") else None,
            "fisher": fisher,
        }


@dataclass(frozen=True, kw_only=True)
class RealignAnswer(NoticeAnswer):
    """Statistics of the composed model's features, one for each factor that was asked for."""

    CONTENT: ClassVar[str] = "realign"

    statistics: tuple[AnyStatistics, ...]

    def _write(self) -> Body:
        tensors: dict[str, Tensor] = {}
        for index, own in enumerate(self.statistics):
            tensors |= prefixed(str(index), statistics_tensors(own))
        return tensors, {"statistics": [statistics_entry(own) for own in self.statistics]}

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "statistics": tuple(
                _statistics_from(section(str(index), tensors), entry)
                for index, entry in enumerate(manifest["statistics"])
            )
        }


@dataclass(frozen=True, kw_only=True)
class VoteAnswer(NoticeAnswer):
    """How well candidates do on images kept aside; see :mod:`fedcompo.composition.voting`."""

    CONTENT: ClassVar[str] = "vote"

    hits: tuple[int, ...] = entry(lambda hits: tuple(map(count, hits)))
    losses: tuple[float, ...] = entry(floats)
    num_examples: int = entry(count)


@dataclass(frozen=True, kw_only=True)
class EvaluateAnswer(NoticeAnswer):
    """Accuracy of the composed model on a client's test images."""

    CONTENT: ClassVar[str] = "evaluate"

    class_il_accuracy: float = entry()
    task_il_accuracy: float = entry()
    own_heads_accuracy: float | None = entry(default=None)
    """Over all classes under the clients' own heads side by side, if they were sent."""
    num_examples: int | None = entry(count, default=None)
    """Test images; None: an earlier version, which does not say."""
    tally: Tally | None = None
    """Their counts by class and confidence; None: the client keeps them to itself."""

    def _write(self) -> Body:
        return {}, asdict(self.tally) if self.tally else {}

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> dict[str, Any]:
        if "confusion" not in manifest:
            return {}
        confusion = {str(name): counts(row) for name, row in manifest["confusion"].items()}
        bins = ((count(n), float(sure), count(hits)) for n, sure, hits in manifest["bins"])
        return {"tally": Tally(confusion, tuple(bins))}


@dataclass(frozen=True, kw_only=True)
class AveragingAnswer(_WithTensors):
    """A task vector's parameters and a head, trained."""

    CONTENT: ClassVar[str] = "train"

    kind: Kind = entry(Kind)
    losses: tuple[float, ...] = entry(floats)
    """Of each epoch."""

    @property
    def task_vector(self) -> dict[str, Tensor]:
        """The task vector's parameters."""
        return section(TASK_VECTOR, self.tensors)

    def head(self, classes: tuple[str, ...]) -> Head:
        """The head, whose rows are these classes."""
        return head_from(self.tensors, classes)


@dataclass(frozen=True, kw_only=True)
class TrainAnswer(AveragingAnswer, NoticeAnswer):
    """A client's own task vector and head."""

    held: float | None = entry(default=None)
    """Share of the way that the anchor took back."""
    own_task_accuracy: float | None = entry(default=None)
    """Of the client's own model, within its own classes."""
    frozen_class_il_accuracy: float | None = entry(default=None)
    """Of the frozen backbone under the joint head, if the request wants it."""
    frozen_task_il_accuracy: float | None = entry(default=None)
    holds: Mapping[str, str] = entry(dict, default={})
    """SHA-256 of what the client keeps for the next round, by name."""

    @property
    def own(self) -> dict[str, Tensor]:
        """Task vector and head, as the client keeps them."""
        return own_tensors(self.task_vector, self.head(self.classes))


@dataclass(frozen=True, kw_only=True)
class LacksAnswer(NoticeAnswer):
    """A client cannot train: it lacks something that it should have kept."""

    CONTENT: ClassVar[str] = "train"

    lacks: tuple[str, ...] = entry(tuple)


def read_trained(body: Body) -> TrainAnswer | LacksAnswer:
    """Read the answer to a training request; the client may lack what it should have kept."""
    lacking = bool(body[1].get("lacks"))
    return LacksAnswer.from_body(body) if lacking else TrainAnswer.from_body(body)
