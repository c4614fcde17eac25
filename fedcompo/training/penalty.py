r"""Applies the penalty while a client trains.

ITA pulls :math:`\tau` to the pre-trained weights, IEL also to the other task vectors that it is
added up with. :mod:`fedcompo.method.penalties` has the equations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcompo.config.choices import Penalty
from fedcompo.config.run import TrainConfig
from fedcompo.method.deltas import Delta, Weights
from fedcompo.method.kronecker import Metric
from fedcompo.method.penalties import (
    bounding_step,
    explicit_step,
    iel_penalty,
    implicit_step,
    ita_penalty,
    one_folding,
    own_strength,
)


@dataclass(frozen=True)
class Anchor:
    """The metric of a client's penalty: a *mean* Fisher."""

    weights: Metric
    """By weight name, each of an (out, in)."""
    of_features: bool = False
    """Whether it is a Fisher of the features: it then has the unit of their square."""


@dataclass(frozen=True)
class Ensemble:
    r"""The sum that a client trains inside: :math:`\theta_0 + \lambda(R + w\,\tau)`."""

    rest: Weights
    r""":math:`R = \sum_{s \ne c} w_s \tau_s` by weight name, each (out, in)."""
    share: float
    """w, the client's own coefficient, in (0, 1]."""
    beta: float
    """Strength of IEL's penalty."""
    scale: float = 1.0
    r""":math:`\lambda`."""


class TrainingPenalty:
    r"""Applies a penalty to deltas in training: as part of the loss, or beside the optimiser.

    For the proximal step, ``alpha`` and ``beta`` count *e-foldings*: how often the whole training
    shrinks a weight of mean curvature by the factor e, if nothing pushes it. The strength a of
    :mod:`fedcompo.method.penalties` is then :math:`\alpha / (m \sum c)`, with m the mean of all
    entries of :math:`\bar F`, and :math:`\sum c` the cosine schedule's sum over all steps. So a
    Fisher of any unit holds alike. For the other two ways of acting, a is ``alpha`` itself.

    With the proximal step, the setting ``trust-region`` bounds how far the task vector goes.

    A LoRA's proximal step solves a small system for each row and column, which on a small model
    costs as much as the training step itself: one every few steps makes up for all of them.
    """

    def __init__(
        self,
        deltas: Mapping[str, Delta],
        anchor: Anchor | None,
        ensemble: Ensemble | None,
        config: TrainConfig,
        *,
        steps: float,
        variance: float = 1.0,
    ) -> None:
        """Move the metric to the device of the deltas.

        Args:
            deltas: Trainable changes by weight name.
            anchor: The metric; None: there is no penalty.
            ensemble: The others (IEL), on that device; None: ITA.
            config: Strength, and how the penalty acts.
            steps: Optimiser steps of the whole training, of which this may be a part.
            variance: Of the features, in all: the unit of the trust region in a Fisher of features.
        """
        self._deltas, self._config, self._ensemble = deltas, config, ensemble
        strength = config.alpha if ensemble is None else ensemble.beta
        self._limit = config.trust_region if config.bounded else 0.0
        if anchor and anchor.of_features:
            self._limit *= variance
        if config.penalty is Penalty.IMPLICIT and anchor:
            strength *= 2 * one_folding(anchor.weights) / steps  # c is a half on average
        held = strength > 0 or self._limit > 0
        self._fisher: Metric = {}
        if anchor and held:
            devices = {name: next(delta.parameters()).device for name, delta in deltas.items()}
            self._fisher = {n: anchor.weights[n].to(device) for n, device in devices.items()}
        self._strength, self._pull = strength, None
        if ensemble is not None and self._fisher:
            self._strength = strength * own_strength(ensemble.share)
            self._pull = {name: strength * ensemble.rest[name] for name in deltas}
        self._schedules: list[float] = []
        self._moves: list[Tensor] = []

    def loss(self) -> Tensor | None:
        """Return the penalty as part of the loss; None unless it is coupled."""
        if not self._fisher or self._config.penalty is not Penalty.COUPLED:
            return None
        tau = {name: delta() for name, delta in self._deltas.items()}
        if self._ensemble is None:
            return ita_penalty(tau, self._fisher, self._config.alpha)
        rest, share, beta = self._ensemble.rest, self._ensemble.share, self._ensemble.beta
        return iel_penalty(tau, self._fisher, rest, share=share, beta=beta)

    def step(self, schedule: float, *, last: bool) -> None:
        """Take the penalty's own step, after the optimiser's; none if it is coupled.

        Args:
            schedule: c in (0, 1].
            last: Whether this is the last step of the training.
        """
        if not self._fisher or self._config.penalty is Penalty.COUPLED:
            return
        explicit = self._config.penalty is Penalty.EXPLICIT
        take = explicit_step if explicit else implicit_step
        self._schedules.append(schedule)
        if explicit or last or len(self._schedules) == self._config.penalty_every:
            total = sum(self._schedules)
            if self._strength > 0:
                move = take(self._deltas, self._fisher, self._strength, total, self._pull)
                self._moves.append(move.cpu())
            if self._limit:
                self._moves.append(bounding_step(self._deltas, self._fisher, self._limit))
            self._schedules.clear()

    @torch.no_grad()
    def held(self) -> float:
        r"""Return the share of the way that the penalty's own steps :math:`s_i` took back.

        .. math:: \frac{\sum_i \lVert s_i \rVert}{\sum_i \lVert s_i \rVert + \lVert\tau\rVert}

        0 if it took none, near 1 if it undid the training.
        """
        if not self._moves:
            return 0.0
        taken = float(torch.stack(self._moves).sum())
        length = float(torch.stack([delta().norm() for delta in self._deltas.values()]).norm())
        return taken / (taken + length) if taken > 0 else 0.0
