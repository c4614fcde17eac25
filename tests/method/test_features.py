"""Mixtures of Gaussians over features: the fit, the draws, the checks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import normal, random_mixture, rng

from fedcompo.errors import ContributionError, DataError
from fedcompo.method.features import (
    EXAMPLES_PER_COMPONENT,
    VARIANCE_FLOOR,
    FeatureMixture,
    draw,
    extract_features,
    fit_mixtures,
)


def fit(*classes: torch.Tensor, components: int = 5, seed: int = 0) -> list[FeatureMixture]:
    """Fit one mixture to each tensor of features."""
    labels = torch.cat([torch.full((len(values),), i) for i, values in enumerate(classes)])
    names = [str(i) for i in range(len(classes))]
    found = fit_mixtures(torch.cat(classes), labels, names, components=components, seed=seed)
    assert list(found) == names
    return list(found.values())


@pytest.mark.parametrize(("count", "components"), [(1, 1), (7, 1), (16, 2), (39, 4), (200, 5)])
def test_a_class_of_few_images_gets_few_components(count, components):
    mixture, _ = fit(normal(count, 3, seed=1), normal(20, 3, seed=2))
    assert len(mixture.weights) == components
    assert mixture.num_examples == count
    assert count < EXAMPLES_PER_COMPONENT * (components + 1) or components == 5
    mixture.check(3, "client 'a'")


def test_one_component_has_the_mean_and_variance_of_the_features():
    values = normal(40, 3, seed=1) * torch.tensor([1.0, 2.0, 3.0]) + 5
    (mixture,) = fit(values, components=1)
    torch.testing.assert_close(mixture.means[0].double(), values.mean(0), rtol=1e-5, atol=0)
    expected = values.var(0, correction=0)
    floor = VARIANCE_FLOOR * expected.mean()
    torch.testing.assert_close(mixture.variances[0].double(), expected + floor, rtol=1e-4, atol=0)


def test_far_apart_clusters_are_found():
    centres = torch.tensor([[-20.0, 0.0], [20.0, 5.0]], dtype=torch.float64)
    values = torch.cat([centres[0] + normal(10, 2, seed=1), centres[1] + normal(30, 2, seed=2)])
    (mixture,) = fit(values, components=2)
    order = mixture.means[:, 0].argsort()
    torch.testing.assert_close(mixture.weights[order], torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(mixture.means[order].double(), centres, rtol=0, atol=1.0)


def test_a_class_of_one_image_takes_the_clients_variance():
    single, plenty = normal(1, 3, seed=1), normal(50, 3, seed=2)
    mixture, _ = fit(single, plenty)
    torch.testing.assert_close(mixture.means.double(), single, rtol=1e-6, atol=0)
    pooled = torch.stack([torch.zeros(3), plenty.var(0, correction=0)]).mean(0)
    torch.testing.assert_close(mixture.variances[0].double(), pooled, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_features_that_never_vary_give_a_mixture_that_can_be_drawn_from():
    constant = torch.full((40, 3), 2.5)
    for mixture in fit(constant, constant[:1] + 1):
        mixture.check(3, "client 'a'")
        drawn = mixture.sample(100, rng(0))
        assert torch.isfinite(drawn).all()
        assert (drawn - mixture.means[0]).abs().max() < 1e-2


def test_no_variance_falls_below_a_share_of_the_clients_mean_variance():
    values = normal(60, 3, seed=1) * torch.tensor([3.0, 1.0, 0.0])
    mixtures = fit(values, values[:3] + 1)
    pooled = torch.stack([v.var(0, correction=0) for v in (values, values[:3])]).mean(0)
    floor = float(VARIANCE_FLOOR * pooled.mean())
    for mixture in mixtures:
        assert mixture.variances.min() >= floor * (1 - 1e-5)


def test_the_same_seed_gives_the_same_mixture():
    values = normal(60, 3, seed=1)
    (first,), (second,) = fit(values, seed=4), fit(values, seed=4)
    assert torch.equal(first.means, second.means)
    assert torch.equal(first.variances, second.variances)


def test_a_class_without_image_is_refused_by_name():
    with pytest.raises(DataError, match="Class 'dog' has no training image"):
        fit_mixtures(
            normal(3, 2, seed=1), torch.zeros(3).long(), ["cat", "dog"], components=1, seed=0
        )


def test_samples_have_the_mean_and_variance_of_the_mixture():
    mixture = random_mixture(3, seed=1, components=3)
    count = 40_000
    drawn = mixture.sample(count, rng(0)).double()
    w, means = mixture.weights.double().unsqueeze(1), mixture.means.double()
    mean = (w * means).sum(0)
    variance = (w * (mixture.variances.double() + means.square())).sum(0) - mean.square()
    assert drawn.shape == (count, 3)
    error = (drawn.mean(0) - mean).abs() / (variance / count).sqrt()
    assert error.max() < 4  # standard errors
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.05, atol=0)


def test_samples_depend_on_the_generator_alone():
    mixture = random_mixture(3, seed=1)
    assert torch.equal(mixture.sample(9, rng(5)), mixture.sample(9, rng(5)))
    assert not torch.equal(mixture.sample(9, rng(5)), mixture.sample(9, rng(6)))


def point(value: float, num_examples: int) -> FeatureMixture:
    """A mixture that practically always yields the same number."""
    return FeatureMixture(
        torch.ones(1), torch.full((1, 1), value), torch.full((1, 1), 1e-12), num_examples
    )


def test_clients_that_share_a_class_share_its_samples_by_their_examples():
    mixtures = {"cat": [point(1.0, 30), point(2.0, 10)], "dog": [point(3.0, 5)]}
    features, labels = draw(mixtures, ["dog", "cat"], samples=100, generator=rng(0))
    counts = {value: int((features.round() == value).sum()) for value in (1, 2, 3)}
    assert counts == {1: 75, 2: 25, 3: 100}
    assert torch.equal(labels, torch.tensor([0] * 100 + [1] * 100))
    assert (features[labels == 0].round() == 3).all()


def test_a_client_with_few_examples_of_a_shared_class_has_at_least_one_sample():
    mixtures = {"cat": [point(1.0, 100_000), point(2.0, 1)]}
    features, _ = draw(mixtures, ["cat"], samples=10, generator=rng(0))
    assert (features.round() == 2).sum() == 1


def test_features_are_extracted_batch_by_batch_in_single_precision_on_the_cpu(monkeypatch):
    sizes = []

    def forward(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return images.double().flatten(1)

    monkeypatch.setattr("fedcompo.method.features.BATCH", 3)
    images = torch.arange(28).view(7, 1, 2, 2).to(torch.uint8)
    features = extract_features(forward, images)
    assert sizes == [3, 3, 1]
    assert torch.equal(features, images.flatten(1).float())


GOOD = random_mixture(3, seed=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"means": torch.zeros(2, 4)}, "shapes"),
        ({"variances": torch.ones(1, 3)}, "shapes"),
        ({"weights": torch.ones(2, 1)}, "shapes"),
        ({"weights": torch.ones(3) / 3}, "shapes"),
        (
            {
                "weights": torch.zeros(0),
                "means": torch.zeros(0, 3),
                "variances": torch.zeros(0, 3),
            },
            "shapes",
        ),
        ({"means": torch.full((2, 3), float("nan"))}, "not finite"),
        ({"variances": torch.full((2, 3), float("inf"))}, "not finite"),
        ({"variances": torch.tensor([[1.0, 1, 1], [1, 0, 1]])}, "out of range"),
        ({"weights": torch.tensor([1.5, -0.5])}, "out of range"),
        ({"weights": torch.tensor([0.5, 0.6])}, "summing to 1.1"),
        ({"num_examples": 0}, "0 examples"),
    ],
)
def test_a_mixture_that_cannot_be_drawn_from_is_refused(changes, message):
    GOOD.check(3, "client 'a'")
    with pytest.raises(ContributionError, match=f"client 'a' has .*{message}"):
        replace(GOOD, **changes).check(3, "client 'a'")
