"""Statistics made of a classifier's rows decide as the classifier does, and disturb nobody."""

from __future__ import annotations

import pytest
import torch
from builders import normal
from torch import Tensor, nn

from fedcompo.errors import ContributionError
from fedcompo.method.heads import Head, discriminant
from fedcompo.method.stand_in import Assumed, stand_in
from fedcompo.method.statistics import FeatureSums

WIDTH, GAMMA = 16, 0.3


def classifier(count: int, assumed: Assumed, *, away: float = 0.1) -> Head:
    """Random rows, and biases by which the classes' means lie so far from the mean of all."""
    rows = normal(count, WIDTH, seed=0)
    means = assumed.mean + (rows - rows.mean(0) + away * normal(WIDTH, seed=1)) @ covered(assumed)
    bias = -0.5 * (means @ torch.linalg.solve(covered(assumed), means.T)).diagonal()
    names = tuple(f"k{row:02}" for row in range(count))
    return Head(names, torch.linalg.solve(covered(assumed), means.T).T, bias)


def covered(assumed: Assumed) -> Tensor:
    """The joint head's covariance: the assumed one, shrunk."""
    level = assumed.within.trace() / WIDTH
    return (1 - GAMMA) * assumed.within + GAMMA * level * torch.eye(WIDTH)


def real() -> FeatureSums:
    """Features of four classes, of unequal variances, far from zero."""
    labels = torch.arange(200) % 4
    features = 3 + normal(200, WIDTH, seed=5) * torch.linspace(0.5, 2, WIDTH)
    return FeatureSums.of(features + normal(4, WIDTH, seed=6)[labels], labels, "abcd")


def of_norm() -> Assumed:
    norm = nn.LayerNorm(WIDTH)
    with torch.no_grad():
        norm.weight += normal(WIDTH, seed=7, scale=0.3, dtype=torch.float32)
        norm.bias += normal(WIDTH, seed=8, dtype=torch.float32)
    return Assumed.of_norm(nn.ModuleDict({"norm": norm}), WIDTH)


def log_odds(logits: Tensor) -> Tensor:
    """Logits beside those of the first class, (images, classes - 1)."""
    return (logits - logits[:, :1])[:, 1:].double()


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("alone", [True, False])
def test_the_discriminant_has_the_classifiers_own_logits(count: int, alone: bool) -> None:
    """Up to one factor; the discriminant is the oracle, by its own covariance."""
    assumed = of_norm() if alone else Assumed.of(real(), shrinkage=GAMMA)
    head = classifier(count, assumed)
    sums = stand_in(head, assumed, shrinkage=GAMMA, images=30)
    sums.check(head.classes, WIDTH, "ada")
    assert sums.counts.tolist() == [30] * count
    features = 3 + 2 * normal(500, WIDTH, seed=9)
    expected, actual = (log_odds(h(features)) for h in (head, discriminant(sums, shrinkage=GAMMA)))
    factor = float((expected * actual).sum() / expected.square().sum())
    assert factor == pytest.approx(1.0, abs=1e-4) if alone else factor > 0
    torch.testing.assert_close(actual, factor * expected, rtol=0, atol=2e-3 * float(actual.std()))


def test_the_others_rows_stay_and_the_classes_are_as_far_apart() -> None:
    total = real()
    assumed = Assumed.of(total, shrinkage=GAMMA)
    head = classifier(3, assumed)
    sums = stand_in(head, assumed, shrinkage=GAMMA, images=50)
    joint = discriminant(total + sums, shrinkage=GAMMA).rows(total.classes)
    own = discriminant(total, shrinkage=GAMMA)
    torch.testing.assert_close(
        joint.weight, own.weight, rtol=0, atol=1e-4 * float(own.weight.std())
    )
    rows = discriminant(sums, shrinkage=GAMMA).weight.double()
    shared = covered(assumed)
    around = rows - rows.mean(0)
    apart = torch.stack([row @ shared @ row for row in around]).mean()
    assert float(apart) == pytest.approx(assumed.apart, rel=1e-3)


def test_of_all_solutions_the_means_are_nearest_to_the_mean_of_all_features() -> None:
    """The oracle solves the conditions of the constrained minimum as one linear system; a is 1."""
    assumed = of_norm()
    head, s = classifier(3, assumed), covered(assumed)
    w, b, one = head.weight, head.bias, torch.ones(3, 1).double()
    left = torch.cat(
        [
            torch.cat([s, torch.zeros(WIDTH, 1), s @ w.T], 1),
            torch.cat([torch.zeros(1, WIDTH + 1), one.T], 1),
            torch.cat([w @ s, one, torch.zeros(3, 3)], 1),
        ]
    )
    mean = assumed.mean - s @ w.mean(0)
    right = torch.cat([mean, torch.zeros(1), -b - 0.5 * ((w @ s) * w).sum(1)])
    v = torch.linalg.solve(left, right)[:WIDTH]
    sums = stand_in(head, assumed, shrinkage=GAMMA, images=100)
    actual = sums.sums.double() / 2**24 / 100
    torch.testing.assert_close(actual, (w + v) @ s, rtol=0, atol=1e-5)


def test_means_do_not_lie_farther_off_than_the_classes_lie_apart() -> None:
    assumed = of_norm()
    head = classifier(3, assumed, away=9.0)
    sums = stand_in(head, assumed, shrinkage=GAMMA, images=100)
    means = sums.sums.double() / 2**24 / 100
    around, s = means - means.mean(0), covered(assumed)
    apart = float((around @ torch.linalg.solve(s, around.T)).diagonal().mean())
    off = means.mean(0) - assumed.mean
    assert float(off @ torch.linalg.solve(s, off)) == pytest.approx(apart, rel=1e-3)


def test_more_classes_than_the_features_can_tell_are_refused() -> None:
    with pytest.raises(ContributionError, match="at most 8 can be made"):
        stand_in(classifier(9, of_norm()), of_norm(), shrinkage=GAMMA, images=30)
