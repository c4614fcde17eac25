"""Lengths of task vectors that are not rounded, held against those that are."""

from __future__ import annotations

import math

import pytest
import torch
from builders import KINDS, normal, task_vector
from registry_builders import exact_term

from fedcompo.composition import fixed_point, lengths
from fedcompo.composition.products import GRID
from fedcompo.config.choices import Kind
from fedcompo.errors import ContributionError
from fedcompo.method.task_vector import TaskVector

NAME, OWNER = "w", "client 'ada'"
WEIGHT = normal(24, 20, seed=1, dtype=torch.float32)


def near(vector: TaskVector, weight: torch.Tensor = WEIGHT) -> float:
    return lengths.squared_near(vector, NAME, weight, owner=OWNER)


def lora(b: torch.Tensor, a: torch.Tensor) -> TaskVector:
    return TaskVector(Kind.LORA, {f"{NAME}/A": a, f"{NAME}/B": b}, "b")


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_length_is_that_of_the_exact_whole_numbers(kind, size):
    vector = task_vector(kind, {NAME: WEIGHT}, seed=3)
    scaled = {
        name: 1 + size * (tensor - 1) if kind is Kind.IA3 else tensor * math.sqrt(size)
        for name, tensor in vector.tensors.items()
    }
    vector = TaskVector(kind, scaled, "b")
    whole = [number for row in exact_term(vector, NAME, WEIGHT) for number in row]
    exact = sum(number * number for number in whole) * GRID**2  # Python's integers
    margin = lengths.NEAR if kind is Kind.LORA else 1e-14
    assert near(vector) == pytest.approx(exact, rel=margin)
    assert (near(vector) == 0) == (exact == 0)


def test_of_a_dense_change_it_is_the_same_float():
    values = 1e-3 * normal(600, 700, seed=2, dtype=torch.float32)
    vector = TaskVector(Kind.FULL, {f"{NAME}/delta": values}, "b")
    rounded = fixed_point.rounded(vector, NAME, values, owner=OWNER)
    assert near(vector, values) == lengths.squared_length(rounded)
    turned = TaskVector(Kind.FULL, {f"{NAME}/delta": values.T.contiguous().T}, "b")
    assert near(turned, values) == pytest.approx(near(vector, values), rel=1e-14)


def test_factors_that_cancel_out_have_no_length():
    column, row = normal(24, 1, seed=4), normal(1, 20, seed=5)
    vector = lora(torch.cat([column, -column], 1), torch.cat([row, row]))
    assert near(vector) == 0
    almost = lora(torch.cat([column, -column], 1), torch.cat([row, row * (1 + 2**-12)]))
    rounded = fixed_point.rounded(almost, NAME, WEIGHT, owner=OWNER)
    assert near(almost) == pytest.approx(lengths.squared_length(rounded), rel=lengths.NEAR)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_what_cannot_be_rounded_has_no_length_either(bad):
    b, a = normal(24, 2, seed=6), normal(2, 20, seed=7)
    b[3, 1] = bad
    with pytest.raises(ContributionError, match="ada"):
        near(lora(b, a))


def test_a_newcomer_s_change_may_be_so_long_and_no_longer():
    weight = torch.ones(2, 2)  # norm 2: a change may be 20 long
    lengths.Rounding("ada").lengthen(NAME, 400.0, weight)
    lengths.Rounding().lengthen(NAME, 400.01, weight)  # no newcomer
    with pytest.raises(ContributionError, match="diverged"):
        lengths.Rounding("ada").lengthen(NAME, 400.01, weight)
