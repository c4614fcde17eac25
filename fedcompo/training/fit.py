"""Fit a client's task vector: alone (ITA), or inside the sum of all (IEL).

The weights θ₀ + Δ go into the model (:mod:`fedcompo.backbone.merged`), for every kind but
tangents, which are trained to first order (:mod:`fedcompo.backbone.tangent`). Source of the
procedure: Porrello et al., ICLR 2025 (arXiv 2405.16350), section 4.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.merged import trained_forward
from fedcompo.backbone.tangent import square_loss, tangent_features
from fedcompo.config.choices import Kind, Precision
from fedcompo.config.run import TrainConfig
from fedcompo.data.client_data import Split
from fedcompo.errors import ConfigError, ContributionError
from fedcompo.method.deltas import Delta, Weights, new_deltas
from fedcompo.method.heads import Head
from fedcompo.method.task_vector import TaskVector
from fedcompo.report.progress import track
from fedcompo.training.augmentation import augment
from fedcompo.training.head import HeadTraining, feature_scale
from fedcompo.training.pace import LEARNING_RATES, by_step_size, pace
from fedcompo.training.penalty import Anchor, Ensemble, TrainingPenalty

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """Result of a training."""

    task_vector: TaskVector
    head: Head
    losses: tuple[float, ...]
    """Mean training loss of each epoch, the last of which may be a part; without penalties."""
    held: float = 0.0
    """Share of the way that the anchor took back; see :meth:`TrainingPenalty.held`."""


@dataclass(frozen=True)
class Course:
    """The start of a training, the penalty that acts on it, and its place in a longer training."""

    begin: TaskVector | None = None
    """Task vector to go on with; None: a new one."""
    head: Head | None = None
    """Head to go on with; None: that which training starts from."""
    fixed: bool = False
    """Whether the head stays as it is: one class alone teaches no head anything."""
    anchor: Anchor | None = None
    """Metric of the penalty; None: no penalty."""
    ensemble: Ensemble | None = None
    """The others that the client trains in sum with (IEL); None: alone (ITA)."""
    passed: float = 0.0
    """Share of the whole training that is done when this part begins."""
    share: float = 1.0
    """Share of the whole training that this part is; the cosine schedule runs over the whole."""
    proximal_mu: float = 0.0
    """Pull of all trained parameters to where this part begins (FedProx, arXiv 1812.06127)."""


def fit_task_vector(
    backbone: Backbone,
    kind: Kind,
    data: Split,
    start: Head,
    config: TrainConfig,
    *,
    generator: torch.Generator,
    course: Course | None = None,
) -> Fitted:
    """Fine-tune the backbone's target weights and a head on one client's images.

    Training takes ``local_epochs`` passes over the images. A client with too few images for
    ``local_steps`` steps (of a part of a longer training: that share of them) takes smaller
    batches, of at least 8, and then more passes, of which the last may be cut short.

    Args:
        backbone: Pre-trained weights.
        kind: How the task vector is parametrised.
        data: Training images; labels index ``start.classes``.
        start: Head that training begins with.
        config: How to train.
        generator: Source of LoRA's A, of the order of images and of augmentation; on the CPU.
        course: Another start, a penalty, part of a longer training; None: none of these.

    Returns:
        Task vector; head, of a fixed one the rows of the labels alone; losses.

    Raises:
        ContributionError: If the loss stops being finite.
    """
    course = course or Course()
    training_of = _TangentTraining if kind is Kind.TANGENT else _Training
    scale, variance = feature_scale(backbone, data.images)
    head = HeadTraining(
        course.head or start, scale=scale, fixed=course.fixed, device=backbone.device
    )
    batch, steps = pace(len(data.labels), config, course.share)
    training = training_of(backbone, kind, head, config, course, generator, steps, variance)
    whole, rest = divmod(steps, math.ceil(len(data.labels) / batch))
    epochs, losses, step = whole + (rest > 0), list[float](), 0
    with track(whole * len(data.labels) + rest * batch, "images", "training") as count:
        for epoch in range(1, epochs + 1):
            total, seen = torch.zeros((), dtype=torch.float64, device=backbone.device), 0
            for images, labels in islice(_batches(data, batch, generator), steps - step):
                passed = course.passed + course.share * step / steps
                schedule = 0.5 * (1 + math.cos(math.pi * passed))
                step += 1
                loss = training.step(images, labels, schedule, last=step == steps)
                total += len(labels) * loss
                seen += len(labels)
                count(len(labels))
            losses.append(float(total) / seen)
            if not math.isfinite(losses[-1]):
                raise ContributionError.public(
                    f"The training loss is {losses[-1]} after epoch {epoch}: training diverged. "
                    "Lower `learning-rate`, or use `penalty = implicit`."
                )
            logger.info("Epoch %d of %d, loss %.4f", epoch, epochs, losses[-1])
    vector = TaskVector.of(kind, training.deltas, base=backbone.fingerprint)
    trained = head.result()
    if course.fixed:
        rows = sorted(set(data.labels.tolist()))
        trained = trained.rows(trained.classes[row] for row in rows)
    return Fitted(vector, trained, tuple(losses), training.held())


def ensembled(tau: Weights, theta_0: Weights, ensemble: Ensemble | None) -> Weights:
    r"""Return the weights trained at: :math:`\theta_0 + \lambda(R + w\,\tau)`, or alone θ₀ + τ.

    Args:
        tau: The client's own task vector, dense; each entry (out, in).
        theta_0: Pre-trained weights; has the keys of ``tau``, same shapes.
        ensemble: The others; None: there are none.

    Returns:
        By weight name, each (out, in).
    """
    if ensemble is None:
        return {name: theta_0[name] + change for name, change in tau.items()}
    scale, share, rest = ensemble.scale, ensemble.share, ensemble.rest
    return {n: theta_0[n] + scale * (rest[n].to(t) + share * t) for n, t in tau.items()}


class _Training:
    """Deltas and head while they are trained."""

    def __init__(
        self,
        backbone: Backbone,
        kind: Kind,
        head: HeadTraining,
        config: TrainConfig,
        course: Course,
        generator: torch.Generator,
        steps: int,
        variance: float,
    ) -> None:
        self._backbone, self._config, self._generator = backbone, config, generator
        self._head = head
        self.deltas = new_deltas(kind, backbone.theta_0, rank=config.rank, generator=generator)
        if course.begin is not None:
            _restore(self.deltas, course.begin)
        self._ensemble, self._base, self._scale = course.ensemble, backbone.theta_0, 1.0
        if (others := course.ensemble) is not None:
            rest = {name: t.to(backbone.device) for name, t in others.rest.items()}
            self._ensemble = replace(others, rest=rest)
            self._scale, lent = others.scale * others.share, others.scale
            self._base = {n: w.add(rest[n], alpha=lent) for n, w in self._base.items()}
        whole = steps / course.share
        self._penalty = TrainingPenalty(
            self.deltas, course.anchor, self._ensemble, config, steps=whole, variance=variance
        )
        self.held = self._penalty.held
        # AdamW decays towards zero; a scale of (IA)³ rests at one, and would take the weight along.
        decay = 0.0 if kind is Kind.IA3 else config.weight_decay
        relative = config.learning_rate == 0
        sizes = by_step_size(self.deltas, backbone.theta_0 if relative else {})
        groups: list[dict[str, Any]] = [
            {"params": p, "size": s, "weight_decay": decay} for s, p in sizes.items()
        ]
        groups.append({"params": head.parameters, "size": 1.0, "weight_decay": 0.0})
        self._peak = config.learning_rate or LEARNING_RATES[kind]
        self._optimiser = torch.optim.AdamW(groups, lr=self._peak, fused=True)
        self._parameters = [p for group in groups for p in group["params"]]
        self._mu = course.proximal_mu
        self._began = [p.detach().clone() for p in self._parameters] if self._mu else []

    def step(self, images: Tensor, labels: Tensor, schedule: float, *, last: bool) -> Tensor:
        """Take one step on a batch; returns its mean loss, without penalties, on the device."""
        for group in self._optimiser.param_groups:
            group["lr"] = self._peak * schedule * group["size"]
        device, size = self._backbone.device, self._config.micro_batch or len(labels)
        images = augment(images.to(device), self._config.augmentation, self._generator)
        self._optimiser.zero_grad()
        mean = torch.zeros((), device=device)
        with self._forward() as features:
            parts = (torch.split(whole, size) for whole in (images, labels.to(device)))
            for some, own in zip(*parts, strict=True):
                with _autocast(self._config.precision, device):
                    logits = self._head.logits(features(some))
                loss = self._loss(logits.float(), own) * (len(own) / len(labels))
                loss.backward()  # type: ignore[no-untyped-call]
                mean += loss.detach()
        if (beside := self._beside()) is not None:
            beside.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        self._penalty.step(schedule, last=last)
        return mean

    def _forward(self) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """The map from images to features (batch, features) under what is trained."""
        blocks = self._config.checkpoint_blocks
        return trained_forward(
            self._backbone, self.deltas, self._base, self._scale, checkpointed=blocks
        )

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of a batch; a scalar."""
        return F.cross_entropy(logits, labels)

    def _beside(self) -> Tensor | None:
        r"""A coupled penalty, and :math:`\tfrac\mu2\lVert p - p_{begin}\rVert^2`; None: neither."""
        penalty = self._penalty.loss()
        if not self._mu:
            return penalty
        pairs = zip(self._parameters, self._began, strict=True)
        proximal = 0.5 * self._mu * torch.stack([(p - b).square().sum() for p, b in pairs]).sum()
        return proximal if penalty is None else penalty + proximal


class _TangentTraining(_Training):
    r"""For tangents: features are linear in :math:`\tau`, and the loss is TMC's square loss."""

    def _forward(self) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        if self._config.checkpoint_blocks:
            raise ConfigError.public(
                "`checkpoint-blocks` is set, but tangents are not trained so. Unset it, and set "
                "`micro-batch` to save memory, or choose another `kind`."
            )
        return nullcontext(self._features)

    def _features(self, images: Tensor) -> Tensor:
        tau = {name: delta() for name, delta in self.deltas.items()}
        if (e := self._ensemble) is not None:
            tau = {name: e.scale * (e.rest[name] + e.share * t) for name, t in tau.items()}
        return tangent_features(self._backbone, tau, images)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return square_loss(logits, labels, self._config.target_logit)


def _restore(deltas: dict[str, Delta], vector: TaskVector) -> None:
    """Set deltas to a stored task vector's parameters."""
    for name, delta in deltas.items():
        for parameter, value in list(delta.named_parameters()):
            stored = vector.tensors[f"{name}/{parameter}"].to(value, copy=True)
            setattr(delta, parameter, nn.Parameter(stored))


def _batches(
    data: Split, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(data.labels), generator=generator)
    for part in torch.split(order, batch_size):
        yield data.images[part], data.labels[part]


def _autocast(precision: Precision, device: torch.device) -> torch.autocast:
    on_gpu = device.type == "cuda"
    half = precision is Precision.BFLOAT16 or (precision is Precision.AUTO and on_gpu)
    return torch.autocast(device.type, torch.bfloat16, enabled=half)
