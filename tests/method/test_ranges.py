"""Numbers within their range leave everything finite; others are refused, whatever their dtype."""

from __future__ import annotations

import math
from statistics import median

import pytest
import torch
from builders import normal
from hypothesis import given
from hypothesis import strategies as st

from fedcompo.config.choices import Kind
from fedcompo.errors import ContributionError
from fedcompo.method import ranges
from fedcompo.method.deltas import restore_delta
from fedcompo.method.fisher import expanded
from fedcompo.method.heads import Head
from fedcompo.method.penalties import ita_penalty, one_folding
from fedcompo.method.ranges import beyond, check_range

WEIGHT = normal(64, 48, seed=1, dtype=torch.float32)


def test_what_follows_from_the_largest_numbers_is_finite():
    parts = {"A": torch.full((16, 48), ranges.PARAMETER), "B": torch.full((64, 16), 2.0**16)}
    delta = restore_delta(Kind.LORA, WEIGHT, parts)
    assert math.isfinite(float(delta.norm()))
    tau = {"w": torch.full_like(WEIGHT, 2.0**10)}
    margins = {"w/rows": torch.full((64,), ranges.FISHER), "w/columns": torch.full((48,), 2.0**60)}
    roots = {"w/left": torch.full((64, 9), 2.0**30), "w/right": torch.full((48, 9), 2.0**30)}
    for parts in ({"w": torch.full_like(WEIGHT, ranges.FISHER)}, margins, roots):
        metric = expanded(parts, tau)
        assert math.isfinite(float(ita_penalty(tau, metric, 1.0)))
        assert math.isfinite(one_folding(metric))
    head = Head(("cat",), torch.full((1, 48), ranges.HEAD), torch.full((1,), ranges.HEAD))
    assert head(torch.full((2, 48), ranges.FEATURE)).isfinite().all()


def test_a_fisher_next_to_nothing_holds_nothing():
    assert one_folding({"w": torch.full((3, 2), 1e-40)}) == 0
    assert one_folding({"w": torch.full((3, 2), 0.5)}) == 2


@pytest.mark.parametrize("dtype", ranges.FLOATS)
def test_floats_are_compared_as_float32(dtype):
    check_range(torch.tensor([-3.0, 4.0], dtype=dtype), 4.0, "It")
    for wrong in (4.5, -4.5, math.nan, math.inf, -math.inf):
        with pytest.raises(ContributionError, match="It has 1 values that are not finite or out"):
            check_range(torch.tensor([1.0, wrong], dtype=dtype), 4.0, "It")
    with pytest.raises(ContributionError, match="expected 0 to 4"):
        check_range(torch.tensor([-1.0], dtype=dtype), 4.0, "It", least=0.0)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.uint8, torch.complex64, torch.float8_e4m3fn]
)
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ContributionError, match=f"dtype {dtype}"):
        check_range(torch.zeros(2).to(dtype), 4.0, "It")


def test_what_float64_can_hold_and_float32_cannot_is_refused():
    with pytest.raises(ContributionError, match="not finite"):
        check_range(torch.tensor([1e300], dtype=torch.float64), 3.4e38, "It")


def test_usual_is_the_median_of_the_others_without_the_smallest():
    assert beyond({"a": 1.0, "b": 2.0, "c": 3.0, "d": 31.0}, 10.0) == {"d": 2.5}
    assert beyond({"a": 1.0, "b": 2.0, "c": 3.0, "d": 25.0}, 10.0) == {}
    assert beyond({"a": 1.0, "b": 99.0}, 2.0) == {}


@given(st.lists(st.floats(0, 10) | st.sampled_from((0.0, 1.0, 2.0)), min_size=3, max_size=9))
def test_one_sort_finds_what_a_median_for_each_client_finds(values):
    for client, value in enumerate(values):
        usual = median(sorted(v for other, v in enumerate(values) if other != client)[1:])
        found = beyond({str(i): v for i, v in enumerate(values)}, 1.5).get(str(client))
        assert found == (usual if value > 1.5 * usual > 0 else None)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=6), st.floats(0, 1e30), st.floats(1.5, 200))
def test_no_client_alone_has_another_found(honest, hostile, ratio):
    values = {f"client-{i}": value for i, value in enumerate(honest)}
    for client in beyond({**values, "mallory": hostile}, ratio).keys() - {"mallory"}:
        others = [value for name, value in values.items() if name != client]
        assert values[client] > ratio * median(others)  # the honest ones alone say so, too
    if hostile > ratio * max(honest) and median(sorted(honest)[1:]) > 0:
        assert "mallory" in beyond({**values, "mallory": hostile}, ratio)
