"""Fisher diagonals as values: sums, differences, means, and head rows that follow their classes."""

from __future__ import annotations

import pytest
import torch
from builders import normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedcompo.errors import ContributionError
from fedcompo.method.fisher import FisherDiagonal


def diagonal(seed: int, num_examples: int) -> FisherDiagonal:
    sums = {"a": normal(4, 3, seed=seed).square() * 10.0**seed, "b": normal(2, seed=seed).square()}
    return FisherDiagonal(sums, num_examples)


def test_what_was_added_can_be_taken_away_again():
    f, g = diagonal(1, 7), diagonal(2, 5)
    both = f + g
    assert both.num_examples == 12
    left = both - g
    assert left.num_examples == 7
    for name, expected in f.sums.items():
        torch.testing.assert_close(left.sums[name], expected, rtol=1e-12, atol=1e-12 * 100)


def test_sums_of_single_precision_are_taken_in_double():
    f = FisherDiagonal({"a": torch.tensor([1.0])}, 1)
    g = FisherDiagonal({"a": torch.tensor([1e-9])}, 1)
    assert (f + g).sums["a"].dtype == torch.float64
    assert float((f + g).sums["a"]) == pytest.approx(1 + 1e-9, rel=1e-15)


def test_rounding_never_leaves_a_fisher_below_zero():
    f, g = (FisherDiagonal({"a": torch.tensor([v])}, 1) for v in (0.1, 0.1 + 1e-8))
    left = FisherDiagonal(f.sums, 2) - g
    assert float(left.sums["a"]) == 0


def test_the_mean_divides_by_the_count_and_is_zero_without_examples():
    f = diagonal(1, 7)
    torch.testing.assert_close(f.mean()["a"], (f.sums["a"] / 7).float())
    nobody = f - f
    assert nobody.num_examples == 0
    assert all((mean == 0).all() for mean in nobody.mean().values())


def test_more_examples_than_there_are_cannot_be_taken_out():
    with pytest.raises(ContributionError, match="Cannot take 8 examples out of 7"):
        diagonal(1, 7) - diagonal(1, 8)


@pytest.mark.parametrize(
    "other",
    [{"a": torch.ones(4, 3)}, {"a": torch.ones(3, 4), "b": torch.ones(2)}],
    ids=["a name is missing", "a shape differs"],
)
def test_fisher_diagonals_of_other_weights_are_refused(other):
    for operation in (FisherDiagonal.__add__, FisherDiagonal.__sub__):
        with pytest.raises(ContributionError, match="same names and shapes"):
            operation(diagonal(1, 7), FisherDiagonal(other, 1))


CLASSES = ("cat", "dog", "emu", "owl")
class_lists = st.permutations(CLASSES).flatmap(
    lambda order: st.integers(0, len(CLASSES)).map(lambda count: tuple(order[:count]))
)


def with_head(classes: tuple[str, ...], seed: int) -> FisherDiagonal:
    sums = {
        "a": normal(3, 2, seed=seed).square(),
        "head.weight": normal(len(classes), 2, seed=seed + 1).square(),
        "head.bias": normal(len(classes), seed=seed + 2).square(),
    }
    return FisherDiagonal(sums, 4 + seed, classes)


def row_of(fisher: FisherDiagonal, entry: str, name: str) -> Tensor:
    """Oracle: the row of one class, looked up by hand."""
    for label, row in zip(fisher.classes, fisher.sums[entry], strict=True):
        if label == name:
            return row
    return torch.zeros_like(fisher.sums[entry].sum(0))


@given(class_lists, class_lists)
def test_head_rows_follow_their_classes(own, wanted):
    fisher = with_head(own, seed=1)
    found = fisher.for_classes(wanted)
    assert found.classes == wanted
    assert found.num_examples == fisher.num_examples
    assert torch.equal(found.sums["a"], fisher.sums["a"])
    for entry in ("head.weight", "head.bias"):
        assert found.sums[entry].shape == (len(wanted), *fisher.sums[entry].shape[1:])
        for name in wanted:
            assert torch.equal(row_of(found, entry, name), row_of(fisher, entry, name))


@given(class_lists, class_lists)
def test_a_sum_has_a_row_for_every_class_of_either(left, right):
    f, g = with_head(left, seed=1), with_head(right, seed=9)
    both = f + g
    assert both.classes == tuple(sorted({*left, *right}))
    assert both.num_examples == f.num_examples + g.num_examples
    assert torch.equal(both.sums["a"], f.sums["a"] + g.sums["a"])
    for entry in ("head.weight", "head.bias"):
        for name in both.classes:
            expected = row_of(f, entry, name) + row_of(g, entry, name)
            assert torch.equal(row_of(both, entry, name), expected)
    back = (both - g).for_classes(left)
    for name, expected in f.sums.items():
        torch.testing.assert_close(back.sums[name], expected)


@given(class_lists, class_lists)
def test_only_examples_of_known_classes_can_be_taken_out(left, right):
    f, g = with_head(left, seed=9), with_head(right, seed=1)
    if set(right) <= set(left):
        assert (f - g).classes == left
    else:
        with pytest.raises(ContributionError, match="Cannot take out examples under a head with"):
            f - g


@pytest.mark.parametrize("classes", [(), ("cat",), ("cat", "cat"), ("cat", "dog", "emu")])
def test_a_head_row_that_is_not_one_classs_is_refused(classes):
    with pytest.raises(ContributionError, match="has 2 rows for the classes"):
        FisherDiagonal({"head.bias": torch.ones(2)}, 1, classes)


def test_the_mean_trace_is_that_of_the_backbone_alone():
    fisher = with_head(("cat", "dog"), seed=1)
    assert fisher.mean_trace() == pytest.approx(float(fisher.mean()["a"].sum()), rel=1e-6)
    assert FisherDiagonal(fisher.sums, 0, fisher.classes).mean_trace() > 0
