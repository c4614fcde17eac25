"""Noise for privacy: how far one image can move what leaves, and what the noise is made of."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from builders import normal, pico_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import fftconvolve
from torch import Tensor

from fedcompo.config.caps import CapsConfig
from fedcompo.config.choices import Curvature, HeadStart, Statistics
from fedcompo.errors import ConfigError
from fedcompo.method.deltas import Weights
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.method.heads import Head, discriminant
from fedcompo.method.statistics import FeatureSums, off_grid, packed, unpacked
from fedcompo.privacy import fisher as private_fisher
from fedcompo.privacy import noise as privacy
from fedcompo.privacy import statistics as private_statistics
from fedcompo.privacy.fisher import (
    clipped_sum,
    images_at_a_time,
    per_example_fishers,
)
from fedcompo.privacy.noise import clip_factors, composed_epsilon, noised
from fedcompo.privacy.noise import normal as drawn
from fedcompo.privacy.statistics import clipped_sums, private_sums
from fedcompo.training.fisher_estimate import estimate_fisher
from server import accounting

CLASSES = tuple(f"class-{index}" for index in range(4))
HEAD = Head(CLASSES, normal(4, 8, seed=2, scale=0.7), normal(4, seed=3))
IMAGES = normal(7, 1, 8, 8, seed=1)
NAMES = ("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight")
PICO = {name: p.detach() for name, p in pico_model().named_parameters() if name in NAMES}
examples = st.integers(1, 12)
clips = st.floats(0.01, 30.0)


def entropy(seed: int) -> Callable[[int], bytes]:
    """Bytes that can be had again; for tests alone."""
    return random.Random(seed).randbytes


def silence(count: int) -> bytes:
    """Bytes whose quantile is zero, but for 1e-16: no noise."""
    return (1 << 63).to_bytes(8, "little") * (count // 8)


def moved(one: Weights, other: Weights, limits: dict[str, float]) -> float:
    """How far two neighbouring sums are apart, each part in its own limit."""
    return math.sqrt(sum(float(((one[n] - other[n]) / limits[n]).square().sum()) for n in one))


def described(seed: int, count: int = 60, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features of four classes of unequal means, and labels."""
    labels = torch.arange(count) % 4
    return normal(4, 16, seed=7)[labels] + spread * normal(count, 16, seed=seed), labels


# -- the mechanism ------------------------------------------------------------------------------


def test_noise_is_standard_normal():
    found = drawn((200_000,), entropy(1))
    assert abs(float(found.mean())) < 5 / math.sqrt(200_000)
    assert float(found.std()) == pytest.approx(1, abs=0.01)
    for quantile in (0.01, 0.1, 0.5, 0.9, 0.99):
        expected = float(torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64)))
        assert float(found.quantile(quantile)) == pytest.approx(expected, abs=0.03)
    assert abs(float((found[:-1] * found[1:]).mean())) < 0.02


def test_noise_is_finite_whatever_the_bytes():
    for byte in (b"\x00", b"\xff"):
        found = drawn((3,), lambda count, byte=byte: byte * count)
        assert torch.isfinite(found).all()
        assert found.abs().min() > 8


def test_noise_is_drawn_for_every_number_and_every_time_anew():
    sums = {"a": torch.zeros(30, 30), "b": torch.zeros(30, 30)}
    first, again = (noised(sums, {"a": 1.0, "b": 1.0}, parts=1, noise=1.0) for _ in range(2))
    together = torch.cat([n.flatten() for n in (*first.values(), *again.values())])
    assert len(together.unique()) == len(together)


def test_no_seed_of_the_run_draws_it_again():
    """The server knows the run's seed: whatever follows from it, the server could subtract."""
    torch.manual_seed(0)
    first = drawn((50,))
    torch.manual_seed(0)
    assert not torch.equal(first, drawn((50,)))
    for module in (privacy, private_statistics, private_fisher):
        source = inspect.getsource(module)
        assert "Generator" not in source
        assert "seed=" not in source
        assert "torch.rand" not in source


@pytest.mark.parametrize(("parts", "noise", "limit"), [(1, 1.0, 1.0), (2, 0.5, 0.1), (3, 4.0, 20)])
def test_noise_has_the_spread_that_is_accounted_for(parts, noise, limit):
    sums = {"a": torch.full((100_000,), 5.0)}
    found = noised(sums, {"a": limit}, parts=parts, noise=noise, entropy=entropy(2))["a"]
    expected = noise * math.sqrt(parts) * limit
    assert float(found.std()) == pytest.approx(expected, rel=0.02)
    assert float(found.mean()) == pytest.approx(5.0, abs=5 * expected / math.sqrt(100_000))


def test_clipping_shortens_what_is_too_long_and_nothing_else():
    vectors = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
    factors = clip_factors(vectors.norm(dim=1), 1.0)
    assert (factors.unsqueeze(1) * vectors).norm(dim=1).tolist() == pytest.approx([1.0, 0.5, 0.0])
    assert factors[1:].tolist() == [1.0, 1.0]


# -- feature statistics -------------------------------------------------------------------------


@given(examples, clips, st.integers(0, 2**20), st.floats(0.01, 1000.0), st.booleans())
def test_one_image_moves_the_statistics_by_no_more_than_the_sensitivity(
    count, clip, seed, size, spike
):
    x, labels = size * normal(count + 1, 16, seed=seed), torch.arange(count + 1) % 4
    if spike:  # all of an image's length in one feature: its triangle is longest then
        x[-1] = torch.eye(16, dtype=torch.float64)[0] * size
    with_it, limits = clipped_sums(x, labels, num_classes=4, clip=clip)
    without, _ = clipped_sums(x[:-1], labels[:-1], num_classes=4, clip=clip)
    bound = math.sqrt(private_statistics.PARTS)
    assert moved(with_it, without, limits) <= bound * (1 + 1e-9)


def test_the_sensitivity_is_reached():
    x = torch.full((1, 16), 0.0, dtype=torch.float64)
    x[0, 0] = 1e9  # all of its length in one feature: no upper triangle is longer
    sums, limits = clipped_sums(x, torch.tensor([1]), num_classes=4, clip=3.0)
    nothing = {name: torch.zeros_like(total) for name, total in sums.items()}
    assert moved(sums, nothing, limits) == pytest.approx(math.sqrt(private_statistics.PARTS))


def test_without_noise_and_clipping_they_are_the_sums_of_the_features():
    x, labels = described(1)
    found = private_sums(x, labels, CLASSES, clip=50.0, noise=1e-9, entropy=silence)
    expected = FeatureSums.of(x, labels, CLASSES)
    found.check(CLASSES, 16, "client 'a'")
    assert torch.equal(found.counts, expected.counts)
    for part in ("sums", "second"):
        torch.testing.assert_close(
            off_grid(getattr(found, part)), off_grid(getattr(expected, part)), rtol=1e-4, atol=1e-3
        )


def within_of(sums: FeatureSums) -> Tensor:
    """Oracle: scatter within classes of released sums."""
    scatter = unpacked(off_grid(sums.second))
    for total, count in zip(off_grid(sums.sums), sums.counts.tolist(), strict=True):
        scatter = scatter - torch.outer(total, total) / count
    return scatter


def test_the_noise_adds_no_variance_on_average():
    x, labels = described(2, count=200)
    expected = within_of(FeatureSums.of(x, labels, CLASSES)).trace()
    traces = [
        within_of(
            private_sums(x, labels, CLASSES, clip=8.0, noise=1.0, entropy=entropy(seed))
        ).trace()
        for seed in range(100)
    ]
    assert float(torch.stack(traces).mean()) == pytest.approx(float(expected), rel=0.1)


def test_noise_alone_leaves_no_direction_and_what_stands_out_of_it_stays():
    """Of pure noise the same variance is left everywhere; one strong direction survives."""
    noise = packed(torch.zeros(64, 64)) + drawn((64 * 65 // 2,), entropy(3))
    matrix = unpacked(noise)
    flat = private_statistics._denoised(matrix + 5 * torch.eye(64), 1.0, floor=1e-9)
    spread = torch.linalg.eigvalsh(flat)
    assert float(spread.max() / spread.min()) < 2
    axis = torch.eye(64, dtype=torch.float64)[3]
    strong = private_statistics._denoised(matrix + 400 * torch.outer(axis, axis), 1.0, floor=1e-9)
    assert float(axis @ strong @ axis) > 350
    assert float(strong.trace()) == pytest.approx(float(matrix.trace() + 400))


@given(st.integers(0, 2**20), st.floats(0.1, 1000.0), examples)
@settings(max_examples=50)
def test_whatever_the_noise_a_head_can_be_made_of_them(seed, noise, count):
    x, labels = described(3, count=4 * count)
    found = private_sums(x, labels, CLASSES, clip=1.0, noise=noise, entropy=entropy(seed))
    found.check(CLASSES, 16, "client 'a'")
    means = off_grid(found.sums) / found.counts.unsqueeze(1)
    assert float(means.norm(dim=1).max()) <= 1.0 + 1e-6
    assert float(torch.linalg.eigvalsh(within_of(found)).min()) > -1e-4 * float(
        off_grid(found.second).abs().max()
    )
    discriminant(found, shrinkage=0.1).check(CLASSES, 16, "client 'a'")
    found.check_scatter("client 'a'")  # the noise's negative eigenvalues are taken out of it


def test_how_many_images_a_class_has_is_not_told():
    x, labels = described(4)
    counts = {
        int(private_sums(x, labels, CLASSES, clip=8.0, noise=2.0, entropy=entropy(s)).counts[0])
        for s in range(20)
    }
    assert len(counts) > 5


# -- the Fisher ---------------------------------------------------------------------------------


def fishers(images: Tensor, *, factored: bool, head: Head | None = HEAD) -> Weights:
    return per_example_fishers(
        pico_model(), images, NAMES, head=head, factored=factored, entropy=entropy(6)
    )


def exact(images: Tensor, *, factored: bool) -> Weights:
    found, _ = estimate_fisher(pico_model(), [images], NAMES, head=HEAD, curvature=Curvature.EXACT)
    return dict((found.reduced() if factored else found).sums)


def private(batches, *, factored: bool, **options) -> FisherDiagonal:
    options = {"head": HEAD} | options
    return private_fisher.private_fisher(
        pico_model(), batches, iter(NAMES), factored=factored, **options
    )


FORMS = pytest.mark.parametrize("factored", [False, True], ids=["dense", "factored"])


@FORMS
def test_each_image_has_the_exact_fisher_of_itself_alone(factored):
    found = fishers(IMAGES, factored=factored)
    for i in range(len(IMAGES)):
        alone = exact(IMAGES[i : i + 1], factored=factored)
        assert found.keys() == alone.keys()
        for name, expected in alone.items():
            torch.testing.assert_close(found[name][i], expected.double(), rtol=1e-5, atol=1e-12)


def test_of_features_each_image_has_a_direction_of_its_own():
    """On average over many, that is the squared Jacobian: the estimate of many seeds."""
    many = IMAGES[:1].repeat(3000, 1, 1, 1)
    found = fishers(many, factored=True, head=None)
    expected, _ = estimate_fisher(pico_model(), [many], NAMES)
    for name, total in expected.reduced().sums.items():
        assert len(found[name].unique(dim=0)) == len(many)
        torch.testing.assert_close(
            found[name].sum(0), total, rtol=0.3, atol=0.02 * float(total.max())
        )


@FORMS
@pytest.mark.parametrize("head", [HEAD, None], ids=["probabilities", "features"])
@pytest.mark.parametrize("clip", [1e-3, 1.0, 1e3])
def test_one_image_moves_the_fisher_by_no_more_than_the_clip(factored, head, clip):
    with_it = clipped_sum(fishers(IMAGES, factored=factored, head=head), clip)
    without = clipped_sum(fishers(IMAGES[:-1], factored=factored, head=head), clip)
    assert moved(with_it, without, dict.fromkeys(with_it, clip)) <= 1 + 1e-9


@FORMS
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_without_noise_and_clipping_it_is_the_exact_fisher(factored, batch):
    found = private(IMAGES.split(batch), factored=factored, clip=1e6, noise=1e-30, entropy=silence)
    assert found.num_examples == len(IMAGES)
    for name, expected in exact(IMAGES, factored=factored).items():
        assert found.sums[name].dtype == torch.float32
        torch.testing.assert_close(found.sums[name], expected.float(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("head", [HEAD, None], ids=["probabilities", "features"])
def test_under_noise_a_fisher_is_not_negative_and_counts_are_not_told(head):
    runs = [
        private(
            [IMAGES],
            factored=True,
            head=head,
            clip=0.1,
            noise=3.0,
            entropy=entropy(seed),
        )
        for seed in range(8)
    ]
    assert len({fisher.num_examples for fisher in runs}) > 2
    for fisher in runs:
        fisher.check(PICO, owner="client 'a'")


def test_the_noise_of_the_fisher_hides_the_clip_and_the_count_together():
    def rows(seed: int) -> Tensor:
        found = private(
            [IMAGES],
            factored=False,
            clip=1e-9,  # so that what is seen is noise
            noise=2.0,
            entropy=entropy(seed),
        )
        return torch.cat([found.sums[name].flatten() for name in NAMES]).double()

    found = torch.cat([rows(seed) for seed in range(40)])
    above = found[found > 0]
    assert len(above) / len(found) == pytest.approx(0.5, abs=0.05)
    spread = 1e-9 * 2.0 * math.sqrt(private_fisher.PARTS)
    assert float(above.square().mean().sqrt()) == pytest.approx(spread, rel=0.05)


def test_images_are_held_one_by_one_where_their_fishers_are_large():
    large = {"w": torch.empty(10_000, 10_000, device="meta")}
    assert images_at_a_time(large, factored=False, most=32) == 1
    assert images_at_a_time(large, factored=True, most=32) == 32
    assert images_at_a_time(PICO, factored=False, most=32) == 32


# -- ε ------------------------------------------------------------------------------------------


def integrated_delta(epsilon: float, noises: tuple[float, ...]) -> float:
    """Oracle: δ by integrating over a run's releases, ∫ max(0, 1 − e^(ε−L)) p, one axis a release.

    Each release is N(1, σ²) with the example and N(0, σ²) without it; L is the log of their ratio.
    The sum of the releases' losses is found on a grid, without the formula for several releases.
    """
    step = 0.002
    grid = np.arange(-40_000, 40_001) * step
    density = None
    for noise in noises:  # L = (2x − 1)/(2σ²), x ~ N(1, σ²): the loss is normal, too
        mean, variance = 1 / (2 * noise**2), 1 / noise**2
        own = np.exp(-((grid - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
        density = own if density is None else fftconvolve(density, own, mode="same") * step
    above = np.maximum(0.0, -np.expm1(epsilon - grid))
    return float((above * density).sum() * step)


@pytest.mark.parametrize(
    "noises", [(1.0,), (1.0,) * 3, (4.0,) * 3, (0.5, 1.0, 8.0), (10.0,) * 7], ids=str
)
@pytest.mark.parametrize("delta", [1e-5, 1e-2])
def test_epsilon_solves_the_integral_over_all_releases(noises, delta):
    epsilon = composed_epsilon(noises, delta=delta)
    if epsilon == 0:
        assert integrated_delta(0.0, noises) <= delta
    else:
        assert integrated_delta(epsilon, noises) == pytest.approx(delta, rel=1e-4)


def test_three_releases_at_noise_1_cost_what_the_readme_says():
    assert composed_epsilon([1.0] * 3, delta=1e-5) == pytest.approx(8.39, abs=0.005)


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6), st.floats(1e-12, 0.5))
def test_more_noise_never_costs_more_and_a_further_release_never_less(noises, delta):
    epsilon = composed_epsilon(noises, delta=delta)
    assert epsilon >= 0
    slack = 1e-9 * epsilon
    assert composed_epsilon([1.1 * n for n in noises], delta=delta) <= epsilon + slack
    assert composed_epsilon([*noises, 5.0], delta=delta) >= epsilon - slack
    assert composed_epsilon(noises, delta=delta / 2) >= epsilon - slack
    one = 1 / math.sqrt(sum(n**-2 for n in noises))
    assert composed_epsilon([one], delta=delta) == pytest.approx(epsilon, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("delta", [1e-300, 1e-5, 0.999])
def test_extreme_noise_is_accounted_for(delta):
    assert composed_epsilon([5e-324], delta=delta) == math.inf
    assert composed_epsilon([1e-300, 1.0], delta=delta) == math.inf
    assert 4e11 < composed_epsilon([1.001e-6], delta=delta) < 6e11
    assert 0 <= composed_epsilon([1e300] * 3, delta=delta) < 1e-12
    assert composed_epsilon([1e7], delta=1e-5) == 0
    assert 36 < composed_epsilon([1.0], delta=1e-300) < 39


@pytest.mark.parametrize(
    ("noise", "delta"), [(1.0, 0.0), (1.0, 1.0), (1.0, math.nan), (0.0, 0.1), (-1.0, 0.1)]
)
def test_what_no_mechanism_can_have_is_refused(noise, delta):
    with pytest.raises(ValueError, match="must be in"):
        composed_epsilon([1.0, noise], delta=delta)


def test_a_clients_releases_are_counted_together():
    told = [{"noise": 2.0}, {}, {"noise": 1.0}, {"noise": 2.0}]
    assert accounting.spent(told, delta=1e-5) == {
        "epsilon": composed_epsilon([1.0, 2.0, 2.0], delta=1e-5),
        "delta": 1e-5,
        "releases": 3,
        "accountant": "analytic Gaussian mechanism",
    }


def test_who_adds_no_noise_has_no_epsilon():
    assert accounting.spent([], delta=1e-5) is None
    assert accounting.spent([{"wire": "int8", "wire_error": 0.1}], delta=1e-5) is None


def test_no_noise_that_a_client_can_tell_of_breaks_the_books():
    weakest, strongest = (accounting.spent([{"noise": n}], delta=1e-5) for n in (1e-300, 1e300))
    assert weakest["epsilon"] is None
    assert 0 <= strongest["epsilon"] < 0.01


def test_notes_are_made_of_whatever_figures_a_client_tells():
    told = {
        "ann": [{"phase": "fisher", "form_error": 0.5, "wire_error": 0.25, "wire": "int8"}],
        "ben": [{"phase": "fisher", "wire_error": 0.5}],  # and does not say of what
    }
    assert accounting.notes(told, delta=1e-5) == [
        "What came in int8 in the phase fisher is off by 25.00% of its length on average, "
        "25.00% at most.",
    ]


def test_next_to_no_noise_is_said_to_be_none():
    told = {"ann": [{"phase": "features", "noise": 1e-9}]}
    (note,) = accounting.notes(told, delta=1e-5)
    assert note.startswith("ann sent feature statistics and Fisher with next to no noise")


@pytest.mark.parametrize("start", HeadStart)
@pytest.mark.parametrize("curvature", Curvature)
def test_the_fisher_under_a_head_fitted_to_the_same_images_is_refused(start, curvature):
    demand = {"statistics": Statistics.SUMS, "curvature": curvature, "start": start}
    CapsConfig().check_noise(**demand)
    if start is HeadStart.PROBE and curvature is not Curvature.FEATURES:
        with pytest.raises(ConfigError, match="not private by noise"):
            CapsConfig(dp_noise=1.0).check_noise(**demand)
    else:
        CapsConfig(dp_noise=1.0).check_noise(**demand)


def test_mixtures_are_refused_under_noise():
    demand = {"curvature": Curvature.FEATURES, "start": HeadStart.ZERO}
    CapsConfig().check_noise(statistics=Statistics.MIXTURES, **demand)
    with pytest.raises(ConfigError, match="Use `statistics = sums`"):
        CapsConfig(dp_noise=1.0).check_noise(statistics=Statistics.MIXTURES, **demand)
