"""Fisher diagonals as values: sums, differences, means; dense, as margins, and on a grid."""

from __future__ import annotations

import pytest
import torch
from builders import normal, pico_weights, random_like
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedcompo.config.choices import FisherForm
from fedcompo.errors import ContributionError
from fedcompo.method.fisher import FisherDiagonal, expanded, outer

THETA_0 = pico_weights(dtype=torch.float32)
NAME = next(iter(THETA_0))
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def margins(matrix):
    return matrix.double().sum(1), matrix.double().sum(0)


def diagonal(seed: int, num_examples: int) -> FisherDiagonal:
    sums = {"a": normal(4, 3, seed=seed).square() * 10.0**seed, "b": normal(2, 5, seed=7).square()}
    return FisherDiagonal(sums, num_examples)


# -- sums ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("factored", [False, True])
def test_what_was_added_can_be_taken_away_again(factored):
    f, g = diagonal(1, 7), diagonal(2, 5)
    if factored:
        f, g = f.reduced(), g.reduced()
    both = f + g
    assert both.num_examples == 12
    left = both - g
    assert left.num_examples == 7
    assert (left.form is FisherForm.FACTORED) == factored
    for name, expected in f.sums.items():
        torch.testing.assert_close(left.sums[name], expected, rtol=1e-12, atol=1e-12 * 100)


def test_sums_of_single_precision_are_taken_in_double():
    f = FisherDiagonal({"a": torch.tensor([[1.0]])}, 1)
    g = FisherDiagonal({"a": torch.tensor([[1e-9]])}, 1)
    assert (f + g).sums["a"].dtype == torch.float64
    assert float((f + g).sums["a"]) == pytest.approx(1 + 1e-9, rel=1e-15)


def test_a_difference_is_never_negative():
    f, g = (FisherDiagonal({"a": torch.tensor([[v]])}, 1) for v in (0.1, 0.1 + 1e-8))
    left = FisherDiagonal(f.sums, 2) - g
    assert float(left.sums["a"]) == 0


def test_the_mean_divides_by_the_count_and_is_zero_without_examples():
    f = diagonal(1, 7)
    torch.testing.assert_close(f.mean()["a"], (f.sums["a"] / 7).float())
    nobody = f - f
    assert nobody.num_examples == 0
    assert all((mean == 0).all() for mean in nobody.mean().values())


@pytest.mark.parametrize("factored", [False, True])
def test_the_mean_trace_is_the_sum_of_the_mean(factored):
    fisher = diagonal(1, 7)
    expected = float(sum(mean.sum() for mean in fisher.mean().values()))
    assert (fisher.reduced() if factored else fisher).mean_trace() == pytest.approx(expected)
    assert FisherDiagonal(fisher.sums, 0).mean_trace() > 0


def test_more_examples_than_there_are_cannot_be_taken_out():
    with pytest.raises(ContributionError, match="Cannot take 8 examples out of 7"):
        diagonal(1, 7) - diagonal(1, 8)


@pytest.mark.parametrize(
    "other",
    [{"a": torch.ones(4, 3)}, {"a": torch.ones(3, 4), "b": torch.ones(2, 5)}],
    ids=["a name is missing", "a shape differs"],
)
@pytest.mark.parametrize("factored", [False, True])
def test_fisher_diagonals_of_other_weights_are_refused(other, factored):
    second = FisherDiagonal(other, 1)
    for operation in (FisherDiagonal.__add__, FisherDiagonal.__sub__):
        with pytest.raises(ContributionError, match="same names and shapes"):
            operation(diagonal(1, 7), second.reduced() if factored else second)


def test_of_a_dense_one_and_a_factored_one_the_margins_are_summed():
    f, g = diagonal(1, 7), diagonal(2, 5)
    for both in (f + g.reduced(), f.reduced() + g):
        assert both.form is FisherForm.FACTORED
        for name, expected in (f + g).reduced().sums.items():
            torch.testing.assert_close(both.sums[name], expected)
    left = (f + g) - f.reduced()
    for name, expected in g.reduced().sums.items():
        torch.testing.assert_close(left.sums[name], expected, rtol=1e-10, atol=1e-10)


# -- margins in place of a matrix ---------------------------------------------------------------


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


# -- squares of the layers' inputs --------------------------------------------------------------

INPUTS = {
    f"{name}/inputs": normal(weight.shape[1], seed=3, dtype=torch.float32).square()
    for name, weight in THETA_0.items()
}


def with_inputs(**changed: Tensor | None) -> FisherDiagonal:
    sums = random_like(THETA_0, seed=1, positive=True)
    inputs = {n: t for n, t in {**INPUTS, **changed}.items() if t is not None}
    return FisherDiagonal.read({**sums, **inputs}, 4)


def test_squares_of_inputs_are_kept_apart_and_means_of_them_are_over_examples():
    fisher = with_inputs()
    fisher.check(THETA_0, owner="client 'a'")
    assert fisher.sums.keys() == THETA_0.keys()
    assert fisher.tensors.keys() == THETA_0.keys() | INPUTS.keys()
    for name in THETA_0:
        torch.testing.assert_close(fisher.inputs_of(name), INPUTS[f"{name}/inputs"].double() / 4)
    assert not (fisher + fisher).inputs
    assert not fisher.capped(2).inputs


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: None, "shape None"),
        (lambda t: t[1:], "has shape"),
        (lambda t: t.unsqueeze(0), "has shape"),
        (lambda t: -t, "not finite or out of range in float32, expected 0 to"),
        (lambda t: t * torch.nan, "not finite"),
        (lambda t: t * 1e30, "out of range"),
        (lambda t: t.long(), "expected floating point"),
    ],
)
@pytest.mark.parametrize("form", ["dense", "factored"])
def test_squares_of_inputs_that_cannot_be_are_refused(form, change, complaint):
    name = f"{NAME}/inputs"
    fisher = with_inputs(**{name: change(INPUTS[name])})
    fisher = fisher.reduced() if form == "factored" else fisher
    with pytest.raises(ContributionError, match=f"client 'a'.*{name}.*{complaint}|{complaint}.*"):
        fisher.check(THETA_0, owner="client 'a'")


def test_squares_of_inputs_of_no_target_weight_are_refused():
    with pytest.raises(ContributionError, match="'other/inputs', expected None"):
        with_inputs(**{"other/inputs": torch.ones(3)}).check(THETA_0, owner="client 'a'")


# -- what leaves and what comes of it -----------------------------------------------------------

DENSE = FisherDiagonal(random_like(THETA_0, seed=1, positive=True), 4)
FACTORED = DENSE.reduced()


@pytest.mark.parametrize("fisher", [DENSE, FACTORED], ids=["dense", "factored"])
def test_either_form_fits_its_backbone_and_can_anchor(fisher):
    fisher.check(THETA_0, owner="client 'a'")
    mean = expanded(fisher.mean(), THETA_0)
    assert {n: (t.shape, t.dtype) for n, t in mean.items()} == {
        n: (w.shape, torch.float32) for n, w in THETA_0.items()
    }


def test_the_factored_form_has_a_number_for_each_row_and_column_in_the_same_dtype():
    assert FACTORED.form is FisherForm.FACTORED
    assert DENSE.form is FisherForm.DENSE
    assert FACTORED.reduced() is FACTORED
    assert {name: (tuple(t.shape), t.dtype) for name, t in FACTORED.sums.items()} == {
        f"{name}{end}": ((size,), torch.float32)
        for name, weight in THETA_0.items()
        for end, size in zip(("/rows", "/columns"), weight.shape, strict=True)
    }


@pytest.mark.parametrize("fisher", [DENSE, FACTORED], ids=["dense", "factored"])
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: None, "shape None"),
        (lambda t: torch.ones(10**6), r"shape \(1000000,\)"),
        (lambda t: t.unsqueeze(0), r"shape \(1, "),
        (lambda t: -t, "out of range"),
        (lambda t: t * torch.nan, "out of range"),
        (lambda t: t.double() * 1e300, "out of range"),
    ],
)
def test_sums_that_fit_no_weight_are_refused(fisher, change, complaint):
    name = next(iter(fisher.sums))
    changed = {**fisher.sums, name: change(fisher.sums[name])}
    sums = {name: t for name, t in changed.items() if t is not None}
    with pytest.raises(ContributionError, match=f"client 'a'.*{complaint}"):
        FisherDiagonal(sums, 4).check(THETA_0, owner="client 'a'")


@pytest.mark.parametrize("name", ["other", "other/rows", f"{NAME}/rows", "head.weight"])
def test_names_that_do_not_belong_there_are_refused(name):
    sums = {**DENSE.sums, name: torch.ones(2)}
    with pytest.raises(ContributionError, match="The Fisher of client 'a' has shape"):
        FisherDiagonal(sums, 4).check(THETA_0, owner="client 'a'")


def test_a_dense_fisher_whose_rows_overflow_float32_is_refused():
    sums = {name: torch.full_like(total, 3e38) for name, total in DENSE.sums.items()}
    with pytest.raises(ContributionError, match="not finite"):
        FisherDiagonal(sums, 4).check(THETA_0, owner="client 'a'")


@pytest.mark.parametrize("count", [0, -1])
def test_a_sum_over_no_example_is_refused(count):
    with pytest.raises(ContributionError, match="sums over no example"):
        FisherDiagonal(DENSE.sums, count).check(THETA_0, owner="client 'a'")
