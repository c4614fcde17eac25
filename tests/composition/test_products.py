"""Certified products: the bits of the slow sum over ranks in order, whatever the factors are."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from builders import normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedcompo.composition import fixed_point, products
from fedcompo.composition.fixed_point import LARGEST, Term
from fedcompo.composition.lengths import Rounding
from fedcompo.composition.products import BITS, GRID, UNSURE, Factors
from fedcompo.config.choices import Kind
from fedcompo.errors import ContributionError
from fedcompo.method.task_vector import TaskVector

NAME = "w"
RANKS = (1, 2, 16, 48, 64, 200)


def in_order(b: Tensor, a: Tensor) -> Tensor:
    """The definition: float64, one rank after the other, then to the nearest of the grid."""
    total = torch.zeros(len(b), a.shape[1], dtype=torch.float64)
    for rank in range(len(a)):
        total += b[:, rank : rank + 1].float().double() * a[rank].float().double()
    return total.mul(2.0**BITS).round().long()


def lora(b: Tensor, a: Tensor) -> TaskVector:
    return TaskVector(Kind.LORA, {f"{NAME}/A": a, f"{NAME}/B": b}, "b")


def drawn(rank: int, *, seed: int = 0, scale: float = 0.05) -> tuple[Tensor, Tensor]:
    b = normal(90, rank, seed=seed, dtype=torch.float32) * scale
    return b, normal(rank, 70, seed=seed + 1, dtype=torch.float32) * scale


def cancelling(rank: int) -> tuple[Tensor, Tensor]:
    """Half of the ranks take back the other half, but for the last bits."""
    b, a = drawn(rank, scale=0.1)
    return torch.cat([b, -b], 1), torch.cat([a, a * (1 + 2.0**-23)])


def ties(rank: int) -> tuple[Tensor, Tensor]:
    """All entries are odd multiples of half the grid, and all sums are exact."""
    b = torch.zeros(90, rank)
    b[:, 0] = 2.0**-20 * (2 * torch.arange(90) - 89)
    return b, torch.full((rank, 70), 2.0**-21)


def near_ties(rank: int) -> tuple[Tensor, Tensor]:
    """As ties, but each is moved by far less than a product's error, up or down."""
    b, a = ties(rank + 1)
    b[:, -1], a[-1] = 2.0**-60, 2.0**-60 * torch.arange(-35, 35).sign()
    return b, a


def absorbed(rank: int) -> tuple[Tensor, Tensor]:
    """Ranks of 2^-54 of the first, so that what is left of them depends on the order."""
    b, a = ties(rank + 1)
    b[:, 1:], a[1:] = 2.0**-27, 2.0**-27 * normal(rank, 70, seed=3).float().sign() * b[0, 0].abs()
    return b, a


CASES = {
    "drawn": drawn,
    "cancelling": cancelling,
    "ties": ties,
    "near ties": near_ties,
    "absorbed": absorbed,
    "tiny": lambda rank: drawn(rank, scale=1e-9),
    "subnormal": lambda rank: drawn(rank, scale=1e-42),
    "one subnormal": lambda rank: (drawn(rank)[0], drawn(rank, scale=1e-42)[1]),
    "uneven": lambda rank: tuple(x * torch.logspace(-30, 0, len(x))[:, None] for x in drawn(rank)),
    "at the limit": lambda rank: drawn(rank, scale=math.sqrt(0.3 / rank)),
    "too large to be sure": lambda rank: drawn(rank, scale=2.0),
    "zero": lambda rank: (torch.zeros(90, rank), drawn(rank)[1]),
    "bfloat16": lambda rank: tuple(factor.bfloat16() for factor in drawn(rank)),
    "float64, taken as float32": lambda rank: tuple(f.double() * (1 + 1e-9) for f in drawn(rank)),
}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_a_product_has_the_bits_of_the_sum_in_order(case, rank):
    b, a = CASES[case](rank)
    actual = fixed_point.rounded(lora(b, a), NAME, torch.zeros(90, 70), owner="x")
    assert torch.equal(actual, in_order(b, a))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_the_error_that_is_stated_is_one(case, rank):
    b, a = CASES[case](rank)
    factors = Factors.of(b, a)
    exact = [
        [sum(Fraction(x) * Fraction(y) for x, y in zip(row, column, strict=True)) for column in cs]
        for row in factors.b[:8].tolist()
        for cs in [factors.a.T[:8].tolist()]
    ]
    ordered = torch.zeros(8, 8, dtype=torch.float64)
    for rank in range(len(factors.a)):
        ordered += factors.b[:8, rank : rank + 1] * factors.a[rank, :8]
    product = factors.b @ factors.a
    for i, row in enumerate(exact):
        for j, value in enumerate(row):
            both = Fraction(ordered[i, j].item()), Fraction(product[i, j].item())
            assert all(abs(own - value) <= Fraction(factors.error) / 2 for own in both)
            assert abs(both[0]) <= Fraction(factors.peak) * (1 + Fraction(1, 10**9))


def test_both_ways_are_taken():
    sure = {case: Factors.of(*CASES[case](16)).error <= UNSURE for case in CASES}
    assert sure["drawn"] and sure["ties"] and not sure["too large to be sure"]


def test_ties_are_found_and_summed_in_order(monkeypatch):
    """Of values that lie on ties, none is sure; of those drawn at random, almost all are."""
    counts = []
    original = Factors.ordered

    def ordered(self, rows, columns):
        counts.append(len(rows))
        return original(self, rows, columns)

    monkeypatch.setattr(Factors, "ordered", ordered)
    for case in (ties, drawn):
        fixed_point.rounded(lora(*case(16)), NAME, torch.zeros(90, 70), owner="x")
    assert counts[0] == 90 * 70
    assert counts[1] < 70


@given(
    st.lists(
        st.tuples(*2 * [st.floats(-1, 1, width=32, allow_subnormal=True)]), min_size=1, max_size=9
    )
)
def test_any_entry_has_the_bits_of_the_sum_in_order(pairs):
    b, a = torch.tensor([[b for b, _ in pairs]]), torch.tensor([[a] for _, a in pairs])
    actual = fixed_point.rounded(lora(b, a), NAME, torch.zeros(1, 1), owner="x")
    assert torch.equal(actual, in_order(b, a))


@pytest.mark.parametrize("piece", [1, 70, 1000, 10**6])
@pytest.mark.parametrize("times", [(1,) * 11, (3, 3, 3, 1, 1, -2, -2, 5, -1, -1, 700)])
def test_a_sum_of_all_kinds_is_that_of_each_rounded_alone(times, piece, monkeypatch):
    monkeypatch.setattr(products, "PIECE", piece)
    weight, start = normal(90, 70, seed=9).float(), torch.arange(6300).view(90, 70) - 3000
    made = [
        CASES[case](rank)
        for case, rank in zip([*CASES][:8], (1, 2, 5, 16, 16, 48, 3, 9), strict=True)
    ]
    vectors = [lora(*factors) for factors in made]
    delta = normal(90, 70, seed=8, dtype=torch.float32)
    vectors.insert(2, TaskVector(Kind.FULL, {f"{NAME}/delta": delta}, "b"))
    vectors.insert(3, TaskVector(Kind.TANGENT, {f"{NAME}/delta": delta.half()}, "b"))
    vectors.insert(4, TaskVector(Kind.IA3, {f"{NAME}/l": normal(90, 1, seed=7).float()}, "b"))
    terms = [Term(str(i), v, m) for i, (v, m) in enumerate(zip(vectors, times, strict=True))]
    exact = [
        fixed_point.reproducible_delta(v, NAME, weight).mul(2.0**BITS).round() for v in vectors
    ]
    before = start.clone()
    roundings = [Rounding() for _ in terms]
    expected = start + sum(m * own.long() for m, own in zip(times, exact, strict=True))
    assert torch.equal(fixed_point.sum_of(terms, NAME, weight, start=start), expected)
    alone = fixed_point.sum_of(terms, NAME, weight, start=start, roundings=roundings)
    assert torch.equal(alone, expected)
    assert torch.equal(start, before)
    for rounding, own in zip(roundings, exact, strict=True):
        assert rounding.squared == pytest.approx(float(own.square().sum()) * GRID**2, rel=1e-12)
        assert rounding.sha256 == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("where", ["A", "B"])
def test_a_factor_without_a_bound_is_refused_with_whose_it_is(where, value):
    vectors = {c: lora(*drawn(4, seed=i)) for i, c in enumerate("abc")}
    vectors["b"].tensors[f"{NAME}/{where}"][1, 1] = value
    terms = [Term(client, vector, 1) for client, vector in vectors.items()]
    match = r"client 'b' changes 'w' by .*at most 1024"
    with pytest.raises(ContributionError, match=match) as error:
        fixed_point.sum_of(terms, NAME, torch.zeros(90, 70))
    assert error.value.client == "b"


def test_a_sum_that_may_leave_the_range_is_looked_at_and_refused_only_if_it_does():
    row = torch.tensor([[LARGEST, -LARGEST, 0.0]])
    vector = TaskVector(Kind.FULL, {f"{NAME}/delta": row}, "b")
    weight = torch.zeros(1, 3)
    terms = [Term(client, vector, 2000) for client in "ab"]  # 2^62 is 4096 times the largest
    back = TaskVector(Kind.FULL, {f"{NAME}/delta": -row}, "b")
    cancelled = [terms[0], Term("z", back, 2000), terms[1], terms[0]]
    total = fixed_point.sum_of(cancelled, NAME, weight)
    assert total.tolist() == [[4000 * 2**50, -4000 * 2**50, 0]]
    with pytest.raises(ContributionError, match="split the registry"):
        fixed_point.sum_of([*cancelled, terms[0]], NAME, weight)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_a_weight_without_elements_has_an_empty_sum(shape):
    vector = lora(torch.zeros(shape[0], 1), torch.zeros(1, shape[1]))
    assert fixed_point.sum_of([Term("a", vector, 1)], NAME, torch.zeros(shape)).shape == shape
