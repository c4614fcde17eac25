"""Negation: a task vector subtracted, one weight at a time."""

from __future__ import annotations

import math

import pytest
import torch
from builders import KINDS, dense_by_hand, pico_weights, random_like, task_vector

from fedcompo.config.choices import Kind
from fedcompo.errors import ConfigError
from fedcompo.export.negation import negated

THETA_0 = pico_weights(dtype=torch.float32)
THETA = random_like(THETA_0, seed=40)
NAMES = sorted(THETA_0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_the_task_vector_is_subtracted_from_the_weights_given(kind, scale):
    vector = task_vector(kind, THETA_0, seed=1)
    found = dict(negated(THETA.items(), vector, THETA_0, scale=scale))
    change = dense_by_hand(vector, THETA_0)  # of theta_0, also where theta is elsewhere
    assert found.keys() == THETA.keys()
    for name, weight in THETA.items():
        assert found[name].dtype == torch.float32
        expected = weight.double() - scale * change[name]
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_the_difference_is_rounded_once():
    half = {name: weight.bfloat16() for name, weight in THETA_0.items()}
    vector = task_vector(Kind.FULL, half, seed=1)
    found = dict(negated(half.items(), vector, half, scale=0.3))
    for name, change in dense_by_hand(vector, half).items():
        assert torch.equal(found[name], (half[name].double() - 0.3 * change).bfloat16())


def test_weights_come_one_at_a_time_in_the_order_given():
    asked_for = []

    def source():
        for name in reversed(NAMES):
            asked_for.append(name)
            yield name, THETA[name]

    stream = negated(source(), task_vector(Kind.LORA, THETA_0, seed=1), THETA_0, scale=1.0)
    assert asked_for == []
    assert next(stream)[0] == NAMES[-1]
    assert asked_for == [NAMES[-1]]
    assert [name for name, _ in stream] == NAMES[:-1][::-1]


def test_weights_that_the_task_vector_leaves_alone_pass_as_they_are():
    other = torch.ones(3)
    vector = task_vector(Kind.IA3, THETA_0, seed=1)
    assert dict(negated([("norm.weight", other)], vector, THETA_0, scale=1.0)) == {
        "norm.weight": other
    }


def test_nothing_that_was_given_is_changed():
    before = {name: weight.clone() for name, weight in THETA.items()}
    dict(negated(THETA.items(), task_vector(Kind.FULL, THETA_0, seed=1), THETA_0, scale=1.0))
    assert all(torch.equal(THETA[name], before[name]) for name in before)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_only_a_positive_scale_negates(scale):
    with pytest.raises(ConfigError, match=f"positive number, got {scale}"):
        next(negated(THETA.items(), task_vector(Kind.FULL, THETA_0, seed=1), THETA_0, scale=scale))
