"""Row and column sums in place of a Fisher: what they keep, and that none of rank one is nearer."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from builders import normal, pico_weights, random_like
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedcompo.config.choices import FisherForm, Wire
from fedcompo.errors import ContributionError
from fedcompo.method.fisher import HEAD, FisherDiagonal
from fedcompo.privacy.factored import margins, outer, reduced, restored

THETA_0 = pico_weights(dtype=torch.float32)
NAME = next(iter(THETA_0))
SUMS = random_like(THETA_0, seed=1, positive=True) | {
    "head.weight": normal(2, 3, seed=8).square().float(),
    "head.bias": normal(2, seed=9).square().float(),
}
CLASSES = ("cat", "dog")
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def matrix(shape: tuple[int, int], seed: int) -> Tensor:
    """Positive and heavy-tailed, (out, in), float64."""
    return (3 * normal(*shape, seed=seed)).exp()


def by_hand(fisher: Tensor) -> Tensor:
    """Oracle: F̂_ij = r_i c_j / s, one number at a time, in Python's floats."""
    rows = [sum(row) for row in fisher.tolist()]
    columns = [sum(column) for column in fisher.T.tolist()]
    return torch.tensor([[r * c / sum(rows) for c in columns] for r in rows], dtype=torch.float64)


def divergence(fisher: Tensor, model: Tensor) -> float:
    """Generalised Kullback-Leibler divergence of positive matrices."""
    return float((fisher * (fisher / model).log() - fisher + model).sum())


@given(shapes, st.integers(0, 2**20))
def test_it_is_rows_times_columns_over_the_total(shape, seed):
    fisher = matrix(shape, seed)
    found = outer(*margins(fisher))
    torch.testing.assert_close(found.double(), by_hand(fisher), rtol=1e-6, atol=0)


@given(shapes, st.integers(0, 2**20))
def test_rows_columns_and_total_are_kept(shape, seed):
    fisher = matrix(shape, seed)
    found = outer(*margins(fisher)).double()
    for axis in (0, 1, (0, 1)):
        torch.testing.assert_close(found.sum(axis), fisher.sum(axis), rtol=1e-5, atol=0)


@given(shapes, st.integers(0, 2**20))
def test_a_fisher_of_rank_one_is_exact(shape, seed):
    fisher = torch.outer(matrix((shape[0], 1), seed)[:, 0], matrix((shape[1], 1), seed + 1)[:, 0])
    torch.testing.assert_close(outer(*margins(fisher)).double(), fisher, rtol=1e-6, atol=0)


@given(shapes, st.integers(0, 2**20), st.floats(1e-3, 2.0))
def test_no_other_of_rank_one_is_nearer_in_kullback_leibler(shape, seed, distance):
    fisher = matrix(shape, seed)
    best = by_hand(fisher)
    rows = best.sum(1) * (distance * normal(shape[0], seed=seed + 2)).exp()
    columns = best[0] / best.sum(1)[0] * (distance * normal(shape[1], seed=seed + 3)).exp()
    other, ours = torch.outer(rows, columns), outer(*margins(fisher)).double()
    slack = 1e-6 * float(fisher.sum())  # float32's rounding
    assert divergence(fisher, ours) <= divergence(fisher, other) + slack


def test_margins_that_differ_in_total_meet_at_the_geometric_mean():
    rows, columns = torch.tensor([1.0, 3.0]), torch.tensor([4.0, 5.0])  # totals 4 and 9
    found = outer(rows, columns)
    assert float(found.sum()) == pytest.approx(6.0)
    torch.testing.assert_close(found[1], 3 * found[0])


@pytest.mark.parametrize("zero", ["rows", "columns", "both"])
def test_margins_that_sum_to_zero_expand_to_zeros(zero):
    rows, columns = torch.ones(3) * (zero == "columns"), torch.ones(2) * (zero == "rows")
    assert outer(rows, columns).tolist() == [[0.0, 0.0]] * 3


# -- what leaves and what comes of it -----------------------------------------------------------


@pytest.mark.parametrize("form", FisherForm)
def test_what_is_expanded_can_anchor_and_keeps_the_heads_rows(form):
    sums = restored(reduced(SUMS, form), form, THETA_0, owner="client 'a'")
    FisherDiagonal(sums, 4, CLASSES).check(THETA_0, num_features=3, owner="client 'a'")
    assert all(torch.equal(sums[name], SUMS[name]) for name in HEAD)


def test_each_form_takes_less_than_the_one_before():
    dense, factored, head = (reduced(SUMS, form) for form in FisherForm)
    assert dense == SUMS
    assert {name: tuple(t.shape) for name, t in factored.items() if name not in HEAD} == {
        f"{name}{end}": (size,)
        for name, weight in THETA_0.items()
        for end, size in zip(("/rows", "/columns"), weight.shape, strict=True)
    }
    assert set(head) == set(HEAD)


def test_the_backbone_of_a_head_counts_as_zero():
    sums = restored(reduced(SUMS, FisherForm.HEAD), FisherForm.HEAD, THETA_0, owner="a")
    assert not any(sums[name].any() for name in THETA_0)


def test_sums_of_factored_fishers_are_sums_of_what_they_expand_to():
    """A sum of matrices of rank one is none: margins must not be added before they are expanded."""
    one, other = matrix((4, 5), 1), matrix((4, 5), 2)
    apart = outer(*margins(one)).double() + outer(*margins(other)).double()
    together = outer(*margins(one + other)).double()
    assert not torch.allclose(apart, together, rtol=0.01)
    assert torch.linalg.matrix_rank(apart, rtol=1e-5) == 2


PARTS = reduced(SUMS, FisherForm.FACTORED)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({f"{NAME}/rows": None}, "shape None"),
        ({f"{NAME}/rows": torch.ones(10**6)}, r"shape \(1000000,\)"),  # before it is expanded
        ({f"{NAME}/columns": torch.ones(2, 2)}, r"shape \(2, 2\)"),
        ({f"{NAME}/rows": -PARTS[f"{NAME}/rows"]}, "no value below zero"),
        ({f"{NAME}/rows": torch.full((6,), torch.nan)}, "no value below zero"),
        ({"other/rows": torch.ones(2)}, "'other/rows' that does not belong there"),
    ],
)
def test_margins_that_fit_no_weight_are_refused(change, complaint):
    parts = {name: t for name, t in (PARTS | change).items() if t is not None}
    with pytest.raises(ContributionError, match=complaint):
        restored(parts, FisherForm.FACTORED, THETA_0, owner="client 'a'")


def test_whoever_sends_the_head_alone_sends_nothing_else():
    with pytest.raises(ContributionError, match="does not belong there"):
        restored(SUMS, FisherForm.HEAD, THETA_0, owner="client 'a'")


def test_the_benchmark_sets_every_form_beside_the_exact_one(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    script = importlib.import_module("factored_fisher")
    options = ["--images", "2", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["factored_fisher.py", *options])
    script.main()
    _, _, *lines = capsys.readouterr().out.strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    forms = ["dense", "dense", "dense", "factored", "factored", "factored"]
    assert [row[:2] for row in rows] == [
        [form, str(wire)] for form, wire in zip(forms, 2 * list(Wire), strict=True)
    ]
    assert rows[0][3:] == ["0.00%", "1.0000", "1.000", "1.000", "1.000", "1.000"]
    sizes = [int(row[2].replace(",", "")) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert all(float(row[4]) > 0.9 for row in rows)
