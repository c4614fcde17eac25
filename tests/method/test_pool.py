"""Composition and its inverse: sums of dense task vectors, exact removal."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from builders import (
    MIXABLE,
    contribution,
    dense_by_hand,
    mixed_pool_members,
    pico_weights,
)
from hypothesis import given
from hypothesis import strategies as st

from fedcompo.config.choices import Kind
from fedcompo.errors import BackboneMismatch, ContributionError
from fedcompo.method.deltas import Weights
from fedcompo.method.pool import Pool
from fedcompo.method.task_vector import TaskVector

THETA_0 = {
    **pico_weights(dtype=torch.float32),
    "blocks.0.untouched.weight": torch.ones(2, 2),
}
ADAPTED = pico_weights(dtype=torch.float32)
MEMBERS = mixed_pool_members(ADAPTED)
POOL = Pool(tuple(MEMBERS))
UNEQUAL = {"client-0": 0.5, "client-1": 0.2, "client-2": 0.3}


def assert_bits(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("coefficients", [None, UNEQUAL])
@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
def test_a_mixed_pool_composes_to_the_weighted_sum_of_dense_task_vectors(coefficients, scale):
    w = coefficients or dict.fromkeys(UNEQUAL, 1 / 3)
    theta_p = POOL.compose(THETA_0, coefficients, scale=scale)
    assert theta_p.keys() == THETA_0.keys()
    for name in ADAPTED:
        change = sum(w[c.client] * dense_by_hand(c.task_vector, ADAPTED)[name] for c in MEMBERS)
        assert theta_p[name].dtype == torch.float32
        torch.testing.assert_close(
            theta_p[name].double(), THETA_0[name] + scale * change, rtol=1e-6, atol=1e-6
        )


def test_weights_that_nobody_changes_stay_as_they_are():
    name = "blocks.0.untouched.weight"
    assert torch.equal(POOL.compose(THETA_0)[name], THETA_0[name])


def test_composing_leaves_the_pre_trained_weights_alone():
    before = {name: weight.clone() for name, weight in THETA_0.items()}
    POOL.compose(THETA_0)
    assert_bits(THETA_0, before)


def test_half_precision_weights_compose_in_half_precision_rounded_once():
    half = {name: weight.bfloat16() for name, weight in ADAPTED.items()}
    member = contribution("client-0", Kind.FULL, theta_0=half)
    theta_p = Pool((member,)).compose(half)
    for name, change in dense_by_hand(member.task_vector, half).items():
        assert torch.equal(theta_p[name], (half[name].double() + change).bfloat16())


def test_sums_run_in_double_precision():
    theta_0 = {"w.weight": torch.zeros(1, 1)}
    changes = {"a": 1e8, "b": 1.0, "c": -1e8}  # single precision would lose b
    members = [
        replace(
            MEMBERS[0],
            client=name,
            task_vector=TaskVector(
                Kind.FULL, {"w.weight/delta": torch.full((1, 1), value)}, "pico@0"
            ),
        )
        for name, value in changes.items()
    ]
    theta_p = Pool(tuple(members)).compose(theta_0)
    assert float(theta_p["w.weight"]) == pytest.approx(1 / 3, rel=1e-6)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_in_which_clients_came_changes_no_bit(order):
    pool = Pool(tuple(MEMBERS[index] for index in order))
    shuffled = dict(reversed(UNEQUAL.items()))
    assert pool.clients == POOL.clients
    assert_bits(pool.compose(THETA_0, shuffled), POOL.compose(THETA_0, UNEQUAL))


@pytest.mark.parametrize("kind", MIXABLE)
@pytest.mark.parametrize("name", ["a-first", "client-1b", "z-last"])
def test_removing_a_client_equals_never_adding_it(kind, name):
    guest = contribution(name, kind, theta_0=ADAPTED, seed=90)
    joined = Pool((*POOL, guest))
    assert not torch.equal(
        joined.compose(THETA_0)["blocks.0.mlp.fc1.weight"],
        POOL.compose(THETA_0)["blocks.0.mlp.fc1.weight"],
    )
    left = joined.without(name)
    assert left.clients == POOL.clients
    assert_bits(left.compose(THETA_0), POOL.compose(THETA_0))


def test_a_pool_of_some_clients_composes_as_if_there_were_no_others():
    assert POOL.only("client-2").clients == ("client-2",)
    assert_bits(
        POOL.only("client-2", "client-0").compose(THETA_0),
        Pool((MEMBERS[0], MEMBERS[2])).compose(THETA_0),
    )


def test_a_pool_of_one_gives_the_clients_own_model():
    theta_p = POOL.only("client-1").compose(THETA_0)
    for name, change in dense_by_hand(MEMBERS[1].task_vector, ADAPTED).items():
        torch.testing.assert_close(theta_p[name].double(), THETA_0[name] + change)


def test_operations_leave_the_pool_they_start_from_as_it_is():
    POOL.without("client-0")
    POOL.only("client-0")
    assert POOL.clients == ("client-0", "client-1", "client-2")
    assert len(POOL) == 3
    assert [c.client for c in POOL] == list(POOL.clients)


@pytest.mark.parametrize("operation", [Pool.only, Pool.without])
def test_an_unknown_client_is_refused_and_the_nearest_is_suggested(operation):
    with pytest.raises(ContributionError, match=r"no client 'clint-1'.* Did you mean 'client-1'\?"):
        operation(POOL, "clint-1")
    with pytest.raises(ContributionError, match=r"which holds nobody\.$"):
        operation(Pool(), "zebra")


def test_a_client_cannot_contribute_twice():
    with pytest.raises(ContributionError, match="client-1 are in the pool already"):
        Pool((*POOL, contribution("client-1")))


def test_an_empty_pool_cannot_be_composed():
    for pool in (Pool(), POOL.without(*POOL.clients)):
        with pytest.raises(ContributionError, match="empty pool"):
            pool.compose(THETA_0)


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ({}, "given for nobody"),
        ({"client-0": 0.5, "client-1": 0.5}, "expected exactly client-0, client-1, client-2"),
        ({**UNEQUAL, "client-3": 0.0}, "expected exactly"),
        ({**UNEQUAL, "client-0": 0.6}, "sum 1.1"),
        ({**UNEQUAL, "client-0": 0.4999}, "sum to 1"),
        ({"client-0": 1.5, "client-1": -0.5, "client-2": 0.0}, ">= 0"),
        ({**UNEQUAL, "client-0": float("nan")}, "sum to 1"),
        ({**UNEQUAL, "client-0": float("inf")}, "sum to 1"),
        ({**UNEQUAL, "client-0": float("inf"), "client-1": -float("inf")}, "sum to 1"),
    ],
)
def test_coefficients_that_are_no_weighted_mean_of_the_clients_are_refused(coefficients, message):
    with pytest.raises(ContributionError, match=message):
        POOL.compose(THETA_0, coefficients)


def test_coefficients_are_equal_unless_given():
    assert POOL.check_composable(None) == pytest.approx(dict.fromkeys(POOL.clients, 1 / 3))


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8))
def test_equal_shares_and_shares_of_examples_pass_the_pools_own_check(examples):
    member = MEMBERS[2]
    pool = Pool(
        tuple(replace(member, client=str(i), num_examples=n) for i, n in enumerate(examples))
    )
    pool.compose(ADAPTED)
    pool.compose(ADAPTED, {str(i): n / sum(examples) for i, n in enumerate(examples)})


def test_averaging_the_factors_of_loras_separately_is_something_else():
    members = [contribution(f"c{i}", theta_0=ADAPTED, seed=30 * i) for i in range(4)]
    theta_p = Pool(tuple(members)).compose(ADAPTED)
    for name in ADAPTED:
        a, b = (
            torch.stack([c.task_vector.tensors[f"{name}/{part}"] for c in members]).mean(0)
            for part in "AB"
        )
        right = theta_p[name] - ADAPTED[name]
        assert (b @ a - right).norm() > 0.5 * right.norm()


def test_contributions_on_different_backbones_are_refused_and_both_named():
    ours, theirs = contribution("a", "full"), contribution("b", "full")
    other = replace(theirs.task_vector, base="other@2")
    with pytest.raises(BackboneMismatch, match=rf"other@2.*{ours.task_vector.base}"):
        Pool((ours, replace(theirs, task_vector=other)))


def test_composing_on_another_backbone_is_refused():
    pool = Pool((contribution("a", "full"),))
    with pytest.raises(BackboneMismatch, match=r"other@2"):
        pool.check_composable(None, base="other@2")
