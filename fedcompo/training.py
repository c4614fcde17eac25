"""Fit a client's task vector (ITA), and evaluate a model on a client's images.

The plain path serves every kind: the weights θ₀ + Δ go into ``functional_call``, and autograd does
the rest. Source of the procedure: Porrello et al., ICLR 2025 (arXiv 2405.16350), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcompo.augmentation import augment
from fedcompo.backbone import Backbone
from fedcompo.config import Kind, Penalty, Precision, TrainConfig
from fedcompo.data import Split
from fedcompo.deltas import Delta, Weights, new_deltas
from fedcompo.errors import ContributionError
from fedcompo.features import extract_features
from fedcompo.heads import Head
from fedcompo.penalties import explicit_step, head_penalty, implicit_step, ita_penalty
from fedcompo.task_vector import TaskVector

LEARNING_RATES = {Kind.LORA: 1e-3, Kind.FULL: 3e-4, Kind.IA3: 1e-2}
"""Peak step sizes of kinds that were given none: the fewer parameters, the larger."""

EpochCallback = Callable[[int, int, float], None]
"""Called after each epoch with the epoch (from 1), the number of epochs, the mean loss."""


@dataclass(frozen=True)
class Anchor:
    """What holds a client near the pre-trained weights: a *mean* Fisher."""

    weights: Weights
    """By weight name, each (out, in)."""
    head_weight: Tensor
    """(own classes, features)."""
    head_bias: Tensor
    """(own classes,)."""


@dataclass(frozen=True)
class Fitted:
    """What training yields."""

    task_vector: TaskVector
    head: Head
    losses: tuple[float, ...]
    """Mean training loss (without penalties), one an epoch."""


@dataclass(frozen=True)
class Accuracy:
    """Shares of correctly classified images, in [0, 1]."""

    class_il: float
    """Arg max over the classes of all clients."""
    task_il: float
    """Arg max over the client's own classes."""
    num_examples: int


def fit_task_vector(
    backbone: Backbone,
    kind: Kind,
    data: Split,
    start: Head,
    aligned: Head,
    anchor: Anchor | None,
    config: TrainConfig,
    *,
    generator: torch.Generator,
    on_epoch: EpochCallback = lambda epoch, epochs, loss: None,
) -> Fitted:
    """Fine-tune the backbone's target weights and a head on one client's images.

    Args:
        backbone: Pre-trained weights.
        kind: How the task vector is parametrised.
        data: Training images; labels index ``start.classes``.
        start: Head that training begins with.
        aligned: Head that the head penalty pulls to; same classes.
        anchor: Mean Fisher, as a rule of the other clients; None: no Fisher penalty.
        config: How to train.
        generator: Source of LoRA's A, of the order of images and of augmentation; on the CPU.
        on_epoch: Told of progress.

    Returns:
        Task vector, head, losses.

    Raises:
        ContributionError: If the loss stops being finite.
    """
    training = _Training(backbone, kind, start, aligned, anchor, config, generator)
    steps = config.local_epochs * math.ceil(len(data.labels) / config.batch_size)
    losses: list[float] = []
    step = 0
    for epoch in range(config.local_epochs):
        total = 0.0
        for images, labels in _batches(data, config.batch_size, generator):
            schedule = 0.5 * (1 + math.cos(math.pi * step / steps))
            step += 1
            total += len(labels) * training.step(images, labels, schedule, last=step == steps)
        losses.append(total / len(data.labels))
        if not math.isfinite(losses[-1]):
            raise ContributionError(
                f"The training loss is {losses[-1]} after epoch {epoch + 1}: training diverged. "
                "Lower `learning-rate`, or use `penalty = implicit`."
            )
        on_epoch(epoch + 1, config.local_epochs, losses[-1])
    vector = TaskVector.of(kind, training.deltas, base=backbone.fingerprint)
    return Fitted(vector, training.head.result(), tuple(losses))


def evaluate(
    backbone: Backbone, theta: Weights, head: Head, classes: tuple[str, ...], data: Split
) -> Accuracy:
    """Classify a client's images.

    Args:
        backbone: Pre-trained weights.
        theta: Target weights to use in their place, by name.
        head: Joint head; may hold more classes than the client's, must hold all of those.
        classes: The client's classes, which ``data.labels`` index.
        data: Images and labels.
    """
    logits = head(extract_features(backbone.forward(theta), data.images))
    own = head.indices(classes)
    return Accuracy(
        class_il=_share(logits.argmax(1) == own[data.labels]),
        task_il=_share(logits[:, own].argmax(1) == data.labels),
        num_examples=len(data.labels),
    )


class _Training:
    """Deltas and head while they are trained."""

    def __init__(
        self,
        backbone: Backbone,
        kind: Kind,
        start: Head,
        aligned: Head,
        anchor: Anchor | None,
        config: TrainConfig,
        generator: torch.Generator,
    ) -> None:
        device = backbone.device
        self._backbone, self._config, self._generator = backbone, config, generator
        self.deltas = new_deltas(kind, backbone.theta_0, rank=config.rank, generator=generator)
        self.head = _HeadTraining(start, aligned, anchor, config, device)
        anchored = anchor is not None and config.alpha > 0
        weights = anchor.weights if anchor is not None and anchored else {}
        self._fisher = {name: f.to(device) for name, f in weights.items()}
        self._decoupled = _DecoupledPenalty(self.deltas, self._fisher, config)
        trained = [p for delta in self.deltas.values() for p in delta.parameters()]
        # AdamW decays towards zero; a scale of (IA)³ rests at one, and would take the weight along.
        decay = 0.0 if kind is Kind.IA3 else config.weight_decay
        groups = [
            {"params": trained, "weight_decay": decay},
            {"params": self.head.parameters, "weight_decay": 0.0},
        ]
        self._peak = config.learning_rate or LEARNING_RATES[kind]
        self._optimiser = torch.optim.AdamW(groups, lr=self._peak)

    def step(self, images: Tensor, labels: Tensor, schedule: float, *, last: bool) -> float:
        """Take one step on a batch; returns its mean loss, without penalties."""
        config, backbone = self._config, self._backbone
        for group in self._optimiser.param_groups:
            group["lr"] = self._peak * schedule
        images = augment(images.to(backbone.device), config.augmentation, self._generator)
        tau = {name: delta() for name, delta in self.deltas.items()}
        theta = {name: backbone.theta_0[name] + change for name, change in tau.items()}
        with _autocast(config.precision, backbone.device):
            logits = self.head.logits(backbone.forward(theta)(images))
        loss = F.cross_entropy(logits.float(), labels.to(backbone.device))
        objective = loss + self.head.penalty()
        if self._fisher and config.penalty is Penalty.COUPLED:
            objective = objective + ita_penalty(tau, self._fisher, config.alpha)
        self._optimiser.zero_grad()
        objective.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        if self._fisher:
            self._decoupled.step(schedule, last=last)
        return float(loss.detach())


class _HeadTraining:
    """The head while it is trained, and the penalty that pulls it to the aligned one."""

    def __init__(
        self,
        start: Head,
        aligned: Head,
        anchor: Anchor | None,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self.classes = start.classes
        self.weight = nn.Parameter(start.weight.float().to(device, copy=True))
        self.bias = nn.Parameter(start.bias.float().to(device, copy=True))
        self._aligned = aligned.weight.float().to(device), aligned.bias.float().to(device)
        zeros = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        given = (anchor.head_weight.to(device), anchor.head_bias.to(device)) if anchor else zeros
        self._fisher = given
        self._strengths = {
            "fisher_strength": config.head_alpha,
            "plain_strength": config.head_decay,
        }

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight, self.bias]

    def logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)

    def penalty(self) -> Tensor:
        return torch.stack(
            [
                head_penalty(parameter - aligned, fisher, **self._strengths)
                for parameter, aligned, fisher in zip(
                    self.parameters, self._aligned, self._fisher, strict=True
                )
            ]
        ).sum()

    def result(self) -> Head:
        return Head(self.classes, self.weight.detach().cpu(), self.bias.detach().cpu())


class _DecoupledPenalty:
    """Applies the anchor beside the optimiser.

    A LoRA's proximal step solves a small system for each row and column, which on a small model
    costs as much as the training step itself: one every few steps makes up for all of them.
    """

    def __init__(self, deltas: dict[str, Delta], fisher: Weights, config: TrainConfig) -> None:
        self._deltas, self._fisher, self._config = deltas, fisher, config
        self._schedules: list[float] = []

    def step(self, schedule: float, *, last: bool) -> None:
        if self._config.penalty is Penalty.EXPLICIT:
            explicit_step(self._deltas, self._fisher, self._config.alpha, schedule)
        elif self._config.penalty is Penalty.IMPLICIT:
            self._schedules.append(schedule)
            if last or len(self._schedules) == self._config.penalty_every:
                implicit_step(self._deltas, self._fisher, self._config.alpha, sum(self._schedules))
                self._schedules.clear()


def _batches(
    data: Split, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(data.labels), generator=generator)
    for part in torch.split(order, batch_size):
        yield data.images[part], data.labels[part]


def _autocast(precision: Precision, device: torch.device) -> torch.autocast:
    half = precision is Precision.BFLOAT16 or (
        precision is Precision.AUTO and device.type == "cuda"
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean()) if len(hits) else float("nan")
