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
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcompo.audit.estimates import Estimate, Numbers, estimated
from fedcompo.errors import DataError

ONE_IN = (20, 100, 1000)
"""False-positive rates at which true positives are counted: one in so many non-members."""
FEWEST_FALSE_POSITIVES = 5
"""A rate is reported only if it allows so many; below, its interval says little."""
FEWEST_SHADOWS = 2
SMALLEST_SPREAD = 1e-4
"""Least standard deviation of phi: about what the rounding of float32 logits leaves of it."""


@dataclass(frozen=True)
class Attack:
    """Success of an attack at telling members from non-members.

    For the intervals, members and non-members are resampled apart.
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
        parts = scores[:m], scores[m:]
        tpr = {
            1 / k: estimated(partial(_true_positives, one_in=k), *parts, seed=seed)
            for k in ONE_IN
            if n // k >= FEWEST_FALSE_POSITIVES
        }
        return cls(estimated(_auc, *parts, seed=seed), tpr)

    def is_chance(self) -> bool:
        """Whether the AUC's interval covers 0.5: the attack may be no better than guessing."""
        return self.auc.covers(0.5)

    def json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        tpr = {f"{rate:g}": estimate.json() for rate, estimate in self.tpr.items()}
        return {"auc": self.auc.json(), "tpr": tpr, "is_chance": self.is_chance()}


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


def _auc(members: Numbers, nonmembers: Numbers, axis: int) -> Numbers:
    """AUC as the share of pairs won: Mann and Whitney's U over their number, many at once."""
    from scipy.stats import mannwhitneyu

    won = mannwhitneyu(members, nonmembers, axis=axis, method="asymptotic").statistic
    return np.asarray(won / (members.shape[axis] * nonmembers.shape[axis]))


def _true_positives(members: Numbers, nonmembers: Numbers, axis: int, *, one_in: int) -> Numbers:
    """Share of members above all non-members but one in so many."""
    place = nonmembers.shape[-1] - 1 - nonmembers.shape[-1] // one_in
    bar = np.partition(nonmembers, place)[..., place, None]
    return np.asarray((members > bar).mean(axis))


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
