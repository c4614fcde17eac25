"""The membership attacks: their scores, figures and intervals against slow oracles."""

from __future__ import annotations

import math
import time
from statistics import NormalDist, mean, variance

import pytest
import torch
from builders import normal, rng
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from fedcompo.audit import estimates
from fedcompo.audit.estimates import Estimate
from fedcompo.audit.membership import (
    Attack,
    confidence,
    likelihood_ratio_attack,
    likelihood_ratios,
    loss_attack,
    losses,
)
from fedcompo.errors import DataError

NORMAL = NormalDist()
FEW_LEVELS = st.lists(st.integers(-2, 2).map(float), min_size=2, max_size=30)


def shadow_experiment(
    *, shift: float, difficulty: float, examples: int = 400, shadows: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plant phi = an example's own ease + shift where trained on + noise of size 1.

    Returns target phi (examples,), shadow phi and mask (shadows, examples), members (examples,).
    """
    ease = normal(examples, seed=seed, scale=difficulty)
    order = torch.rand(shadows, examples, generator=rng(seed + 1)).argsort(0)
    trained_on = order < shadows // 2
    is_member = torch.arange(examples) % 2 == 0
    target = ease + shift * is_member + normal(examples, seed=seed + 2)
    phi = ease + shift * trained_on + normal(shadows, examples, seed=seed + 3)
    return target, phi, trained_on, is_member


def ends(estimate: Estimate) -> tuple[float, float, float]:
    """The figure, and both ends of its interval."""
    return estimate.value, estimate.low, estimate.high


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(estimates, "RESAMPLES", 20)


# --- Confidence and loss ---


def test_confidence_is_the_log_odds_of_the_true_class():
    logits, labels = normal(20, 5, seed=0, scale=3), torch.arange(20) % 5
    expected = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        p = math.exp(row[label]) / sum(map(math.exp, row))
        expected.append(math.log(p) - math.log(1 - p))
    assert confidence(logits, labels).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_confidence_neither_overflows_nor_saturates(dtype):
    logits = torch.tensor([[1e4, 0, -1e4], [900, 0, 0], [0, 900, 0]], dtype=dtype)
    actual = confidence(logits, torch.tensor([0, 0, 0]))
    assert actual.dtype is torch.float64
    assert actual.tolist() == pytest.approx([1e4, 900 - math.log(2), -900], rel=1e-12)


def test_losses_are_the_cross_entropy():
    logits, labels = normal(20, 5, seed=1, scale=3), torch.arange(20) % 5
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses(logits, labels), expected, rtol=1e-12, atol=1e-14)


def test_losses_of_very_confident_examples_do_not_tie():
    logits = torch.tensor([[margin, 0.0, 0.0] for margin in (38.0, 50.0, 100.0)])
    first, second, third = losses(logits, torch.zeros(3, dtype=torch.long)).tolist()
    assert first > second > third > 0
    assert second == pytest.approx(2 * math.exp(-50), rel=1e-12)


@pytest.mark.parametrize("score", [confidence, losses])
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3, 1), torch.zeros(3), r"shape \(3, 1\) .* at least 2 classes"),
        (torch.zeros(3, 2), torch.zeros(2), r"\(3, 2\) and labels \(2,\)"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 7]), "1 labels, such as 7, .* from 0 to 1"),
        (torch.zeros(3, 2), torch.tensor([-1, -1, 0]), "2 labels, such as -1"),
        (torch.tensor([[0.0, math.nan], [0.0, 0.0]]), torch.zeros(2), "1 of 2 confidences"),
        (torch.tensor([[0.0, -math.inf]]), torch.zeros(1), "1 of 1 confidences"),
    ],
)
def test_unusable_logits_and_labels_are_refused(score, logits, labels, message):
    with pytest.raises(DataError, match=message):
        score(logits, labels.long())


# --- Figures of an attack ---


def written_auc(members: list[float], nonmembers: list[float]) -> float:
    """Oracle: Mann and Whitney's count of pairs won, a tie half a win."""
    won = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in members for b in nonmembers)
    return won / (len(members) * len(nonmembers))


def written_tpr(members: list[float], nonmembers: list[float], rate: float) -> float:
    """Oracle: most members found by any threshold that takes few enough non-members for members."""
    best = 0.0
    for threshold in [*members, *nonmembers]:
        false = sum(score >= threshold for score in nonmembers) / len(nonmembers)
        if false <= rate:
            best = max(best, sum(score >= threshold for score in members) / len(members))
    return best


@given(FEW_LEVELS, FEW_LEVELS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@pytest.mark.usefixtures("few_resamples")
def test_auc_counts_pairs_won_and_ties_half(members, nonmembers):
    actual = Attack.of(torch.tensor(members), torch.tensor(nonmembers)).auc.value
    assert actual == pytest.approx(written_auc(members, nonmembers), abs=1e-12)
    truth = [1] * len(members) + [0] * len(nonmembers)
    assert actual == pytest.approx(roc_auc_score(truth, members + nonmembers), abs=1e-12)


@pytest.mark.parametrize("levels", [1, 3, 0.01], ids=["wide ties", "ties", "hardly any tie"])
def test_true_positive_rates_are_the_best_a_threshold_within_the_rate_finds(levels):
    members = (normal(90, seed=1) / levels + 0.8).round() * levels
    nonmembers = (normal(510, seed=2) / levels).round() * levels
    attack = Attack.of(members, nonmembers)
    assert list(attack.tpr) == [0.05, 0.01]
    scores = members.tolist() + nonmembers.tolist()
    false, true, _ = roc_curve([1] * 90 + [0] * 510, scores, drop_intermediate=False)
    for rate, tpr in attack.tpr.items():
        expected = written_tpr(members.tolist(), nonmembers.tolist(), rate)
        assert tpr.value == pytest.approx(expected, abs=1e-12)
        assert tpr.value == pytest.approx(true[false <= rate].max(), abs=1e-12)


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(
    ("nonmembers", "rates"),
    [(99, []), (100, [0.05]), (499, [0.05]), (500, [0.05, 0.01]), (5000, [0.05, 0.01, 0.001])],
)
def test_a_rate_is_reported_only_where_it_allows_five_false_positives(nonmembers, rates):
    attack = Attack.of(normal(3, seed=0), normal(nonmembers, seed=1))
    assert list(attack.tpr) == rates


def test_equal_scores_are_chance_and_find_nobody():
    attack = Attack.of(torch.full((7,), 0.3), torch.full((100,), 0.3))
    assert ends(attack.auc) == (0.5, 0.5, 0.5)
    assert ends(attack.tpr[0.05]) == (0, 0, 0)
    assert attack.is_chance()


@pytest.mark.parametrize(("sign", "expected"), [(1, 1.0), (-1, 0.0)])
def test_perfect_separation_is_one_and_the_wrong_way_round_nought(sign, expected):
    members, nonmembers = sign * (10 + torch.rand(40)), sign * torch.rand(100)
    attack = Attack.of(members, nonmembers)
    assert ends(attack.auc) == (expected,) * 3
    assert attack.tpr[0.05].value == expected
    assert not attack.is_chance()


def test_an_attack_needs_members_and_non_members():
    with pytest.raises(DataError, match="at least 2 members and 2 non-members, got 1 and 5"):
        Attack.of(torch.zeros(1), torch.zeros(5))
    with pytest.raises(DataError, match="got 5 and 0"):
        Attack.of(torch.zeros(5), torch.zeros(0))


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match="2 of 6 scores are not finite"):
        Attack.of(torch.tensor([0.0, math.nan, math.inf]), torch.zeros(3))


# --- Intervals ---


def test_the_interval_is_the_percentiles_of_figures_of_resampled_examples():
    members, nonmembers = normal(60, seed=1) + 1, normal(100, seed=2)
    generator, aucs, tprs = rng(99), [], []  # other draws than the attack's, by the same law
    for _ in range(10_000):
        a = members[torch.randint(60, (60,), generator=generator)]
        b = nonmembers[torch.randint(100, (100,), generator=generator)]
        aucs.append(float((a[:, None] > b).double().mean()))
        sixth_highest = b.sort(descending=True).values[5]  # above it: at most 5 false positives
        tprs.append(float((a > sixth_highest).double().mean()))
    attacks = [Attack.of(members, nonmembers, seed=seed) for seed in range(20)]  # 1,000 each
    for found, drawn in (
        ([attack.auc for attack in attacks], sorted(aucs)),
        ([attack.tpr[0.05] for attack in attacks], sorted(tprs)),
    ):
        low, middle, high = drawn[250], drawn[5000], drawn[9750]
        # A level of 90 % would be 16 % narrower; the error of sampling is 1.5 % of the width.
        assert mean(e.low for e in found) == pytest.approx(low, abs=0.06 * (middle - low))
        assert mean(e.high for e in found) == pytest.approx(high, abs=0.06 * (high - middle))


@pytest.mark.parametrize(
    "shift",
    [pytest.param(0.0, marks=pytest.mark.slow), 0.5, pytest.param(1.5, marks=pytest.mark.slow)],
)
def test_intervals_cover_the_true_figures_about_as_often_as_they_say(shift, monkeypatch):
    """Normal scores a shift apart: AUC = Φ(shift/√2), TPR(r) = 1 − Φ(Φ⁻¹(1 − r) − shift)."""
    truth = NORMAL.cdf(shift / math.sqrt(2)), 1 - NORMAL.cdf(NORMAL.inv_cdf(0.95) - shift)
    monkeypatch.setattr(estimates, "RESAMPLES", 400)
    runs = 80
    covered = [0, 0]
    for run in range(runs):
        attack = Attack.of(
            normal(100, seed=2 * run) + shift, normal(100, seed=2 * run + 1), seed=run
        )
        covered[0] += attack.auc.covers(truth[0])
        covered[1] += attack.tpr[0.05].covers(truth[1])
    # 95 % less or more three standard errors of a share of 80.
    assert all(0.876 <= count / runs <= 1 for count in covered), covered
    assert covered[0] < runs  # not so wide as to be empty


def test_a_difference_pairs_the_same_images_so_its_interval_is_narrower():
    members, nonmembers = normal(60, seed=1) + 1, normal(100, seed=2)
    first, second = (
        Attack.of(members + shift, nonmembers + 0.1 * normal(100, seed=4), seed=0).auc
        for shift in (0, 0.1)
    )
    difference = second - first
    assert difference.value == second.value - first.value
    assert difference.low > 0  # of intervals that overlap almost wholly
    assert first.high > second.low
    assert ends(first - first) == (0, 0, 0)


def test_equal_seeds_give_equal_intervals_and_others_do_not():
    members, nonmembers = normal(50, seed=1), normal(200, seed=2)
    first = Attack.of(members, nonmembers, seed=3)
    assert Attack.of(members, nonmembers, seed=3) == first
    other = Attack.of(members, nonmembers, seed=4)
    assert other.auc.value == first.auc.value
    assert (other.auc.low, other.auc.high) != (first.auc.low, first.auc.high)


def test_a_shift_of_the_scores_that_keeps_their_order_changes_nothing():
    members, nonmembers = normal(50, seed=1), normal(200, seed=2)
    assert Attack.of(members, nonmembers) == Attack.of(members.exp(), nonmembers.exp())


def test_the_bootstrap_of_a_thousand_examples_takes_less_than_a_second():
    scores = normal(1000, seed=0)
    start = time.process_time()
    Attack.of(scores[:500], scores[500:])
    assert time.process_time() - start < 1


# --- Loss attack ---


def test_the_loss_attack_takes_low_losses_for_members():
    low, high = torch.tensor([0.1, 0.2, 0.6]), torch.tensor([0.5, 0.9])
    assert loss_attack(low, high).auc.value == pytest.approx(5 / 6)
    assert loss_attack(high, low).auc.value == pytest.approx(1 / 6)


def test_the_loss_attack_and_confidence_order_examples_alike():
    logits, labels = normal(300, 4, seed=3, scale=20), torch.arange(300) % 4
    phi, loss = confidence(logits, labels), losses(logits, labels)
    assert loss_attack(loss[:200], loss[200:]) == Attack.of(phi[:200], phi[200:])


# --- Likelihood-ratio attack ---


def written_spread(phi: list[list[float]], chosen: list[list[bool]]) -> float:
    """Oracle: pooled deviation of the chosen values about each example's mean."""
    squares, freedom = 0.0, 0
    for example in range(len(phi[0])):
        values = [row[example] for row, kept in zip(phi, chosen, strict=True) if kept[example]]
        squares += variance(values) * (len(values) - 1)
        freedom += len(values) - 1
    return math.sqrt(squares / freedom)


def written_log_density(value: float, mu: float, sigma: float) -> float:
    return -0.5 * math.log(2 * math.pi) - math.log(sigma) - 0.5 * ((value - mu) / sigma) ** 2


def written_ratios(target: Tensor, phi: Tensor, trained_on: Tensor) -> list[float]:
    """Oracle: difference of Gaussian log-densities, one example at a time."""
    rows, had = phi.tolist(), trained_on.tolist()
    sigma_in = written_spread(rows, had)
    sigma_out = written_spread(rows, (~trained_on).tolist())
    scores = []
    for example, value in enumerate(target.tolist()):
        column = [(row[example], kept[example]) for row, kept in zip(rows, had, strict=True)]
        mu_in = mean(value for value, kept in column if kept)
        mu_out = mean(value for value, kept in column if not kept)
        scores.append(
            written_log_density(value, mu_in, sigma_in)
            - written_log_density(value, mu_out, sigma_out)
        )
    return scores


def uneven_experiment() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Six shadows, 2 to 4 of them "in"; "in" spreads three times less than "out"."""
    target, phi, trained_on, is_member = shadow_experiment(
        shift=1.0, difficulty=2.0, examples=30, shadows=6
    )
    trained_on[:, :10] = (torch.arange(6) < 2)[:, None]
    trained_on[:, 10:20] = (torch.arange(6) < 4)[:, None]
    phi = torch.where(trained_on, 0.3 * phi, phi)
    return target, phi, trained_on, is_member


def test_scores_are_log_ratios_of_gaussian_densities():
    target, phi, trained_on, _ = uneven_experiment()
    expected = written_ratios(target, phi, trained_on)
    assert likelihood_ratios(target, phi, trained_on).tolist() == pytest.approx(expected, rel=1e-9)


def test_the_attack_judges_the_scores_of_members_against_the_rest():
    target, phi, trained_on, is_member = uneven_experiment()
    scores = torch.tensor(written_ratios(target, phi, trained_on), dtype=torch.float64)
    expected = written_auc(scores[is_member].tolist(), scores[~is_member].tolist())
    attack = likelihood_ratio_attack(target, phi, trained_on, is_member, seed=2)
    assert attack.auc.value == pytest.approx(expected, abs=1e-12)
    assert attack == Attack.of(scores[is_member], scores[~is_member], seed=2)
    assert attack != likelihood_ratio_attack(target, phi, trained_on, is_member, seed=3)


def test_shadows_find_members_among_examples_of_uneven_difficulty_where_the_loss_does_not():
    target, phi, trained_on, is_member = shadow_experiment(shift=2.0, difficulty=5.0)
    loss = torch.log1p(torch.exp(-target))
    by_loss = loss_attack(loss[is_member], loss[~is_member])
    by_ratio = likelihood_ratio_attack(target, phi, trained_on, is_member)
    # The shift hides in a spread of 5: AUC Φ(2 / √2·√26) = 0.61; known ease would give 0.92.
    assert by_loss.auc.high < 0.75
    assert by_ratio.auc.low > 0.85
    assert by_ratio.tpr[0.05].low > by_loss.tpr[0.05].high


def test_where_nothing_is_to_be_found_the_attack_says_chance(monkeypatch):
    monkeypatch.setattr(estimates, "RESAMPLES", 200)
    chance = 0
    for seed in range(40):
        experiment = shadow_experiment(shift=0.0, difficulty=5.0, examples=200, seed=10 * seed)
        chance += likelihood_ratio_attack(*experiment).is_chance()
    assert chance >= 33  # 38 expected, three standard errors are 4.1


@pytest.mark.parametrize("offset", [0.0, 1 / 3])
def test_shadows_that_agree_to_the_bit_are_no_evidence(offset):
    """As after an exact removal: all shadow pools are then one and the same model."""
    ease = normal(90, seed=0, scale=3)
    _, _, trained_on, is_member = shadow_experiment(
        shift=0.0, difficulty=0.0, examples=90, shadows=7
    )
    phi = ease.expand(7, 90)
    scores = likelihood_ratios(ease + offset, phi, trained_on)
    assert scores.tolist() == [0.0] * 90
    attack = likelihood_ratio_attack(ease, phi, trained_on, is_member)
    assert ends(attack.auc) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("sort", "row"), [("with", False), ("without", True)])
def test_examples_with_too_few_shadows_are_counted_and_refused(sort, row):
    target, phi, trained_on, is_member = shadow_experiment(
        shift=1.0, difficulty=1.0, examples=50, shadows=6
    )
    trained_on[1:, :3] = row
    trained_on[0, :3] = not row
    message = (
        rf"3 of 50 examples .* trained {sort} them: at least 2 each .* the fewest found is 1\."
    )
    with pytest.raises(DataError, match=message):
        likelihood_ratio_attack(target, phi, trained_on, is_member)


def test_two_shadows_of_each_sort_are_enough():
    experiment = shadow_experiment(shift=3.0, difficulty=5.0, shadows=4)
    assert likelihood_ratio_attack(*experiment).auc.low > 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_phi": torch.zeros(9)}, r"target's phi has shape \(9,\), the shadows' \(6, 8\)"),
        ({"shadow_phi": torch.zeros(0, 8)}, "at least one shadow"),
        ({"trained_on": torch.ones(6, 8)}, "`trained_on` must be bool .* got torch.float32"),
        ({"trained_on": torch.ones(8, 6) > 0}, r"of shape \(6, 8\), got torch.bool of \(8, 6\)"),
        ({"is_member": torch.ones(8, dtype=torch.long)}, "`is_member` must be bool"),
        ({"is_member": torch.ones(8) > 0}, "got 8 and 0"),
        ({"target_phi": torch.full((8,), math.nan)}, "8 of 8 target's phi are not finite"),
        ({"shadow_phi": torch.full((6, 8), math.inf)}, "48 of 48 shadows' phi are not finite"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    names = ("target_phi", "shadow_phi", "trained_on", "is_member")
    experiment = shadow_experiment(shift=1.0, difficulty=1.0, examples=8, shadows=6)
    with pytest.raises(DataError, match=message):
        likelihood_ratio_attack(**{**dict(zip(names, experiment, strict=True)), **change})
