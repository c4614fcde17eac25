"""The factor that keeps the length of task vectors, against its formula by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from builders import normal
from hypothesis import given
from hypothesis import strategies as st
from registry_builders import (
    QUICK,
    backbone,
    one_of_each_kind,
    registry_of,
    scale_by_hand,
)

from fedcompo.composition.models import factor_of
from fedcompo.composition.scale import Factor, FactorBy, norm_preserving, significant
from fedcompo.config.choices import Coefficients
from fedcompo.method.pool import Pool


def factor_between(vectors: torch.Tensor, times: list[int]) -> float:
    """The factor of vectors (clients, elements), each counted so often."""
    lengths = {
        str(i): (float(n), float(v.square().sum()))
        for i, (v, n) in enumerate(zip(vectors, times, strict=True))
    }
    total = (vectors * torch.tensor(times).unsqueeze(1)).sum(0)
    return norm_preserving(lengths, float(total.square().sum()))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99))
def test_the_composed_change_is_as_long_as_the_mean_task_vector(times, seed):
    vectors = normal(len(times), 400, seed=seed)
    weights = torch.tensor(times).double() / sum(times)
    factor = factor_between(vectors, times)
    change = factor * (vectors * torch.tensor(times).unsqueeze(1)).sum(0)
    expected = float((weights * vectors.square().sum(1)).sum().sqrt())
    if factor * sum(times) < len(times) * (1 - 1e-3):
        assert float(change.norm()) == pytest.approx(expected, rel=6e-4)
    else:  # the plain sum is the farthest it goes
        assert float(change.norm()) <= expected * (1 + 1e-3)


def test_equal_task_vectors_are_averaged_and_orthogonal_ones_grow_with_their_root():
    one = normal(1, 50, seed=0).expand(4, 50)
    assert factor_between(one, [1] * 4) * 4 == pytest.approx(1)
    assert factor_between(torch.eye(16), [1] * 16) * 16 == pytest.approx(4)
    assert factor_between(torch.eye(16), [7] * 16) * 7 * 16 == pytest.approx(4, rel=1e-3)


def test_task_vectors_that_cancel_out_are_not_blown_up():
    v = normal(1, 50, seed=1)
    nearly = torch.cat([v, -v + 1e-6])
    assert factor_between(nearly, [1, 1]) == 1  # the plain sum
    assert factor_between(torch.cat([v, -v]), [1, 1]) == 0.5  # which is zero: the mean
    assert factor_between(torch.zeros(3, 5), [2, 2, 2]) == pytest.approx(1 / 6)


def test_the_last_bits_of_lengths_do_not_count():
    lengths = {"a": (1.0, 3.7), "b": (1.0, 2.2)}
    factor = norm_preserving(lengths, 5.1)
    assert factor == float(f"{factor:.4g}")
    assert norm_preserving(lengths, math.nextafter(5.1, 9)) == factor
    assert significant(0.00123456789, 6) == 0.00123457


@pytest.mark.parametrize("coefficients", Coefficients)
def test_a_pool_has_the_factor_of_a_registry_of_its_members(coefficients, tmp_path):
    members = one_of_each_kind()
    settings = replace(QUICK, coefficients=coefficients)
    registry = registry_of(tmp_path / "r", *members, settings=settings)
    found = factor_of(Pool(tuple(members)), registry.backbone, settings)
    assert found == Factor(registry.factor, FactorBy.NORMS)
    times = {m.client: settings.times(m.num_examples) for m in members}
    expected = scale_by_hand(Pool(tuple(members)), backbone().theta_0, times)
    assert registry.scale == pytest.approx(expected, rel=1e-9)
    fixed = factor_of(Pool(tuple(members)), registry.backbone, replace(settings, scale=2.0))
    assert fixed == Factor(2.0 / sum(times.values()), FactorBy.FIXED)
