"""What a client weighs by its counts: as many images as others usually have, and no lie more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import normal, random_mixture, random_sums

from fedcompo.composition.claims import capped
from fedcompo.composition.head import joint_head
from fedcompo.composition.settings import CompositionSettings
from fedcompo.composition.totals import exact_tensors
from fedcompo.config.choices import Coefficients, Statistics
from fedcompo.method.statistics import FeatureSums, off_grid, total_of, unpacked

CLASSES = ("cat", "dog", "owl")
COUNTS = (40, 6, 1)
LABELS = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
FEATURES = normal(len(LABELS), 5, seed=3, scale=2) + 4 * LABELS.unsqueeze(1)
STATED = FeatureSums.of(FEATURES, LABELS, CLASSES)


@pytest.mark.parametrize("most", [1, 3, 6, 39])
def test_a_cap_keeps_means_and_covariance_and_takes_weight(most):
    """The oracle goes by the images, in float64."""
    own = capped(STATED, most)
    x, labels = FEATURES.double().numpy(), LABELS.numpy()
    counts = np.minimum(COUNTS, most)
    assert own.counts.tolist() == counts.tolist()
    means = np.stack([x[labels == k].mean(0) for k in range(3)])
    np.testing.assert_allclose(off_grid(own.sums).numpy(), counts[:, None] * means, rtol=1e-6)
    apart = x - means[labels]
    covariance = apart.T @ apart / (len(x) - 3)
    expected = covariance * (counts.sum() - 3) + sum(
        n * np.outer(mean, mean) for n, mean in zip(counts, means, strict=True)
    )
    np.testing.assert_allclose(unpacked(off_grid(own.second)).numpy(), expected, rtol=1e-5)
    own.check_scatter("the client")


def test_within_the_cap_nothing_changes():
    assert capped(STATED, 40) is STATED
    twice = capped(capped(STATED, 3), 3)
    assert all(
        map(torch.equal, exact_tensors(twice).values(), exact_tensors(capped(STATED, 3)).values())
    )


def test_a_lie_of_any_size_weighs_as_the_cap_does():
    """Its images ten thousand times over: as the wire has them, in float32."""
    lie = FeatureSums.read(
        CLASSES,
        STATED.counts * 10_000,
        off_grid(STATED.sums) * 10_000,
        off_grid(STATED.second) * 10_000,
    )
    own = capped(lie, 40)
    assert own.counts.tolist() == [40, 40, 40]
    torch.testing.assert_close(
        off_grid(own.sums),
        off_grid(STATED.sums) * 40 / STATED.counts.unsqueeze(1),
        rtol=1e-6,
        atol=1e-6,
    )
    own.check_scatter("the liar")


def test_who_leaves_is_taken_out_as_it_came_in_whatever_the_order():
    members = [random_sums(CLASSES, 5, seed=seed, num_examples=9 + 40 * seed) for seed in range(4)]
    own = [capped(member, 8) for member in members]
    left = total_of([own[2], own[0], own[3], own[1]]) - own[3]
    expected = total_of([capped(member, 8) for member in members[:3]])
    assert all(map(torch.equal, exact_tensors(left).values(), exact_tensors(expected).values()))


def test_mixtures_are_drawn_from_by_capped_counts():
    mixtures = {"cat": random_mixture(5, seed=1, num_examples=10**9)}
    assert capped(mixtures, 30)["cat"].num_examples == 30
    two = {"ada": {"cat": random_mixture(5, seed=2), "dog": random_mixture(5, seed=3)}}
    settings = CompositionSettings(statistics=Statistics.MIXTURES, align_samples=8, class_cap=20)
    lie, truth = (
        joint_head({**two, "eve": {"cat": random_mixture(5, seed=1, num_examples=n)}}, settings)
        for n in (10**9, 20)
    )
    assert torch.equal(lie.weight, truth.weight)


@pytest.mark.parametrize(
    ("counts", "caps"),
    [
        ([{"cat": 10, "dog": 20}], (15, 45)),
        ([{"cat": 10}, {"cat": 10**9}], (15, 15)),  # of two, the larger may be the lie
        ([{"cat": 10}, {"dog": 12}, {str(k): 10**6 for k in range(1000)}], (18, 18)),
        ([{"cat": 11}, {"cat": 11, "dog": 11}, {"cat": 11}], (17, 17)),
    ],
)
def test_the_caps_are_multiples_of_the_median_and_every_client_has_one_say(counts, caps):
    chosen = CompositionSettings(max_count_ratio=1.5).with_caps(counts)
    assert chosen.caps == caps
    assert chosen.with_caps([{"cat": 10**9}]) == chosen  # once and for all
    assert CompositionSettings().with_caps(counts).caps is None


def test_a_client_counts_in_the_sum_as_often_as_the_cap_lets_it():
    by_examples = CompositionSettings(coefficients=Coefficients.EXAMPLES, client_cap=30)
    assert [by_examples.times(count) for count in (1, 30, 10**9)] == [1, 30, 30]
    assert CompositionSettings(coefficients=Coefficients.EXAMPLES).times(10**9) == 10**9
    assert CompositionSettings(client_cap=30).times(10**9) == 1


def test_settings_of_earlier_versions_have_no_caps_and_the_same_bits():
    older = {k: v for k, v in CompositionSettings().values.items() if "cap" not in k}
    assert older == CompositionSettings().values
    assert CompositionSettings.parse(older).caps is None
    chosen = CompositionSettings(max_count_ratio=1.5).with_caps([{"cat": 4}])
    assert CompositionSettings.parse(chosen.values) == chosen
