"""One-shot means of A and of B, one entry at a time by hand: what they are, and are not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from builders import contribution, pico_weights

from fedcompo.config.choices import Kind
from fedcompo.errors import ContributionError
from fedcompo.method.contribution import Contribution
from fedcompo.method.deltas import Weights
from fedcompo.method.pool import Pool

sys.path.append(str(Path(__file__).resolve().parents[2] / "simulations" / "compare"))
average_factors = import_module("average_factors").average_factors

THETA_0 = pico_weights()
UNTOUCHED = {**THETA_0, "blocks.1.untouched.weight": torch.ones(2, 2, dtype=torch.float64)}
Entry = tuple[str, int, int]


def members(*kinds: Kind, theta_0: Weights = THETA_0) -> list[Contribution]:
    """Contributions of unequal sizes, each with a Fisher of its own."""
    return [
        contribution(f"client-{i}", kind, theta_0=theta_0, seed=100 * i, num_examples=10 + 7 * i)
        for i, kind in enumerate(kinds)
    ]


MIXED = Pool(tuple(members(Kind.FULL, Kind.LORA, Kind.IA3, Kind.LORA)))
LORAS = Pool(tuple(members(Kind.LORA, Kind.LORA, Kind.LORA)))


def entries(theta_0: Weights) -> Iterator[Entry]:
    for name, weight in theta_0.items():
        for i in range(weight.shape[0]):
            for j in range(weight.shape[1]):
                yield name, i, j


def assert_changed_by(actual: Weights, expected: dict[Entry, float]) -> None:
    for name, i, j in entries(THETA_0):
        wanted = float(THETA_0[name][i, j]) + expected[name, i, j]
        assert float(actual[name][i, j]) == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def assert_same(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)


def test_averaged_factors_are_the_product_of_means():
    expected = {}
    for name, i, j in entries(THETA_0):
        factors = [member.task_vector.tensors for member in LORAS]
        rank = factors[0][f"{name}/A"].shape[0]
        expected[name, i, j] = sum(
            sum(float(f[f"{name}/B"][i, r]) for f in factors)
            / len(LORAS)
            * sum(float(f[f"{name}/A"][r, j]) for f in factors)
            / len(LORAS)
            for r in range(rank)
        )
    assert_changed_by(average_factors(LORAS, THETA_0), expected)


def test_averaged_factors_are_the_mean_for_one_client_and_far_from_it_for_several():
    alone = LORAS.only("client-1")
    assert_same(average_factors(alone, THETA_0), alone.compose(THETA_0))
    wrong, right = average_factors(LORAS, THETA_0), LORAS.compose(THETA_0)
    for name, weight in THETA_0.items():
        assert (wrong[name] - right[name]).norm() > 0.2 * (right[name] - weight).norm()


def test_averaged_factors_are_the_mean_where_all_share_one_a():
    first = LORAS.contributions[0].task_vector.tensors
    shared = {name: tensor for name, tensor in first.items() if name.endswith("/A")}
    alike = []
    for member in LORAS:
        vector = replace(member.task_vector, tensors={**member.task_vector.tensors, **shared})
        alike.append(replace(member, task_vector=vector))
    pool = Pool(tuple(alike))
    assert_same(average_factors(pool, THETA_0), pool.compose(THETA_0))


def test_only_loras_of_one_rank_have_factors_to_average():
    with pytest.raises(ContributionError, match=r"client-0.*kind full"):
        average_factors(MIXED, THETA_0)
    first, *others = LORAS
    tensors = dict(others[0].task_vector.tensors)
    for name in THETA_0:
        tensors[f"{name}/A"] = tensors[f"{name}/A"][:1]
        tensors[f"{name}/B"] = tensors[f"{name}/B"][:, :1]
    narrow = replace(others[0], task_vector=replace(others[0].task_vector, tensors=tensors))
    with pytest.raises(ContributionError, match=r"client-1.*other ranks"):
        average_factors(Pool((first, narrow)), THETA_0)


def test_weights_that_nobody_changes_stay_and_dtypes_do():
    half = {n: weight.bfloat16() for n, weight in UNTOUCHED.items()}
    before = {n: weight.clone() for n, weight in half.items()}
    adapted = {n: half[n] for n in THETA_0}
    pool = Pool(tuple(members(Kind.LORA, Kind.LORA, theta_0=adapted)))
    merged = average_factors(pool, half)
    assert {n: w.dtype for n, w in merged.items()} == {n: w.dtype for n, w in half.items()}
    assert torch.equal(merged["blocks.1.untouched.weight"], half["blocks.1.untouched.weight"])
    assert all(not torch.equal(merged[n], half[n]) for n in THETA_0)
    assert all(torch.equal(half[n], before[n]) for n in half)


def test_there_is_nothing_to_average_in_an_empty_pool():
    with pytest.raises(ContributionError, match="empty pool"):
        average_factors(Pool(), THETA_0)
