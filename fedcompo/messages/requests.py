"""The server's requests; the names of their entries and tensors stand here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.choices import Kind, Statistics
from fedcompo.errors import FileFormatError
from fedcompo.messages.body import TASK_VECTOR, Body, Content, entry, floats
from fedcompo.method.deltas import Weights
from fedcompo.method.heads import Head, head_from, head_tensors
from fedcompo.storage.tensorfile import prefixed, section

ANCHOR, OWN = "anchor", "own"
"""Parts that a client may keep: *mean* Fisher that anchors it; its last task vector and head."""
THETA, TOTAL, HEADS, REST = "theta", "total", "heads", "rest"
"""Prefixes of tensors: composed weights, sum of task vectors, heads, sum over other clients."""
REQUEST = "request"
"""The ``content`` of every request."""
ROUND = "server-round"
"""Flower's name for the number of a round; only a request of averaging has it."""


def addressed(
    request: Body,
    registered_name: str,
    preprocessing: Preprocessing | None = None,
    shard: int | None = None,
) -> Body:
    """A request as it travels.

    Args:
        request: The request.
        registered_name: The name that the server knows the node by, or "".
        preprocessing: How clients prepare their examples; None: as their own backbone says.
        shard: Which of the node's shards it is for; None: the node has none.
    """
    tensors, manifest = request
    about: dict[str, Any] = {"content": REQUEST, "registered_name": registered_name}
    about |= {"preprocessing": asdict(preprocessing)} if preprocessing else {}
    about |= {} if shard is None else {"shard": shard}
    return tensors, about | manifest


def shard_in(request: Body) -> int | None:
    """Which of the node's shards a request is for; None: the node has none.

    Raises:
        FileFormatError: If it is no number.
    """
    shard = request[1].get("shard")
    if shard is not None and (type(shard) is not int or shard < 0):
        raise FileFormatError(f"The server asks for the shard {shard!r}, expected a number >= 0.")
    return shard


def registered_name(request: Body) -> str:
    """The name that the server knows this node by, or ""."""
    return str(request[1].get("registered_name", ""))


def own_tensors(task_vector: Mapping[str, Tensor], head: Head) -> dict[str, Tensor]:
    """A client's task vector and head as they travel; the classes go into the manifest."""
    return prefixed(TASK_VECTOR, task_vector) | head_tensors(head)


def preprocessing_of(request: Body) -> Preprocessing | None:
    """How the server wants examples prepared; ``BackboneError`` if that cannot be used."""
    wanted = request[1].get("preprocessing")
    return None if wanted is None else Preprocessing.parse(wanted)


class IdentifyRequest(Content):
    """Ask a client for its name and classes."""


@dataclass(frozen=True, kw_only=True)
class DescribeRequest(Content):
    """Ask for statistics of θ₀'s features on all training images, by class."""

    fisher: bool = entry(bool)
    """Whether to send a Fisher sum too, under no head of others."""


@dataclass(frozen=True, kw_only=True)
class NoticeRequest(Content):
    """Tell the remaining clients that one was removed."""

    text: str = entry(str)
    """For people."""
    record: str = entry(str)
    """The removal record."""


@dataclass(frozen=True, kw_only=True)
class _WithHead(Content):
    """A request that brings the joint head."""

    joint: Head

    def _write(self) -> Body:
        return head_tensors(self.joint), {"classes": list(self.joint.classes)}

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> dict[str, Any]:
        return {"joint": head_from(tensors, manifest["classes"])}


@dataclass(frozen=True, kw_only=True)
class FisherRequest(_WithHead):
    """Ask for the Fisher diagonal of the class probabilities under the joint head."""


@dataclass(frozen=True, kw_only=True)
class _OfModels(Content):
    r"""Ask about models on one line, :math:`\theta_0 + \lambda' \sum_c m_c \tau_c`."""

    total: Weights
    r""":math:`\sum_c m_c \tau_c` by weight name, each (out, in)."""
    linearised: bool = entry(bool)
    """Whether it changes the model to first order alone."""
    factors: tuple[float, ...] = entry(floats)
    r""":math:`\lambda'` of each model."""

    def _write(self) -> Body:
        return prefixed(TOTAL, self.total), {}

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> dict[str, Any]:
        return {"total": section(TOTAL, tensors)}


@dataclass(frozen=True, kw_only=True)
class RealignRequest(_OfModels):
    """Ask for statistics of each model's features, by class."""

    form: Statistics = entry(Statistics, key="statistics")
    """Of which sort."""
    vote: bool = entry(bool)
    """Whether there will be a vote: images kept aside to choose on are left out then."""


@dataclass(frozen=True, kw_only=True)
class VoteRequest(_OfModels):
    """Ask how well each model classifies the images kept aside, under a head of its own."""

    heads: tuple[Head, ...]
    """One for each factor."""

    def _write(self) -> Body:
        tensors, entries = super()._write()
        for index, head in enumerate(self.heads):
            tensors |= prefixed(f"{HEADS}/{index}", head_tensors(head))
        classes = list(self.heads[0].classes) if self.heads else []
        return tensors, {**entries, "classes": classes, "heads": len(self.heads)}

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> dict[str, Any]:
        heads = (
            head_from(section(f"{HEADS}/{index}", tensors), manifest["classes"])
            for index in range(int(manifest["heads"]))
        )
        return super()._read(tensors, manifest) | {"heads": tuple(heads)}


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(_WithHead):
    """Ask for the composed model's accuracy on the client's test images."""

    theta: Weights
    """Composed weights by name, each (out, in)."""
    linearised: bool = entry(bool)
    """Whether they change the model to first order alone."""
    last: bool | None = entry(bool, default=None)
    """True: the client's images are needed no more in this run; None: they may be."""
    own_heads: Head | None = None
    """The clients' own heads side by side, to measure beside the joint head; same classes."""

    def _write(self) -> Body:
        tensors, entries = super()._write()
        tensors |= prefixed(THETA, self.theta)
        if self.own_heads:
            tensors |= prefixed(HEADS, head_tensors(self.own_heads))
        return tensors, entries

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> dict[str, Any]:
        heads = section(HEADS, tensors)
        own = {"own_heads": head_from(heads, manifest["classes"])} if heads else {}
        return super()._read(tensors, manifest) | {"theta": section(THETA, tensors)} | own


@dataclass(frozen=True)
class Others:
    """The sum inside which a client trains; see :class:`fedcompo.training.penalty.Ensemble`."""

    rest: Weights
    """Of the other clients, by weight name, each (out, in)."""
    share: float
    """The client's own coefficient."""
    scale: float


@dataclass(frozen=True)
class Round:
    """One of the rounds that a client trains in."""

    number: int
    """From 1."""
    federation: str
    """Under which name the client keeps something for the next round."""
    last: bool
    passed: float
    """Share of the whole training that lies behind."""
    share: float
    """Share of the whole training that this round is."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest(_WithHead):
    """Ask a client to fit its task vector, alone or inside the sum of the others.

    The joint head is to start from, or only to measure the frozen backbone.
    """

    kind: Kind = entry(Kind)
    frozen: bool = entry(bool)
    """Whether to measure the frozen backbone too."""
    needs: Mapping[str, str] = entry(dict)
    """SHA-256 of the parts that training needs, by name; empty: the client does not keep it."""
    sent: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Tensors of the needed parts that the request holds."""
    others: Others | None = None
    """None: the client trains alone."""
    round: Round | None = None
    """None: there is but one."""

    @property
    def lacks(self) -> tuple[str, ...]:
        """Needed parts that the request does not hold."""
        return tuple(name for name in self.needs if name not in self.sent)

    def _write(self) -> Body:
        tensors, manifest = super()._write()
        for name, own in self.sent.items():
            tensors |= prefixed(name, own)
        if self.others:
            tensors |= prefixed(REST, self.others.rest)
            manifest["ensemble"] = {"share": self.others.share, "scale": self.others.scale}
        if part := self.round:
            manifest |= {"round": part.number, "federation": part.federation, "last": part.last}
            manifest["course"] = {"passed": part.passed, "share": part.share}
        return tensors, manifest

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Raises ``FileFormatError`` if something is needed that no client keeps."""
        if unknown := set(manifest["needs"]) - {ANCHOR, OWN}:
            raise FileFormatError(
                f"The server asks for {min(unknown)!r}, expected {ANCHOR} or {OWN}. Use the same "
                "fedcompo version everywhere."
            )
        sent = {name: section(name, tensors) for name in manifest["needs"]}
        values: dict[str, Any] = {"sent": {name: own for name, own in sent.items() if own}}
        if ensemble := manifest.get("ensemble"):
            values["others"] = Others(section(REST, tensors), **ensemble)
        if "round" in manifest:
            own = int(manifest["round"]), str(manifest["federation"]), bool(manifest["last"])
            values["round"] = Round(*own, **manifest["course"])
        return values | super()._read(tensors, manifest)


@dataclass(frozen=True, kw_only=True)
class AveragingRequest(_WithHead):
    """Ask a client to train the shared model for one round (FedAvg, FedProx)."""

    kind: Kind = entry(Kind)
    task_vector: Mapping[str, Tensor]
    rounds: int = entry(int)
    """Number of rounds in all."""
    number: int = entry(int, key=ROUND)
    """Number of this round, from 1."""
    proximal_mu: float | None = entry(float, key="proximal-mu", default=None)
    """Strength of FedProx, by Flower's name; None: it is FedAvg."""

    def _write(self) -> Body:
        return own_tensors(self.task_vector, self.joint), super()._write()[1]

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> dict[str, Any]:
        return super()._read(tensors, manifest) | {"task_vector": section(TASK_VECTOR, tensors)}
