"""Merges of task vectors, one entry at a time by hand, and where two of them must agree."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from builders import contribution, dense_by_hand, pico_weights, random_like

from fedcompo.config.choices import Kind
from fedcompo.errors import ContributionError
from fedcompo.method.contribution import Contribution
from fedcompo.method.deltas import Weights
from fedcompo.method.fisher import FisherDiagonal, expanded
from fedcompo.method.pool import Pool
from fedcompo.method.task_vector import TaskVector

sys.path.append(str(Path(__file__).resolve().parents[2] / "simulations" / "compare"))
merging = import_module("merging")

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


def with_change(member: Contribution, change: Weights) -> Contribution:
    """The same client with another task vector, dense."""
    tensors = {f"{name}/delta": change[name] for name in change}
    return replace(member, task_vector=TaskVector(Kind.FULL, tensors, member.task_vector.base))


def with_mean_fisher(member: Contribution, mean: Weights) -> Contribution:
    """The same client with a Fisher of this mean: its sum grows with its examples."""
    count = member.num_examples
    sums = {name: count * value for name, value in mean.items()}
    return replace(member, fisher=FisherDiagonal(sums, count))


def entries(theta_0: Weights) -> Iterator[Entry]:
    for name, weight in theta_0.items():
        for i in range(weight.shape[0]):
            for j in range(weight.shape[1]):
                yield name, i, j


def changes_of(pool: Pool) -> list[dict[Entry, float]]:
    """Every client's task vector, one number an entry."""
    dense = [dense_by_hand(member.task_vector, THETA_0) for member in pool]
    return [{(n, i, j): float(tau[n][i, j]) for n, i, j in entries(THETA_0)} for tau in dense]


def assert_changed_by(actual: Weights, expected: dict[Entry, float]) -> None:
    for name, i, j in entries(THETA_0):
        wanted = float(THETA_0[name][i, j]) + expected[name, i, j]
        assert float(actual[name][i, j]) == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def assert_same(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)


# -- factors, each by itself ---------------------------------------------------------------------


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
    assert_changed_by(merging.average_factors(LORAS, THETA_0), expected)


def test_averaged_factors_are_the_mean_for_one_client_and_far_from_it_for_several():
    alone = LORAS.only("client-1")
    assert_same(merging.average_factors(alone, THETA_0), alone.compose(THETA_0))
    wrong, right = merging.average_factors(LORAS, THETA_0), LORAS.compose(THETA_0)
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
    assert_same(merging.average_factors(pool, THETA_0), pool.compose(THETA_0))


def test_only_loras_of_one_rank_have_factors_to_average():
    with pytest.raises(ContributionError, match=r"client-0.*kind full"):
        merging.average_factors(MIXED, THETA_0)
    first, *others = LORAS
    tensors = dict(others[0].task_vector.tensors)
    for name in THETA_0:
        tensors[f"{name}/A"] = tensors[f"{name}/A"][:1]
        tensors[f"{name}/B"] = tensors[f"{name}/B"][:, :1]
    narrow = replace(others[0], task_vector=replace(others[0].task_vector, tensors=tensors))
    with pytest.raises(ContributionError, match=r"client-1.*other ranks"):
        merging.average_factors(Pool((first, narrow)), THETA_0)


# -- TIES ----------------------------------------------------------------------------------------


def ties_by_hand(pool: Pool, density: float) -> dict[Entry, float]:
    """Oracle: sort, cut, vote, average."""
    trimmed = []
    for tau in changes_of(pool):
        order = sorted(tau, key=lambda at: -abs(tau[at]))
        kept = set(order[: round(density * len(order))])
        trimmed.append({at: value if at in kept else 0.0 for at, value in tau.items()})
    merged = {}
    for at in trimmed[0]:
        values = [tau[at] for tau in trimmed]
        elected = sum(values)
        agreeing = [value for value in values if value * elected > 0]
        merged[at] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return merged


@pytest.mark.parametrize("density", [0.1, 0.2, 0.6, 1.0])
def test_ties_trims_elects_and_averages_those_who_agree(density):
    expected = ties_by_hand(MIXED, density)
    assert_changed_by(merging.ties(MIXED, THETA_0, density=density), expected)
    if density < 1:
        assert 0.0 in expected.values()


def test_ties_trims_over_all_weights_together():
    """A client that changes one weight ten times as much keeps entries of that weight alone."""
    (member,) = members(Kind.FULL)
    first, second = THETA_0
    change = {first: torch.full((6, 4), 10.0).double(), second: torch.full((5, 4), 1.0).double()}
    merged = merging.ties(Pool((with_change(member, change),)), THETA_0, density=24 / 44)
    torch.testing.assert_close(merged[first], THETA_0[first] + 10)
    assert torch.equal(merged[second], THETA_0[second])


def test_ties_is_the_mean_where_nothing_is_trimmed_and_signs_agree():
    signs = {name: change.sign() for name, change in random_like(THETA_0, seed=3).items()}
    pool = Pool()
    for i, member in enumerate(members(Kind.FULL, Kind.FULL, Kind.FULL)):
        sizes = random_like(THETA_0, seed=10 * i, positive=True)
        pool = pool.add(with_change(member, {n: signs[n] * sizes[n] for n in sizes}))
    assert_same(merging.ties(pool, THETA_0, density=1.0), pool.compose(THETA_0))


def test_ties_leaves_a_weight_alone_that_clients_pull_equally_to_both_sides():
    change = random_like(THETA_0, seed=5)
    one, other = members(Kind.FULL, Kind.FULL)
    opposite = {name: -value for name, value in change.items()}
    pool = Pool((with_change(one, change), with_change(other, opposite)))
    assert_same(merging.ties(pool, THETA_0), THETA_0)


@pytest.mark.parametrize("density", [0.0, 1.5, float("nan")])
def test_ties_keeps_a_share(density):
    with pytest.raises(ValueError, match="density"):
        merging.ties(MIXED, THETA_0, density=density)


# -- weighted by Fishers -------------------------------------------------------------------------


def test_each_entry_is_weighted_by_the_clients_mean_fishers():
    taus, expected = changes_of(MIXED), {}
    for name, i, j in entries(THETA_0):
        shares = [float(c.fisher.sums[name][i, j]) / c.num_examples for c in MIXED]
        moved = sum(f * tau[name, i, j] for f, tau in zip(shares, taus, strict=True))
        expected[name, i, j] = moved / sum(shares)
    assert_changed_by(merging.fisher_weighted(MIXED, THETA_0), expected)


def test_a_factored_fisher_weighs_as_the_matrix_that_it_stands_for():
    factored = Pool(tuple(replace(c, fisher=c.fisher.reduced()) for c in MIXED))
    stand_ins = [expanded(c.fisher.mean(), THETA_0) for c in factored]
    dense = Pool(tuple(map(with_mean_fisher, MIXED, stand_ins)))
    actual, expected = (merging.fisher_weighted(pool, THETA_0) for pool in (factored, dense))
    for name in THETA_0:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-30, 2.5])
def test_equal_fishers_weight_equally_however_many_examples_they_sum(value):
    alike = {name: torch.full_like(weight, value) for name, weight in THETA_0.items()}
    pool = Pool(tuple(with_mean_fisher(member, alike) for member in MIXED))
    assert_same(merging.fisher_weighted(pool, THETA_0), pool.compose(THETA_0))


def test_a_client_that_alone_is_sensitive_has_its_way():
    zeros = {name: torch.zeros_like(weight) for name, weight in THETA_0.items()}
    first, *others = MIXED
    pool = Pool((first, *(with_mean_fisher(member, zeros) for member in others)))
    alone = MIXED.only(first.client).compose(THETA_0)
    assert_same(merging.fisher_weighted(pool, THETA_0), alone)


def test_who_sent_no_fisher_is_named():
    first, second, *_ = MIXED
    with pytest.raises(ContributionError, match=r"client-1.*keep-fisher"):
        merging.fisher_weighted(Pool((first, replace(second, fisher=None))), THETA_0)


# -- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(merging.MERGES))
def test_weights_that_nobody_changes_stay_and_dtypes_do(name):
    half = {n: weight.bfloat16() for n, weight in UNTOUCHED.items()}
    before = {n: weight.clone() for n, weight in half.items()}
    adapted = {n: half[n] for n in THETA_0}
    pool = Pool(tuple(members(Kind.LORA, Kind.LORA, theta_0=adapted)))
    merged = merging.MERGES[name](pool, half)
    assert {n: w.dtype for n, w in merged.items()} == {n: w.dtype for n, w in half.items()}
    assert torch.equal(merged["blocks.1.untouched.weight"], half["blocks.1.untouched.weight"])
    assert all(not torch.equal(merged[n], half[n]) for n in THETA_0)
    assert all(torch.equal(half[n], before[n]) for n in half)


@pytest.mark.parametrize("name", list(merging.MERGES))
def test_there_is_nothing_to_merge_in_an_empty_pool(name):
    with pytest.raises(ContributionError, match="empty pool"):
        merging.MERGES[name](Pool(), THETA_0)
