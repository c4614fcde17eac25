"""Theorem 1 on random quadratics, and the figures of a composition."""

from __future__ import annotations

import pytest
import torch
from builders import contribution, dense_by_hand, mixed_pool_members, pico_weights, random_like
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedcompo.composition import diagnostics
from fedcompo.composition.diagnostics import composition_gap, diagnose
from fedcompo.method.pool import Pool

THETA_0 = pico_weights(dtype=torch.float32)
FISHER = random_like(THETA_0, seed=9, positive=True)


def equal_shares(pool: Pool) -> dict[str, float]:
    return dict.fromkeys(pool.clients, 1 / len(pool))


def matrices(rows: int, columns: int) -> st.SearchStrategy[Tensor]:
    numbers = st.floats(-10, 10)
    return st.lists(numbers, min_size=rows * columns, max_size=rows * columns).map(
        lambda values: torch.tensor(values, dtype=torch.float64).view(rows, columns)
    )


def on_the_simplex(count: int) -> st.SearchStrategy[Tensor]:
    shares = st.lists(st.floats(0, 1), min_size=count, max_size=count).filter(
        lambda v: sum(v) > 0.1
    )
    return shares.map(lambda v: torch.tensor(v, dtype=torch.float64) / sum(v))


@st.composite
def quadratics(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g, any symmetric H (not only diagonal, of any sign), task vectors, coefficients."""
    clients, size = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    h = draw(matrices(size, size))
    g, tau = draw(matrices(1, size))[0], draw(matrices(clients, size))
    return g, h + h.T, tau, draw(on_the_simplex(clients))


@given(quadratics())
def test_theorem_1_the_composed_loss_is_the_mean_of_losses_less_the_gap(quadratic):
    g, h, tau, w = quadratic

    def loss(change: Tensor) -> Tensor:
        return 3.0 + g @ change + 0.5 * change @ h @ change

    gap = composition_gap(tau @ h @ tau.T, w)
    mean = sum(w[t] * loss(tau[t]) for t in range(len(w)))
    largest = 1 + float(g.abs().max() + h.abs().max()) * (1 + float(tau.abs().max())) ** 2
    assert float(loss(w @ tau)) == pytest.approx(float(mean) - gap, abs=1e-12 * largest)


@given(quadratics())
def test_the_gap_is_the_written_sum_over_pairs_of_clients(quadratic):
    _, h, tau, w = quadratic
    expected = 0.5 * sum(
        float(w[t] * w[s] * (tau[t] - tau[s]) @ h @ (tau[t] - tau[s]))
        for t in range(len(w))
        for s in range(t)
    )
    size = 1 + float(h.abs().max()) * float(tau.abs().max()) ** 2
    assert composition_gap(tau @ h @ tau.T, w) == pytest.approx(expected, abs=1e-12 * size)


@given(quadratics())
def test_the_gap_is_not_negative_where_the_curvature_is_not(quadratic):
    _, h, tau, w = quadratic
    positive = h @ h
    size = 1 + float(positive.abs().max()) * float(tau.abs().max()) ** 2
    assert composition_gap(tau @ positive @ tau.T, w) >= -1e-12 * size


def test_figures_of_a_mixed_pool_equal_those_of_dense_task_vectors():
    members = mixed_pool_members(THETA_0)
    w = {"client-0": 0.5, "client-1": 0.3, "client-2": 0.2}
    found = diagnose(Pool(tuple(members)), THETA_0, FISHER, w)
    dense = [dense_by_hand(c.task_vector, THETA_0) for c in members]
    tau = torch.stack([torch.cat([d[name].flatten() for name in THETA_0]) for d in dense])
    f = torch.cat([FISHER[name].double().flatten() for name in THETA_0])
    assert found.clients == ("client-0", "client-1", "client-2")
    torch.testing.assert_close(found.gram, tau @ f.diag() @ tau.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.norms, tau.norm(dim=1), rtol=1e-6, atol=0)
    pairs = [(t, s) for t in range(3) for s in range(t)]
    coefficients = list(w.values())
    gap = 0.5 * sum(
        coefficients[t] * coefficients[s] * float((f * (tau[t] - tau[s]).square()).sum())
        for t, s in pairs
    )
    assert found.gap == pytest.approx(gap, rel=1e-5)


def test_among_many_clients_norms_and_gap_are_the_same_and_no_pair_is_compared(monkeypatch):
    members = mixed_pool_members(THETA_0)
    w = {"client-0": 0.5, "client-1": 0.3, "client-2": 0.2}
    compared = diagnose(Pool(tuple(members)), THETA_0, FISHER, w)
    monkeypatch.setattr(diagnostics, "COMPARED", 2)
    streamed = diagnose(Pool(tuple(members)), THETA_0, FISHER, w)
    assert streamed.gram is None
    torch.testing.assert_close(streamed.norms, compared.norms)
    assert streamed.gap == pytest.approx(compared.gap, rel=1e-9)


def pool_of(scales: list[float]) -> Pool:
    return Pool(
        tuple(
            contribution(f"client-{i}", "full", theta_0=THETA_0, seed=20 * i, scale=scale)
            for i, scale in enumerate(scales)
        )
    )


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ([1.0, 1.2, 0.9, 1.1], ()),
        ([1.0, 1.2, 10.0, 1.1], ("client-2",)),
        ([0.1, 1.2, 0.9, 1.1], ("client-0",)),
        ([1.0, 10.0], ()),  # of two, none is the usual one
        ([1.0], ()),
    ],
)
def test_clients_far_longer_or_shorter_than_the_others_are_named(scales, expected):
    pool = pool_of(scales)
    assert diagnose(pool, THETA_0, FISHER, equal_shares(pool)).outliers == expected


def test_a_client_that_opposes_all_others_is_named():
    members = [
        contribution(f"client-{i}", "full", theta_0=THETA_0, seed=7, scale=-1.0 if i == 2 else 1.0)
        for i in range(4)
    ]
    pool = Pool(tuple(members))
    assert diagnose(pool, THETA_0, FISHER, equal_shares(pool)).outliers == ("client-2",)


def test_lengths_are_compared_within_a_kind():
    members = [
        contribution(f"client-{i}", kind, theta_0=THETA_0, seed=20 * i, scale=scale)
        for i, (kind, scale) in enumerate(
            [("full", 1.0), ("full", 1.1), ("full", 0.9), ("ia3", 50.0)]
        )
    ]
    pool = Pool(tuple(members))
    assert "client-3" not in diagnose(pool, THETA_0, FISHER, equal_shares(pool)).outliers
