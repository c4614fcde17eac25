"""Our likelihood-ratio attack beside that of an independent library, sacroml (extra `attacks`)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import normal
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor

from fedcompo.audit.membership import likelihood_ratios

lira = pytest.importorskip("sacroml.attacks.likelihood_attack")


def theirs(target: Tensor, phi: Tensor, trained_on: Tensor, **settings: object) -> np.ndarray:
    """Scores by sacroml's online attack, of the probabilities whose log-odds are phi."""
    attack = lira.LIRAAttack(write_report=False, mode="online-carlini", **settings)
    sides = [
        {i: phi[side[:, i], i].tolist() for i in range(len(target))}
        for side in (~trained_on, trained_on)
    ]
    if settings.get("fix_variance"):
        attack._get_global_std = spread_about_own_means
    p = target.sigmoid().unsqueeze(1).numpy()
    scores, _ = attack._compute_scores(np.zeros(len(target), int), p, *sides)
    return np.array(scores)[:, 1]  # what they judge by: in the sense "member"


def spread_about_own_means(confidences: dict[int, list[float]]) -> float:
    squares = sum(((np.array(own) - np.mean(own)) ** 2).sum() for own in confidences.values())
    return float(np.sqrt(squares / sum(len(own) - 1 for own in confidences.values())))


def shadows(*, examples: int = 120, count: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Confidences with an ease of each example's own, higher by 1 where it was trained on."""
    ease = normal(examples, seed=0, scale=2).double()
    is_member = torch.arange(examples) % 2 == 0
    first = torch.rand(count // 2, examples, generator=torch.Generator().manual_seed(1)) < 0.5
    trained_on = torch.cat([first, ~first])
    target = ease + is_member + 0.7 * normal(examples, seed=2).double()
    phi = ease + trained_on + 0.7 * normal(count, examples, seed=3).double()
    return target, phi, trained_on, is_member


def test_with_the_same_variances_both_give_the_same_scores():
    target, phi, trained_on, is_member = shadows()
    ours = likelihood_ratios(target, phi, trained_on).numpy()
    expected = theirs(target, phi, trained_on, fix_variance=True)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)
    assert roc_auc_score(is_member, ours) == roc_auc_score(is_member, expected)


def test_variances_of_each_example_of_few_shadows_rank_alike_and_find_fewer():
    """Theirs by default: a variance of each example's own, here of four values."""
    target, phi, trained_on, is_member = shadows()
    ours = likelihood_ratios(target, phi, trained_on).numpy()
    own_variances = theirs(target, phi, trained_on)
    assert spearmanr(ours, own_variances).statistic > 0.8
    assert roc_auc_score(is_member, own_variances) > 0.6
    assert roc_auc_score(is_member, ours) > roc_auc_score(is_member, own_variances)
