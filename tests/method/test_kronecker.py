"""Kronecker factors against dense matrices of a whole weight, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import KINDS, normal, pico_weights, random_deltas, random_like
from torch import Tensor

from fedcompo.config.choices import FisherForm, Kind, Wire
from fedcompo.errors import ContributionError
from fedcompo.messages.wire import decode, encode
from fedcompo.method.deltas import Delta, Weights
from fedcompo.method.fisher import FisherDiagonal, expanded
from fedcompo.method.kronecker import (
    LEFT,
    RANK,
    RIGHT,
    Kronecker,
    diagonal,
    thin_shape,
    thinned,
    whole,
)
from fedcompo.method.penalties import (
    bounding_step,
    explicit_step,
    iel_penalty,
    implicit_step,
    ita_penalty,
    one_folding,
)

THETA_0 = pico_weights()
PULL = random_like(THETA_0, seed=40)
pulls = pytest.mark.parametrize("pull", [None, PULL], ids=["ita", "iel"])
DIMS = pytest.mark.parametrize("dim", [1, 4, RANK, RANK + 1, RANK + 2, 40])


def positive(dim: int, seed: int) -> Tensor:
    """A matrix whose eigenvalues fall by a factor of a thousand."""
    root = normal(dim, dim, seed=seed) * torch.logspace(0, -1.5, dim, dtype=torch.float64)
    return root @ root.T


def sums(seed: int, count: int = 5) -> FisherDiagonal:
    parts = {}
    for index, (name, weight) in enumerate(THETA_0.items()):
        left, right = (positive(d, seed + 2 * index + i) for i, d in enumerate(weight.shape))
        parts |= {f"{name}{LEFT}": left, f"{name}{RIGHT}": right * left.trace() / right.trace()}
    return FisherDiagonal(parts, count)


METRIC = {
    name: Kronecker.of(thinned(parts[f"{name}{LEFT}"]), thinned(parts[f"{name}{RIGHT}"]))
    for parts in [sums(100).sums]
    for name in THETA_0
}


def dense(name: str) -> Tensor:
    """Oracle: the whole block, (out·in, out·in), for a change flattened by rows."""
    block = METRIC[name]
    return torch.kron(whole(block.left), whole(block.right))


def written_penalty(tau: Weights, strength: float, pull: Weights | None = None) -> Tensor:
    """Oracle: a/2 tau' F tau - <F tau, p>, in dense matrices."""
    total = torch.zeros((), dtype=torch.float64)
    for name, change in tau.items():
        moved = dense(name) @ change.flatten()
        total = total + 0.5 * strength * moved @ change.flatten()
        if pull is not None:
            total = total - moved @ pull[name].flatten()
    return total


def tau_of(deltas: dict[str, Delta]) -> Weights:
    return {name: delta() for name, delta in deltas.items()}


# -- the thin form ------------------------------------------------------------------------------


@DIMS
def test_a_thin_factor_keeps_diagonal_and_trace_and_is_never_square(dim):
    matrix = positive(dim, 3)
    thin = thinned(matrix)
    assert thin.shape == thin_shape(dim)
    assert thin.shape[0] != thin.shape[1]
    torch.testing.assert_close(whole(thin).diagonal(), matrix.diagonal(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(diagonal(thin), matrix.diagonal(), rtol=1e-12, atol=1e-15)
    assert float(thin.square().sum()) == pytest.approx(float(matrix.trace()), rel=1e-12)


@DIMS
def test_its_columns_are_nearly_the_leading_directions(dim):
    matrix = positive(dim, 3)
    leading = thinned(matrix)[:, 1:]
    values, vectors = torch.linalg.eigh(matrix)
    kept = min(dim, leading.shape[1])
    best = (vectors[:, -kept:] * values[-kept:]) @ vectors[:, -kept:].T
    assert (matrix - leading @ leading.T).norm() <= 1.1 * (matrix - best).norm() + 1e-10
    assert float(torch.linalg.eigvalsh(matrix - leading @ leading.T)[0]) > -1e-10


def test_few_directions_and_small_matrices_lose_nothing():
    few = normal(40, 3, seed=4)
    for matrix in (positive(RANK + 1, 5), few @ few.T, torch.zeros(40, 40)):
        torch.testing.assert_close(whole(thinned(matrix)), matrix.double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("wire", Wire)
def test_what_arrives_is_not_negative_whatever_the_wire_rounds(wire):
    body = {f"fisher/a{LEFT}": thinned(positive(300, 6)).float()}
    (arrived,) = decode(encode(body, wire), wire, source="client 'a'").values()
    assert float(torch.linalg.eigvalsh(whole(arrived))[0]) > -1e-12
    (meant,) = body.values()
    assert (whole(arrived) - whole(meant)).norm() < 0.03 * whole(meant).norm()


# -- sums ---------------------------------------------------------------------------------------


def test_adding_and_taking_out_undo_each_other():
    mine, theirs = sums(1, 4), sums(50, 3).thinned()
    both = mine + theirs
    assert both.num_examples == 7
    assert both.form is FisherForm.KRONECKER
    for name, total in (both - theirs).sums.items():
        torch.testing.assert_close(total, mine.sums[name], rtol=0, atol=1e-12)
        torch.testing.assert_close(
            both.sums[name], mine.sums[name] + whole(theirs.sums[name]), rtol=0, atol=1e-12
        )


def test_the_mean_divides_the_block_and_nobody_means_nothing():
    fisher = sums(1, 4)
    mean, once = fisher.mean(), replace(fisher, num_examples=1).mean()
    change = random_like(THETA_0, seed=9)
    found, total = (ita_penalty(change, expanded(m, THETA_0), 1.0) for m in (mean, once))
    torch.testing.assert_close(found, total / 4, rtol=1e-5, atol=0)
    assert fisher.mean_trace() == pytest.approx(
        sum(float(t.trace()) for n, t in fisher.sums.items() if n.endswith(LEFT)) / 4
    )
    nothing = fisher - fisher
    assert float(ita_penalty(change, expanded(nothing.mean(), THETA_0), 1.0)) == 0


@pytest.mark.parametrize("other", ["dense", "factored"])
def test_beside_another_form_only_row_and_column_sums_are_left(other):
    mine = sums(1)
    theirs = FisherDiagonal(random_like(THETA_0, seed=7, positive=True), 3)
    theirs = theirs.reduced() if other == "factored" else theirs
    both = mine + theirs
    assert both.form is FisherForm.FACTORED
    for name in THETA_0:
        rows = mine.sums[f"{name}{LEFT}"].diagonal() + theirs.reduced().sums[f"{name}/rows"]
        torch.testing.assert_close(both.sums[f"{name}/rows"], rows)


def test_what_a_client_may_not_send_is_refused():
    fisher = sums(1).thinned()
    fisher.check(THETA_0, owner="client 'a'")
    name = min(fisher.sums)
    for value in (float("nan"), float("inf"), 1e20):
        worse = {**fisher.sums, name: torch.full_like(fisher.sums[name], value)}
        with pytest.raises(ContributionError, match="not finite"):
            FisherDiagonal(worse, 5).check(THETA_0, owner="client 'a'")
    with pytest.raises(ContributionError, match=r"expected \("):
        FisherDiagonal(sums(1).sums, 5).check(THETA_0, owner="client 'a'")


# -- penalties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalties_are_the_written_quadratic_forms(kind):
    tau = tau_of(random_deltas(kind, THETA_0, seed=3, scale=0.5))
    torch.testing.assert_close(ita_penalty(tau, METRIC, 0.3), written_penalty(tau, 0.3))
    rest = {name: 0.7 * change for name, change in PULL.items()}
    expected = written_penalty(tau, 0.7 * 0.75, rest)
    found = iel_penalty(tau, METRIC, {n: r / 0.7 for n, r in rest.items()}, share=0.25, beta=0.7)
    torch.testing.assert_close(found, expected)


def test_the_mean_of_all_entries_is_that_of_the_diagonal():
    traces = [float(dense(name).trace()) for name in THETA_0]
    count = sum(weight.numel() for weight in THETA_0.values())
    assert one_folding(METRIC) == pytest.approx(count / sum(traces))


@pulls
@pytest.mark.parametrize("kind", KINDS)
def test_the_explicit_step_goes_down_the_gradient(kind, pull):
    deltas = random_deltas(kind, THETA_0, seed=3, scale=0.1)
    parameters = [p for delta in deltas.values() for p in delta.parameters()]
    gradients = torch.autograd.grad(written_penalty(tau_of(deltas), 0.1, pull), parameters)
    assert float(sum(g.square().sum() for g in gradients)) < 100.0**2  # not clipped
    expected = [p.detach() - 0.4 * g for p, g in zip(parameters, gradients, strict=True)]
    explicit_step(deltas, METRIC, 0.1, 0.4, pull)
    torch.testing.assert_close([p.detach() for p in parameters], expected)


def least(
    delta: Delta,
    name: str,
    parameter: Tensor,
    before: Tensor,
    strength: float,
    pull: Weights | None,
) -> Tensor:
    """Oracle: where 1/2 |q - before|² + 1/2 penalty(q) is least, by one dense linear system."""
    start = parameter.detach().clone()

    def objective(q: Tensor) -> Tensor:
        tau = torch.func.functional_call(delta, {key: q})
        return 0.5 * (q - before).square().sum() + 0.5 * written_penalty(
            {name: tau}, strength, pull
        )

    (key,) = [n for n, p in delta.named_parameters() if p is parameter]
    gradient = torch.func.grad(objective)(start).flatten()
    hessian = torch.func.hessian(objective)(start).reshape(len(gradient), -1)
    return (start.flatten() - torch.linalg.solve(hessian, gradient)).view_as(start)


@pulls
@pytest.mark.parametrize("strength", [0.6, 2e4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_proximal_step_ends_where_a_dense_linear_system_does(kind, strength, pull):
    name = min(THETA_0)
    deltas = {name: random_deltas(kind, THETA_0, seed=3, scale=0.5)[name]}
    delta = deltas[name]
    before = {key: p.detach().clone() for key, p in delta.named_parameters()}
    implicit_step(deltas, METRIC, strength, 0.5, pull)
    if kind is not Kind.LORA:
        ((key, parameter),) = delta.named_parameters()
        expected = least(delta, name, parameter, before[key], strength, pull)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-7, atol=1e-9)
        return
    expected = least(delta, name, delta.A, before["A"], strength, pull)
    torch.testing.assert_close(delta.A.detach(), expected, rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        delta.A.copy_(before["A"])
    expected = least(delta, name, delta.B, before["B"], strength, pull)
    torch.testing.assert_close(delta.B.detach(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trust_region_has_the_same_metric(kind):
    deltas = random_deltas(kind, THETA_0, seed=3)
    limit = 0.1 * float(written_penalty(tau_of(deltas), 1.0).detach())
    assert float(bounding_step(deltas, METRIC, limit)) > 0
    assert float(written_penalty(tau_of(deltas), 1.0).detach()) == pytest.approx(0.999 * limit)
    assert float(bounding_step(deltas, METRIC, limit)) == 0
