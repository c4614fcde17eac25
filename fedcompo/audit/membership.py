r"""Two membership-inference attacks, which tell a model's training examples from others.

Both give each example a score, higher where it looks like a member; an :class:`Attack` says how
well the scores tell members from non-members. With :math:`s^+` and :math:`s^-` the scores of one of
each, drawn at random:

.. math:: \mathrm{AUC} = P(s^+ > s^-) + \tfrac12 P(s^+ = s^-), \qquad
          \mathrm{TPR}(r) = \max_t P(s^+ \ge t)\ \text{ subject to }\ P(s^- \ge t) \le r

An AUC of 0.5 is chance. Accuracy at the best threshold is left out: a threshold chosen on the
examples it is judged on finds an advantage where there is none.

Members and non-members must come from one distribution, such as a random split of one data set;
else the scores tell the two sets apart, not who was trained on.

Sources: Carlini et al., *Membership Inference Attacks From First Principles*, S&P 2022 (arXiv
2112.03570); Yeom et al., *Privacy Risk in Machine Learning*, CSF 2018 (arXiv 1709.01604).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcompo.errors import DataError

ONE_IN = (20, 100, 1000)
"""False-positive rates at which true positives are counted: one in so many non-members."""
FEWEST_FALSE_POSITIVES = 5
"""A rate is reported only if it allows so many; below, its interval says little."""
RESAMPLES = 1000
LEVEL = 0.95
FEWEST_SHADOWS = 2
SMALLEST_SPREAD = 1e-4
"""Least standard deviation of phi: about what the rounding of float32 logits leaves of it."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def covers(self, value: float) -> bool:
        """Whether the value lies within the interval, ends included."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Attack:
    """Success of an attack at telling members from non-members.

    The intervals are percentiles over resampled examples, members and non-members apart. They are
    about which examples were drawn, not about another run of training, and shrink to a point where
    the scores separate perfectly.
    """

    auc: Estimate
    """Area under the ROC curve in [0, 1]; ties count half."""
    tpr: Mapping[float, Estimate]
    """Share of members found, by false-positive rate: 0.05, 0.01 and 0.001, each only where it
    allows at least 5 false positives, so from 100, 500 and 5,000 non-members on."""

    @classmethod
    def of(cls, member_scores: Tensor, nonmember_scores: Tensor, *, seed: int = 0) -> Attack:
        """Judge scores, higher for a member.

        Args:
            member_scores: (members,).
            nonmember_scores: (nonmembers,).
            seed: Seed of the bootstrap; equal seeds and sizes draw the same examples.

        Raises:
            DataError: If there are fewer than 2 of either, or a score is not finite.
        """
        m, n = len(member_scores), len(nonmember_scores)
        if min(m, n) < 2:
            raise DataError(
                f"An attack needs at least 2 members and 2 non-members, got {m} and {n}. "
                "Give it more examples."
            )
        scores = _finite(torch.cat([member_scores, nonmember_scores]), "scores").cpu().numpy()
        # Level 0 is the highest score: going up the levels is lowering the threshold.
        levels = np.unique(-scores, return_inverse=True)[1]
        members, nonmembers = levels[:m], levels[m:]
        one_in = [k for k in ONE_IN if n // k >= FEWEST_FALSE_POSITIVES]
        rng = np.random.default_rng(seed)
        drawn = [
            _figures(rng.choice(members, m), rng.choice(nonmembers, n), one_in)
            for _ in range(RESAMPLES)
        ]
        lows, highs = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).tolist()
        auc, *tprs = map(Estimate, _figures(members, nonmembers, one_in), lows, highs)
        return cls(auc, {1 / k: tpr for k, tpr in zip(one_in, tprs, strict=True)})

    def is_chance(self) -> bool:
        """Whether the AUC's interval covers 0.5: the attack may be no better than guessing."""
        return self.auc.covers(0.5)


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Put the confidence in the true class on the logit scale: :math:`\log p_y-\log(1-p_y)`.

    This is the :math:`\phi` of the likelihood-ratio attack: roughly normal over trainings, as
    :math:`p_y` is not. Computed as :math:`z_y - \log\sum_{c \ne y} e^{z_c}`, which neither
    overflows nor cancels.

    Args:
        logits: z, (examples, classes); at least two classes.
        labels: y, class ids in [0, classes), (examples,).

    Returns:
        (examples,), float64.

    Raises:
        DataError: If shapes or labels do not fit, or the confidence is not finite.
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        raise DataError(
            f"Logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}, expected "
            "(examples, classes) with at least 2 classes, and (examples,)."
        )
    classes = torch.arange(logits.shape[1], device=labels.device)
    true = labels.unsqueeze(1) == classes  # (examples, classes)
    if alien := labels[~true.any(1)].tolist():
        raise DataError(
            f"{len(alien)} labels, such as {alien[0]}, are no class ids from 0 to "
            f"{len(classes) - 1}. Number the classes by the columns of the logits."
        )
    z = logits.double()
    return _finite(z[true] - z.masked_fill(true, -torch.inf).logsumexp(1), "confidences")


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Cross-entropy of each example, :math:`-\log p_y = \log(1 + e^{-\phi})`.

    Computed from :func:`confidence`, so that the losses of very confident examples do not round to
    ties at zero. Arguments, return and errors are the same.
    """
    phi = confidence(logits, labels)
    return torch.logaddexp(torch.zeros_like(phi), -phi)


def loss_attack(member_losses: Tensor, nonmember_losses: Tensor, *, seed: int = 0) -> Attack:
    r"""Take examples of low loss for members: the score is :math:`-\ell` (Yeom et al., 2018).

    Args:
        member_losses: Per-example losses of examples trained on, (members,).
        nonmember_losses: The same of examples not trained on, (nonmembers,).
        seed: Seed of the bootstrap.

    Raises:
        DataError: See :meth:`Attack.of`.
    """
    return Attack.of(-member_losses, -nonmember_losses, seed=seed)


def likelihood_ratio_attack(
    target_phi: Tensor, shadow_phi: Tensor, trained_on: Tensor, is_member: Tensor, *, seed: int = 0
) -> Attack:
    """Take examples for members that :func:`likelihood_ratios` scores high (LiRA).

    Args:
        target_phi: :func:`confidence` under the attacked model, (examples,).
        shadow_phi: The same under each shadow model, (shadows, examples); the attacked model must
            not be among them.
        trained_on: Which shadow was trained on which example, bool, (shadows, examples).
        is_member: Which examples the attacked model was trained on, bool, (examples,).
        seed: Seed of the bootstrap.

    Raises:
        DataError: If shapes or dtypes do not fit, a value is not finite, an example has fewer than
            2 shadows of either sort, or there are fewer than 2 members or non-members.
    """
    scores = likelihood_ratios(target_phi, shadow_phi, trained_on)
    _check_mask(is_member, scores.shape, "is_member")
    return Attack.of(scores[is_member], scores[~is_member], seed=seed)


def likelihood_ratios(target_phi: Tensor, shadow_phi: Tensor, trained_on: Tensor) -> Tensor:
    r"""Score each example i by how much likelier its :math:`\phi_i` is for a member.

    .. math:: \log\frac{\mathcal N(\phi_i \mid \mu_i^{in}, \sigma_{in}^2)}
                       {\mathcal N(\phi_i \mid \mu_i^{out}, \sigma_{out}^2)}

    "In" are the shadows that were trained on the example, "out" those that were not: the paper's
    online attack. The means are the example's own. The variances are pooled over examples, as the
    paper advises below 64 shadows: one for "in", one for "out", each the mean square about the
    examples' own means with :math:`\sum_i(n_i-1)` degrees of freedom.

    Arguments and errors are those of :func:`likelihood_ratio_attack`. Returns (examples,), float64.
    """
    target, phi = _finite(target_phi, "target's phi"), _finite(shadow_phi, "shadows' phi")
    if target.ndim != 1 or phi.ndim != 2 or not len(phi) or phi.shape[1:] != target.shape:
        raise DataError(
            f"The target's phi has shape {tuple(target.shape)}, the shadows' {tuple(phi.shape)}; "
            "expected (examples,) and (shadows, examples), with at least one shadow."
        )
    _check_mask(trained_on, phi.shape, "trained_on")
    # About the first shadow: where all shadows agree, means are exact and both terms cancel.
    target, phi = target - phi[0], phi - phi[0]
    z_out, spread_out = _standardise(target, phi, ~trained_on, "without")
    z_in, spread_in = _standardise(target, phi, trained_on, "with")
    return (z_out.square() - z_in.square()) / 2 + (spread_out / spread_in).log()


def _standardise(target: Tensor, phi: Tensor, chosen: Tensor, sort: str) -> tuple[Tensor, Tensor]:
    """The target's values in deviations from the chosen shadows' means; and that deviation."""
    counts = chosen.sum(0)
    if few := int((counts < FEWEST_SHADOWS).sum()):
        raise DataError(
            f"{few} of {len(counts)} examples have too few shadow models trained {sort} them: at "
            f"least {FEWEST_SHADOWS} each are needed, the fewest found is {int(counts.min())}. "
            "Let a random half of the shadows train on each example, four shadows at least."
        )
    means = (phi * chosen).sum(0) / counts
    squares = ((phi - means).square() * chosen).sum()
    spread = (squares / (counts - 1).sum()).sqrt().clamp_min(SMALLEST_SPREAD)
    return (target - means) / spread, spread


def _figures(
    members: NDArray[np.intp], nonmembers: NDArray[np.intp], one_in: list[int]
) -> list[float]:
    """AUC and the true-positive rates, from each example's level (0: the highest score)."""
    m, n = len(members), len(nonmembers)
    count = 1 + max(members.max(), nonmembers.max())
    hits = np.bincount(members, minlength=count)
    alarms = np.bincount(nonmembers, minlength=count)
    alarms_so_far = alarms.cumsum()
    won = hits @ (n - alarms_so_far) + hits @ alarms / 2
    hits_so_far = np.concatenate([[0], hits.cumsum()])
    within = alarms_so_far.searchsorted([n // k for k in one_in], side="right")
    return [float(won / (m * n)), *(hits_so_far[within] / m).tolist()]


def _finite(values: Tensor, what: str) -> Tensor:
    """The values in float64, detached, on their device; refuses any that is not finite."""
    values = values.detach().double()
    if faults := int((~values.isfinite()).sum()):
        raise DataError(
            f"{faults} of {values.numel()} {what} are not finite. Look for NaN or infinite logits."
        )
    return values


def _check_mask(mask: Tensor, shape: torch.Size, name: str) -> None:
    if mask.dtype is not torch.bool or mask.shape != shape:
        raise DataError(
            f"`{name}` must be bool of shape {tuple(shape)}, got {mask.dtype} of "
            f"{tuple(mask.shape)}."
        )
