"""Enums of the settings that take one of a few words, and checks of those that take a list."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum

from fedcompo.config.setting import Check, names_of


class Kind(StrEnum):
    """How the change of one weight is parametrised; see :mod:`fedcompo.method.deltas`."""

    FULL = "full"
    LORA = "lora"
    IA3 = "ia3"
    TANGENT = "tangent"


class Method(StrEnum):
    """How the clients train towards one model."""

    ITA = "ita"
    """Every client trains alone; see :mod:`server.strategy`."""
    IEL = "iel"
    """Rounds in which clients train inside their sum; see :mod:`server.rounds.rounds`."""
    FEDAVG = "fedavg"
    """Rounds in which clients train copies of one model, which are averaged: a baseline."""
    FEDPROX = "fedprox"
    """FedAvg with a penalty that keeps each copy near the average: a baseline."""


class Schedule(StrEnum):
    """Whether clients train all at once, or one after the other."""

    PARALLEL = "parallel"
    SEQUENTIAL = "sequential"


class Preset(StrEnum):
    """Which defaults a run starts from; see :mod:`fedcompo.config.presets`."""

    DEFAULT = "default"
    PAPER = "paper"


class Statistics(StrEnum):
    """How a client describes its features; the joint head is made of it."""

    SUMS = "sums"
    """Sums with a closed-form head; see :mod:`fedcompo.method.statistics`."""
    MIXTURES = "mixtures"
    """Gaussian mixtures that features are drawn from; see :mod:`fedcompo.method.features`."""


class Curvature(StrEnum):
    """Of what the Fisher diagonal is taken; see :mod:`fedcompo.training.fisher_estimate`."""

    FEATURES = "features"
    """Of the features: no label, no head, one backward pass."""
    EXACT = "exact"
    """Of the class probabilities: a backward pass for each class."""
    MONTE_CARLO = "monte-carlo"
    """Of the class probabilities, by labels drawn from them."""


class Penalty(StrEnum):
    """How the anchor acts on training; see :mod:`fedcompo.method.penalties`."""

    COUPLED = "coupled"
    EXPLICIT = "explicit"
    IMPLICIT = "implicit"


class AnchorBy(StrEnum):
    """Whose Fisher diagonal is in the anchoring penalty of a client."""

    OTHERS = "others"
    OWN = "own"
    REFERENCE = "reference"


class Action(StrEnum):
    """What a run does: train clients, or remove one."""

    TRAIN = "train"
    REMOVE = "remove"


class Modality(StrEnum):
    """Kind of the examples that a source of data holds and a backbone reads."""

    PICTURES = "pictures"
    TEXTS = "texts"


class EngineKind(StrEnum):
    """What runs the apps of a simulation."""

    FLOWER = "flower"
    """Flower's own engine; see :mod:`fedcompo.engine.superlink`."""
    IN_PROCESS = "in-process"
    """This very process; see :mod:`fedcompo.engine.in_process`."""


class HeadStart(StrEnum):
    """Head from which a client's training starts.

    A Fisher of class probabilities is under the joint head, unless it starts from a probe.
    """

    ZERO = "zero"
    """All logits zero: the backbone has to learn."""
    ALIGNED = "aligned"
    """The client's rows of the joint head."""
    PROBE = "probe"
    """The client's own, fitted to its pre-trained features."""


class Coefficients(StrEnum):
    """How the composition coefficients are chosen."""

    UNIFORM = "uniform"
    EXAMPLES = "examples"


class Augmentation(StrEnum):
    """Random changes of the training images; see :mod:`fedcompo.training.augmentation`."""

    AUTO = "auto"
    """Crop; of texts, none."""
    NONE = "none"
    SHIFT = "shift"
    CROP = "crop"
    CROP_FLIP = "crop-flip"


class Precision(StrEnum):
    """Arithmetic of the forward and backward pass of training."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Wire(StrEnum):
    """Number format of task vector and Fisher on the wire, most bits first.

    See :mod:`fedcompo.messages.wire`.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


class FisherForm(StrEnum):
    """How much of its Fisher a client sends, most first; see :mod:`fedcompo.method.fisher`."""

    DENSE = "dense"
    KRONECKER = "kronecker"
    FACTORED = "factored"
    NONE = "none"


def kinds_of(value: str) -> tuple[Kind, ...]:
    """Split a comma-separated list of kinds; raises ``ValueError`` on an unknown one."""
    return tuple(Kind(part.strip()) for part in value.split(","))


KINDS: Check = (
    lambda value: {part.strip() for part in value.split(",")} <= set(Kind),
    f"must be one of {', '.join(Kind)}, or several joined by commas",
)
UNMIXED: Check = (
    lambda value: Kind.TANGENT not in value or {p.strip() for p in value.split(",")} == {"tangent"},
    "must not mix tangent with another kind: one model is linearised, or it is not",
)


def rounds_of(value: str) -> dict[str, int]:
    """Split ``name:round`` pairs; raises ``ValueError`` on an ill-formed or repeated one."""
    pairs = [pair.rpartition(":")[::2] for pair in names_of(value)]
    rounds = {name.strip(): int(number) for name, number in pairs}
    if len(rounds) < len(pairs) or not all(rounds) or min(rounds.values(), default=1) < 1:
        raise ValueError(f"{value!r} names nobody, somebody twice, or a round before the first")
    return rounds


def _are_rounds(value: str) -> bool:
    try:
        rounds_of(value)
    except ValueError:
        return False
    return True


ROUNDS: Check = (_are_rounds, "must be <client>:<round>, the rounds from 1, joined by commas")


def _is_scale(value: str) -> bool:
    try:
        return value == AUTO or 0 < float(value) < float("inf")
    except ValueError:
        return False


AUTO = "auto"
SCALE: Check = (_is_scale, "must be auto or a number > 0")
TRACKERS: Check = (
    lambda value: {*names_of(value)} <= {"tensorboard", "mlflow", "wandb"},
    "must be tensorboard, mlflow or wandb, joined by commas",
)
DEVICE: Check = (
    lambda value: re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None,
    "must be auto, cpu, cuda or cuda:<n>",
)


def are_tangents(kinds: Iterable[str]) -> bool:
    """Return whether there is at least one kind, and all are tangents."""
    return set(kinds) == {Kind.TANGENT}
