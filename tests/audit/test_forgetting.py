"""Linear probes and CKA, against slow oracles and planted answers."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from builders import normal
from torch import Tensor

from fedcompo.audit import estimates
from fedcompo.audit.forgetting import linear_cka, probe_accuracy, similarity


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(estimates, "RESAMPLES", 200)


def features(*, classes: int = 3, each: int = 8, apart: float, seed: int) -> tuple[Tensor, Tensor]:
    """Features (images, 20) and labels; class c has its mean ``apart`` along axis c."""
    labels = torch.arange(classes).repeat_interleave(each)
    noise = normal(classes * each, 20, seed=seed)
    return noise + apart * torch.eye(20)[labels], labels


# --- Probe ---


def test_a_class_that_stands_apart_is_learnt_from_one_image_and_noise_never():
    known = probe_accuracy(*(features(apart=20, seed=s) for s in (0, 1)), seed=0)
    unknown = probe_accuracy(*(features(apart=0, seed=s, each=40) for s in (0, 1)), seed=0)
    assert list(known) == ["1", "5", "all"]
    assert [(e.value, e.low, e.high) for e in known.values()] == [(1, 1, 1)] * 3
    assert all(0.2 < estimate.value < 0.47 for estimate in unknown.values())


def test_more_images_teach_more_and_features_that_know_more_need_fewer():
    weak, strong = (
        probe_accuracy(*(features(apart=a, seed=s, each=30) for s in (2, 3)), seed=0)
        for a in (2.5, 5)
    )
    assert weak["1"].value < weak["5"].value < weak["all"].value
    assert (strong["1"] - weak["1"]).low > 0


def test_as_many_images_as_a_class_has_are_all():
    data = features(apart=3, seed=0, each=5), features(apart=3, seed=1)
    assert list(probe_accuracy(*data, seed=0)) == ["1", "all"]


def test_equal_seeds_draw_the_same_images():
    data = features(apart=2, seed=0), features(apart=2, seed=1, each=30)
    first, again, other = (probe_accuracy(*data, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first["1"].value != other["1"].value
    assert first["all"].value == other["all"].value


# --- CKA ---


def written_dependence(k: np.ndarray, h: np.ndarray) -> float:
    """Oracle: HSIC as the mean over pairs, triples and quadruples of different images."""
    images = range(len(k))

    def mean(of, size: int) -> float:
        return float(np.mean([of(*chosen) for chosen in permutations(images, size)]))

    return (
        mean(lambda i, j: k[i, j] * h[i, j], 2)
        + mean(lambda i, j, q, r: k[i, j] * h[q, r], 4)
        - 2 * mean(lambda i, j, q: k[i, j] * h[i, q], 3)
    )


def test_cka_is_the_unbiased_dependence_in_units_of_the_models_own():
    x, y = normal(7, 5, seed=0).double(), normal(7, 3, seed=1).double() + 4
    y[:, 0] += 2 * x[:, 0]
    k, h = (x @ x.T).numpy(), (y @ y.T).numpy()
    own = written_dependence(k, k) * written_dependence(h, h)
    expected = written_dependence(k, h) / own**0.5
    assert linear_cka(x, y, seed=0).value == pytest.approx(expected, rel=1e-9)


def test_with_many_images_it_is_that_of_kornblith():
    x = normal(900, 6, seed=0).double() * torch.tensor([5, 3, 1, 1, 1, 1])
    y = normal(900, 4, seed=1).double() + x[:, :4]
    x0, y0 = x - x.mean(0), y - y.mean(0)
    plain = (y0.T @ x0).norm() ** 2 / ((x0.T @ x0).norm() * (y0.T @ y0).norm())
    estimate = linear_cka(x, y, seed=0)
    assert estimate.value == pytest.approx(float(plain), abs=0.01)
    assert estimate.covers(float(plain))


def test_a_rotation_and_a_scale_are_no_difference_and_unrelated_features_share_nothing():
    x, unrelated = normal(40, 30, seed=0).double(), normal(40, 30, seed=1).double()
    rotation = torch.linalg.qr(normal(30, 30, seed=2).double())[0]
    assert linear_cka(x, 3 * x @ rotation + 1, seed=0).low == pytest.approx(1)
    assert abs(linear_cka(x, unrelated, seed=0).value) < 0.1  # the plain estimate: 0.43


def test_the_interval_covers_what_many_images_say_about_as_often_as_it_says():
    x = normal(3000, 60, seed=0).double()
    y = normal(3000, 60, seed=1).double() + x
    truth, covered, ours = linear_cka(x[:1500], y[:1500], seed=0).value, 0, []
    for part in range(40):
        rows = slice(1500 + 30 * part, 1530 + 30 * part)
        ours.append(linear_cka(x[rows], y[rows], seed=part))
        covered += ours[-1].covers(truth)
    assert covered >= 34  # 38 expected, three standard errors are 4.1
    assert np.mean([e.draws.mean() - e.value for e in ours]) == pytest.approx(0, abs=0.03)


def test_pairs_are_compared_where_both_are_there_and_three_images_are_too_few():
    seen = {name: normal(30, 4, seed=0) for name in ("before", "after", "frozen")}
    assert list(similarity(seen, seed=0)) == ["before~after", "frozen~after"]
    assert similarity({name: f[:3] for name, f in seen.items()}, seed=0) == {}
    assert similarity({}, seed=0) == {}


def test_features_that_never_vary_are_like_no_other():
    estimate = linear_cka(torch.ones(5, 3), normal(5, 3, seed=0), seed=0)
    assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)
