"""λ is chosen by the quadratic score on images of all clients."""

from __future__ import annotations

import math

import pytest
import torch
from builders import normal

from fedcompo.composition.voting import TEMPERATURE, WORST, Votes, elected, scales

LABELS = torch.tensor([0, 1, 2, 1])


def test_votes_are_the_quadratic_score_of_each_candidate():
    logits = [normal(4, 3, seed=1), 50 * normal(4, 3, seed=2)]
    votes = Votes.of(logits, LABELS)
    expected = []
    for own in logits:
        loss = 0.0
        for row, label in zip(own.tolist(), LABELS.tolist(), strict=True):
            powers = [math.exp(TEMPERATURE * z) for z in row]
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


def test_one_image_near_the_border_does_not_outweigh_the_margins_of_the_others():
    """The first model has one hit fewer, by a hair; it tells the others apart far better."""
    clear = torch.nn.functional.one_hot(LABELS, 3) * 60.0
    missed = clear.clone()
    missed[0] = torch.tensor([59.0, 60.0, 0.0])
    votes = Votes.of([missed, clear / 6], LABELS)
    assert votes.hits == (3, 4)
    assert elected(votes.losses) == 0


def test_a_model_that_yields_no_numbers_loses():
    z = normal(4, 3, seed=3)
    votes = Votes.of([z * float("nan"), z], LABELS)
    assert votes.losses[0] == WORST * 4
    assert elected(votes.losses) == 1


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (1, (0.0, 1.0, 2.0)),
        (2, (0.0, 1.0, math.sqrt(2), 2.0, 4.0)),
        (4, (0.0, 1.0, 2.0, 4.0, 8.0)),
        (3, (0.0, 1.0, math.sqrt(3), 3.0, 6.0)),
        (5, (0.0, 1.0, 2.5, 5.0, 10.0)),
        (9, (0.0, 1.0, 3.0, 4.5, 9.0, 18.0)),
    ],
)
def test_the_frozen_backbone_the_mean_and_the_sum_are_always_tried(members, expected):
    assert scales(members) == expected


def test_the_least_loss_wins_and_of_equals_the_nearest_to_the_backbone():
    assert elected((3.0, 4.0, 2.0)) == 2
    assert elected((3.0, 2.0, 2.0)) == 1
