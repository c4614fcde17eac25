"""λ and shrinkage are chosen by the quadratic score on images of all clients."""

from __future__ import annotations

import math

import pytest
import torch
from builders import normal

from fedcompo.composition.voting import (
    SHRINKAGES,
    TEMPERATURES,
    Candidate,
    Votes,
    candidates,
    elected,
    scales,
)

LABELS = torch.tensor([0, 1, 2, 1])


def spread(*best: float) -> Votes:
    """Votes of ten images whose candidates have these losses at their best temperature."""
    worse = [9.0] * (len(TEMPERATURES) - 1)
    losses = [loss for own in best for loss in (*worse, own)]
    return Votes((0,) * len(best), tuple(losses), 10)


def test_votes_are_the_quadratic_score_of_each_candidate_at_each_temperature():
    logits = [normal(4, 3, seed=1), 5 * normal(4, 3, seed=2)]
    votes = Votes.of(logits, LABELS)
    expected = []
    for own in logits:
        for temperature in TEMPERATURES:
            loss = 0.0
            for row, label in zip(own.tolist(), LABELS.tolist(), strict=True):
                powers = [math.exp(temperature * z) for z in row]
                for k, power in enumerate(powers):
                    loss += (power / sum(powers) - (k == label)) ** 2
            expected.append(loss)
    assert votes.losses == pytest.approx(tuple(expected), rel=1e-12)
    right = [sum(int(r.argmax()) == int(k) for r, k in zip(z, LABELS, strict=True)) for z in logits]
    assert votes.hits == tuple(right)
    assert votes.num_examples == 4


def test_votes_add_up_over_clients():
    logits = [normal(4, 3, seed=1), normal(4, 3, seed=2)]
    first, rest = LABELS[:1], LABELS[1:]
    parts = Votes.of([z[:1] for z in logits], first) + Votes.of([z[1:] for z in logits], rest)
    whole = Votes.of(logits, LABELS)
    assert (parts.hits, parts.num_examples) == (whole.hits, whole.num_examples)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-12)
    assert whole + Votes.none(2) == whole


def test_a_head_that_is_only_too_sharp_loses_nothing_by_it():
    """At the temperature 1/8 its logits are those of the other at 1."""
    z = normal(4, 3, seed=3).double()
    apart = z.softmax(1) - torch.nn.functional.one_hot(LABELS, 3)
    calibrated = float(apart.square().sum(1).mean())
    (sharp,) = Votes.of([8 * z], LABELS).scores
    assert sharp <= calibrated + 1e-12


def test_a_model_that_yields_no_numbers_loses():
    z = normal(4, 3, seed=3)
    assert elected(candidates(1)[:2], Votes.of([z * float("nan"), z], LABELS)) == 1


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (1, (0.0, 1.0, 2.0)),
        (2, (0.0, 1.0, math.sqrt(2), 2.0, 4.0)),
        (4, (0.0, 1.0, 2.0, 4.0, 8.0)),
        (5, (0.0, 1.0, math.sqrt(5), 5.0, 10.0)),
        (9, (0.0, 1.0, 3.0, 4.5, 9.0, 18.0)),
    ],
)
def test_the_frozen_backbone_the_mean_and_the_sum_are_always_tried(members, expected):
    assert scales(members) == expected
    tried = candidates(members)
    assert [c.scale for c in tried] == [*expected] * len(SHRINKAGES)
    assert {c.shrinkage for c in tried} == set(SHRINKAGES)


def test_the_least_loss_wins_and_of_equals_the_nearest_to_the_backbone():
    tried = [Candidate(2.0, 0.1), Candidate(1.0, 0.1), Candidate(1.0, 0.5), Candidate(5.0, 0.5)]
    assert elected(tried, spread(3.0, 4.0, 4.0, 2.0)) == 3
    assert elected(tried, spread(2.0, 2.0, 2.0, 2.0)) == 2
    assert elected(tried, spread(2.0, 2.0, 2.5, 2.0)) == 1
