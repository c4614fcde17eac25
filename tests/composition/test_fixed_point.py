"""Sums that can be taken apart again: held against Python's integers and fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from builders import KINDS, normal, task_vector
from hypothesis import given
from hypothesis import strategies as st
from registry_builders import exact_delta, exact_term
from torch import Tensor

from fedcompo.composition import fixed_point, products
from fedcompo.composition.fixed_point import BITS, CEILING, GRID, LARGEST
from fedcompo.config.choices import Kind
from fedcompo.errors import ContributionError
from fedcompo.method.task_vector import TaskVector

NAME = "w"
WEIGHT = normal(5, 4, seed=1, dtype=torch.float32)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

floats = st.floats(-2, 2, width=32)
sums = st.integers(-CEILING + 1, CEILING - 1)


def full(values: list[float], dtype: torch.dtype = torch.float64) -> tuple[TaskVector, Tensor]:
    """A task vector of one row, and the weight it changes."""
    delta = torch.tensor([values], dtype=dtype)
    return TaskVector(Kind.FULL, {f"{NAME}/delta": delta}, "b"), torch.zeros(1, len(values))


def lora(a: Tensor, b: Tensor) -> tuple[TaskVector, Tensor]:
    vector = TaskVector(Kind.LORA, {f"{NAME}/A": a, f"{NAME}/B": b}, "b")
    return vector, torch.zeros(b.shape[0], a.shape[1])


def rounded(vector: TaskVector, weight: Tensor) -> Tensor:
    return fixed_point.rounded(vector, NAME, weight, owner="client 'ada'")


# -- the change of a weight -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_delta_has_the_roundings_it_states_and_no_others(kind, dtype):
    vector = task_vector(kind, {NAME: WEIGHT}, seed=3)
    stored = {name: tensor.to(dtype) for name, tensor in vector.tensors.items()}
    vector = TaskVector(kind, stored, "b")
    actual = fixed_point.reproducible_delta(vector, NAME, WEIGHT)
    assert actual.dtype == torch.float64
    assert actual.tolist() == exact_delta(vector, NAME, WEIGHT)  # a float equals its fraction


@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=6))
def test_a_lora_rounds_once_a_rank_in_their_order(pairs):
    b, a = torch.tensor([[b for b, _ in pairs]]), torch.tensor([[a] for _, a in pairs])
    vector, weight = lora(a, b)
    expected = Fraction(0)
    for x, y in pairs:
        expected = Fraction(float(expected + Fraction(x) * Fraction(y)))
    assert fixed_point.reproducible_delta(vector, NAME, weight).item() == expected


@pytest.mark.parametrize("rank", [16, 300])
def test_a_lora_of_any_rank_is_summed_in_order_as_no_matrix_product_promises(rank):
    b, a = normal(9, rank, seed=1, dtype=torch.float32), normal(rank, 7, seed=2).float()
    actual = fixed_point.reproducible_delta(lora(a, b)[0], NAME, torch.zeros(9, 7))
    rows, columns = b.tolist(), a.T.tolist()
    for i, j in product(range(9), range(7)):
        expected = 0.0  # Python's floats are float64; products of two float32 are exact in it
        for x, y in zip(rows[i], columns[j], strict=True):
            expected += x * y
        assert actual[i, j].item() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_delta_is_the_same_bits_for_any_number_of_threads(kind):
    weight = normal(256, 160, seed=1, dtype=torch.float32)
    vector = task_vector(kind, {NAME: weight}, seed=2)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(fixed_point.reproducible_delta(vector, NAME, weight))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_the_change_is_that_of_training_but_for_float32(kind):
    vector = task_vector(kind, {NAME: WEIGHT}, seed=3)
    actual = fixed_point.reproducible_delta(vector, NAME, WEIGHT)
    torch.testing.assert_close(actual.float(), vector.delta(NAME, WEIGHT), rtol=1e-5, atol=1e-6)


# -- rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_form_is_the_nearest_multiple_of_the_grid(kind):
    vector = task_vector(kind, {NAME: WEIGHT}, seed=3)
    assert rounded(vector, WEIGHT).tolist() == exact_term(vector, NAME, WEIGHT)


@given(st.lists(st.floats(-LARGEST, LARGEST), min_size=1, max_size=8))
def test_any_value_in_range_is_rounded_half_to_even(values):
    assert rounded(*full(values)).tolist() == [[round(Fraction(v) * 2**BITS) for v in values]]


def test_ties_go_to_even_so_that_opposite_changes_cancel():
    halves = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5]
    vector, weight = full([half * GRID for half in halves])
    assert rounded(vector, weight).tolist() == [[0, 2, 2, 0, -2, -2]]


@pytest.mark.parametrize("value", [LARGEST, -LARGEST])
def test_the_largest_value_is_taken(value):
    assert rounded(*full([value])).item() == value * 2**BITS


@pytest.mark.parametrize(
    "value", [math.nextafter(LARGEST, math.inf), -2 * LARGEST, math.inf, -math.inf, math.nan]
)
def test_a_value_beyond_the_range_is_refused_with_whose_it_is(value):
    with pytest.raises(ContributionError, match=r"client 'ada' changes 'w' by .*at most 1024"):
        rounded(*full([0.0, value]))


def test_a_lora_that_overflows_is_refused():
    with pytest.raises(ContributionError, match="client 'ada'"):
        rounded(*lora(torch.full((1, 2), 1e30), torch.full((3, 1), 1e30)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_leaves_the_task_vector_as_it_was(kind, dtype):
    vector = task_vector(kind, {NAME: WEIGHT}, seed=3)
    vector = TaskVector(kind, {n: t.to(dtype) for n, t in vector.tensors.items()}, "b")
    before = {name: tensor.clone() for name, tensor in vector.tensors.items()}
    rounded(vector, WEIGHT)
    assert all(torch.equal(vector.tensors[name], before[name]) for name in before)


def test_a_weight_without_elements_has_an_empty_sum():
    vector = TaskVector(Kind.FULL, {f"{NAME}/delta": torch.zeros(0, 4)}, "b")
    term = rounded(vector, torch.zeros(0, 4))
    assert fixed_point.add(torch.zeros(0, 4, dtype=torch.int64), term, 3).shape == (0, 4)


# -- piece by piece -------------------------------------------------------------------------------

WIDE = normal(70, 40, seed=5, dtype=torch.float32)


@pytest.fixture(params=[1, 40, 100, 2799, 2800, 10**6])
def piece(request, monkeypatch):
    monkeypatch.setattr(products, "PIECE", request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_any_size_make_the_whole(kind, piece):
    vector = task_vector(kind, {NAME: WIDE}, seed=6)
    whole = fixed_point.reproducible_delta(vector, NAME, WIDE)
    term = fixed_point.rounded(vector, NAME, WIDE, owner="x")
    assert torch.equal(term, whole.mul(2.0**BITS).round().long())
    composed = fixed_point.compose(WIDE, term, factor=0.7)
    expected = (term.double() * (0.7 * GRID) + WIDE.double()).float()
    assert torch.equal(composed, expected)


@pytest.mark.parametrize("row", [0, 35, 69])
def test_no_piece_escapes_the_check(row, piece):
    delta = torch.zeros(70, 40)
    delta[row, 7] = -2 * LARGEST
    with pytest.raises(ContributionError, match="by 2048"):
        rounded(TaskVector(Kind.FULL, {f"{NAME}/delta": delta}, "b"), WIDE)


# -- adding ---------------------------------------------------------------------------------------


@given(sums, sums, st.integers(-(2**40), 2**40))
def test_a_sum_is_that_of_whole_numbers_or_refused_never_wrapped(total, term, times):
    exact = total + times * term
    found: int | None
    try:
        found = fixed_point.add(torch.tensor([total]), torch.tensor([term]), times).item()
    except ContributionError:
        found = None
    fits = max(abs(term), 1) * abs(times) < CEILING and (times <= 0 or abs(exact) < CEILING)
    assert found == (exact if fits else None)


@pytest.mark.parametrize("times", [2**62, -(2**80), 10**30])
def test_an_absurd_count_is_refused_even_of_nothing(times):
    with pytest.raises(ContributionError, match="leaves the range of the running sum"):
        fixed_point.add(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), times)


def test_too_large_a_sum_is_refused_and_says_what_to_do():
    near = torch.tensor([CEILING - 1])
    with pytest.raises(ContributionError, match="split the registry"):
        fixed_point.add(near, torch.tensor([1]), 1)
    with pytest.raises(ContributionError, match=r"counted 4096 times .*`coefficients = uniform`"):
        fixed_point.add(torch.zeros(1, dtype=torch.int64), torch.tensor([2**50]), 4096)


@given(st.permutations(range(5)), st.sampled_from((1, 7, 1000)))
def test_terms_come_and_go_in_any_order(order, times):
    terms = [rounded(*full(normal(6, seed=i, scale=10).tolist())) for i in range(5)]
    total = torch.zeros(1, 6, dtype=torch.int64)
    for index in order:
        total = fixed_point.add(total, terms[index], times + index)
    for index in order[:2]:
        total = fixed_point.add(total, terms[index], -(times + index))
    expected = sum((times + i) * terms[i] for i in order[2:])
    assert torch.equal(total, expected)


# -- composing ------------------------------------------------------------------------------------


@given(
    st.floats(-3, 3, width=32),
    st.integers(-(2**52), 2**52),
    st.integers(1, 10**6),
    st.floats(0, 10),
)
def test_a_composed_weight_is_the_stated_sum_rounded(weight, total, count, scale):
    factor = scale / count
    actual = fixed_point.compose(torch.tensor([[weight]]), torch.tensor([[total]]), factor=factor)
    assert actual.dtype == torch.float32
    # bit for bit: float64 throughout, float32 once at the end
    assert actual.item() == np.float32(float(total) * (factor * GRID) + weight)
    # and the exact value, but for that
    exact = Fraction(weight) + Fraction(factor) * total / 2**BITS
    ulp = math.ulp(float(np.float32(float(exact)))) * 2.0**29  # float32's, from float64's
    assert abs(Fraction(actual.item()) - exact) <= Fraction(ulp) * Fraction(51, 100) + Fraction(
        1, 2**149
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_composed_weight_keeps_its_dtype(dtype):
    weight = WEIGHT.to(dtype)
    same = fixed_point.compose(weight, torch.zeros(5, 4, dtype=torch.int64), factor=2.0)
    assert same.dtype == dtype
    assert torch.equal(same, weight)


def test_the_grid_is_far_finer_than_float32_at_a_weight():
    assert math.ulp(np.float32(0.01).item()) * 2.0**29 > 100 * GRID
