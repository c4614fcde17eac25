"""Heads: the closed form, the convex fit, the joint head, and heads side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from builders import normal, random_head, random_mixture
from torch import Tensor

from fedcompo.errors import ContributionError
from fedcompo.method.heads import Head, align, discriminant, fit_head, zero_head
from fedcompo.method.statistics import (
    FeatureSums,
    off_grid,
    packed,
    to_grid,
    total_of,
    unpacked,
)

CLASSES = ("cat", "dog", "owl")
FEATURES = 3.0 * normal(30, 4, seed=1)
LABELS = torch.arange(30) % 3
RIDGE = 0.01


def objective(weight: Tensor, bias: Tensor, start: Head, scale: Tensor) -> Tensor:
    """What a fit minimises, as written: cross-entropy and the pull to the start, scaled."""
    loss = F.cross_entropy(FEATURES @ weight.T + bias, LABELS)
    pull = (scale * (weight - start.weight)).square().sum() + (bias - start.bias).square().sum()
    return loss + RIDGE * pull


def by_plain_descent(start: Head, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Oracle: a long gradient descent in float64, on scaled features."""
    w = (start.weight.double() * scale).requires_grad_()
    b = start.bias.double().requires_grad_()
    for _ in range(800):
        value = objective(w / scale, b, start, scale)
        gradients = torch.autograd.grad(value, [w, b])
        with torch.no_grad():
            w -= gradients[0]
            b -= gradients[1]
    return (w / scale).detach(), b.detach()


@pytest.mark.parametrize("start", [zero_head(CLASSES, 4), random_head(CLASSES, 4, seed=3)])
def test_a_fit_reaches_the_optimum_that_plain_gradient_descent_reaches(start):
    scale = FEATURES.square().mean().sqrt()
    fitted = fit_head(FEATURES, LABELS, start, ridge=RIDGE)
    weight, bias = by_plain_descent(start, scale)
    torch.testing.assert_close(fitted.weight.double(), weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fitted.bias.double(), bias, rtol=1e-3, atol=1e-4)
    w, b = (t.double().requires_grad_() for t in (fitted.weight, fitted.bias))
    gradients = torch.autograd.grad(objective(w, b, start, scale), [w, b])
    assert max(float((gradients[0] / scale).norm()), float(gradients[1].norm())) < 1e-4


def test_a_strong_ridge_leaves_the_head_where_it_started():
    start = random_head(CLASSES, 4, seed=3)
    fitted = fit_head(FEATURES, LABELS, start, ridge=1e8)
    torch.testing.assert_close(fitted.weight, start.weight, rtol=1e-4, atol=1e-5)


def test_a_fit_separates_what_can_be_separated():
    features = F.one_hot(LABELS, 3).double() + 0.01 * normal(30, 3, seed=2)
    fitted = fit_head(features, LABELS, zero_head(CLASSES, 3), ridge=1e-3)
    assert (fitted(features).argmax(1) == LABELS).all()
    assert fitted.classes == CLASSES
    assert fitted.weight.dtype == torch.float32


def test_the_scale_of_features_does_not_change_what_is_predicted():
    fitted = fit_head(FEATURES, LABELS, zero_head(CLASSES, 4), ridge=RIDGE)
    larger = fit_head(1000 * FEATURES, LABELS, zero_head(CLASSES, 4), ridge=RIDGE)
    torch.testing.assert_close(larger(1000 * FEATURES), fitted(FEATURES), rtol=1e-4, atol=1e-5)


def test_a_fit_leaves_the_head_it_starts_from_alone():
    start = random_head(CLASSES, 4, seed=3)
    before = start.weight.clone(), start.bias.clone()
    fit_head(FEATURES, LABELS, start, ridge=RIDGE)
    assert torch.equal(start.weight, before[0])
    assert torch.equal(start.bias, before[1])


def test_logits_are_products_with_rows_plus_biases():
    head = random_head(CLASSES, 4, seed=3)
    logits = head(FEATURES)
    expected = [
        [float(head.weight[c].double() @ x) + float(head.bias[c]) for c in range(3)]
        for x in FEATURES
    ]
    torch.testing.assert_close(logits, torch.tensor(expected, dtype=torch.float64))


MIXTURES = {
    name: [random_mixture(4, seed=10 * i), random_mixture(4, seed=10 * i + 5)]
    for i, name in enumerate(CLASSES)
}


def aligned(*, seed: int = 0, classes: tuple[str, ...] = CLASSES) -> Head:
    return align(MIXTURES, classes, samples=40, ridge=RIDGE, seed=seed)


def test_the_same_seed_aligns_to_the_same_head_and_another_to_a_similar_one():
    first, same, other = aligned(), aligned(), aligned(seed=1)
    assert torch.equal(first.weight, same.weight)
    assert torch.equal(first.bias, same.bias)
    assert not torch.equal(first.weight, other.weight)
    assert F.cosine_similarity(first.weight.flatten(), other.weight.flatten(), dim=0) > 0.8


def test_alignment_does_not_touch_the_global_random_numbers():
    before = torch.get_rng_state()
    aligned()
    assert torch.equal(torch.get_rng_state(), before)


def test_an_aligned_head_tells_the_classes_of_the_mixtures_apart():
    head = aligned()
    assert head.classes == CLASSES
    hits = [
        float(
            (head(m.sample(200, torch.Generator().manual_seed(9))).argmax(1) == i).double().mean()
        )
        for i, name in enumerate(CLASSES)
        for m in MIXTURES[name]
    ]
    assert sum(hits) / len(hits) > 0.6


def test_rows_are_taken_by_name_in_the_order_given():
    head = random_head(CLASSES, 4, seed=1)
    part = head.rows(["owl", "cat"])
    assert part.classes == ("owl", "cat")
    assert torch.equal(part.weight, head.weight[[2, 0]])
    assert torch.equal(part.bias, head.bias[[2, 0]])
    assert head.indices(["owl", "cat"]).tolist() == [2, 0]


def test_a_zero_head_prefers_no_class():
    head = zero_head(CLASSES, 4)
    assert (head(FEATURES) == 0).all()
    assert head.classes == CLASSES


GOOD = random_head(CLASSES, 4, seed=1)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (Head(("cat", "owl", "dog"), GOOD.weight, GOOD.bias), "expected"),
        (Head(CLASSES, GOOD.weight[:2], GOOD.bias), "expected"),
        (Head(CLASSES, GOOD.weight[:, :3], GOOD.bias), "expected"),
        (Head(CLASSES, GOOD.weight, GOOD.bias[:2]), "expected"),
        (Head(CLASSES, GOOD.weight / 0, GOOD.bias), "not finite"),
        (Head(CLASSES, GOOD.weight, GOOD.bias * float("nan")), "not finite"),
    ],
)
def test_a_head_of_other_classes_or_shapes_or_not_finite_is_refused(head, message):
    GOOD.check(CLASSES, 4, "client 'a'")
    with pytest.raises(ContributionError, match=f"client 'a' has .*{message}"):
        head.check(CLASSES, 4, "client 'a'")


# -- the closed form ----------------------------------------------------------------------------


def sums(features: Tensor = FEATURES, labels: Tensor = LABELS) -> FeatureSums:
    return FeatureSums.of(features, labels, CLASSES)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.5, 1.0])
def test_it_tells_classes_apart_as_gaussians_of_one_covariance_do(shrinkage):
    """Oracle: log-densities of the classes, whose differences are those of the logits."""
    means = torch.stack([FEATURES[k == LABELS].mean(0) for k in range(3)])
    centred = FEATURES - means[LABELS]
    covariance = sum(torch.outer(row, row) for row in centred) / (30 - 3)
    level = covariance.trace() / 4
    covariance = (1 - shrinkage) * covariance + shrinkage * level * torch.eye(4)
    x = 3 * normal(11, 4, seed=5)
    densities = torch.stack(
        [torch.distributions.MultivariateNormal(m, covariance).log_prob(x) for m in means], 1
    )
    logits = discriminant(sums(), shrinkage=shrinkage)(x)
    torch.testing.assert_close(
        logits - logits[:, :1], densities - densities[:, :1], rtol=1e-3, atol=1e-3
    )


def test_it_is_made_of_the_sum_alone_whoever_has_the_classes():
    parts = [torch.arange(30) < 12, torch.arange(30) >= 12]
    total = total_of(sums(FEATURES[part], LABELS[part]) for part in parts)
    one, both = (discriminant(t, shrinkage=0.1) for t in (sums(), total))
    torch.testing.assert_close(both.weight, one.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(both.bias, one.bias, rtol=1e-4, atol=1e-6)


def test_the_number_of_images_of_a_class_does_not_favour_it():
    twice = torch.cat([torch.arange(30), torch.arange(30)[LABELS == 0]])
    mean = FEATURES[LABELS == 0].mean(0)
    middle = (mean + FEATURES[LABELS == 1].mean(0)) / 2
    logits = discriminant(sums(FEATURES[twice], LABELS[twice]), shrinkage=0.5)(middle)
    assert float(logits[0] - logits[1]) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
def test_one_image_a_class_or_fewer_images_than_features_still_give_a_head(shrinkage):
    few = normal(3, 16, seed=3)
    for chosen in ([0, 1, 2], [0, 1, 2, 2]):
        features, labels = few[chosen], torch.tensor(chosen)
        head = discriminant(sums(features, labels), shrinkage=shrinkage)
        head.check(CLASSES, 16, "the joint head")
        assert head(features).argmax(1).tolist() == labels.tolist()


def test_a_single_class_has_a_head_of_one_row():
    alone = FeatureSums.of(FEATURES, torch.zeros(30, dtype=torch.int64), ("cat",))
    discriminant(alone, shrinkage=0.1).check(("cat",), 4, "the joint head")


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("off", [0.02, 1.0, 30.0])
def test_a_covariance_with_negative_eigenvalues_is_raised_to_one_without(shrinkage, off):
    """Oracle: the nearest matrix without negative eigenvalues, by its eigenvectors, in float64."""
    axis = torch.linalg.eigh(sums().scatter).eigenvectors[:, 0]
    lost = (1 + off) * sums().scatter.diagonal().sum() * torch.outer(axis, axis) / 4
    false = replace(sums(), second=to_grid(packed(unpacked(off_grid(sums().second)) - lost)))
    values, vectors = torch.linalg.eigh(false.scatter / (30 - 3))
    assert float(values[0]) < 0
    raised = vectors @ torch.diag(values.clamp(min=0)) @ vectors.T
    if float(values.sum()) <= 0:  # nothing to go by: every direction alike
        raised = torch.eye(4, dtype=torch.float64)
    level = raised.trace() / 4
    shared = (1 - shrinkage) * raised + max(shrinkage, 1e-6) * level * torch.eye(4)
    means = off_grid(false.sums) / false.counts.unsqueeze(1)
    weight = (torch.linalg.inv(shared) @ means.T).T
    found = discriminant(false, shrinkage=shrinkage)
    torch.testing.assert_close(found.weight.double(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found.bias.double(), -0.5 * (weight * means).sum(1), rtol=1e-4, atol=1e-5
    )
