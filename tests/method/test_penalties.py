"""The anchor's value, gradient and steps, against what is written in their equations."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from builders import KINDS, normal, pico_weights, random_deltas, random_like
from torch import Tensor

from fedcompo.config.choices import Kind
from fedcompo.method.deltas import Delta, Weights
from fedcompo.method.penalties import (
    GRADIENT_LIMIT,
    explicit_step,
    head_penalty,
    implicit_step,
    ita_penalty,
)

THETA_0 = pico_weights()
FISHER = random_like(THETA_0, seed=7, positive=True)
ALPHA = 0.3
STEPS = [explicit_step, implicit_step]
Step = Callable[[dict[str, Delta], Weights, float, float], None]


def deltas_of(kind: Kind, *, scale: float = 0.5) -> dict[str, Delta]:
    return random_deltas(kind, THETA_0, seed=3, scale=scale)


def tau_of(deltas: dict[str, Delta]) -> Weights:
    return {name: delta() for name, delta in deltas.items()}


def values_of(deltas: dict[str, Delta]) -> list[Tensor]:
    return [p.detach().clone() for delta in deltas.values() for p in delta.parameters()]


def written_penalty(tau: Weights, fisher: Weights, alpha: float) -> Tensor:
    """Oracle: alpha/2 times the sum over i of F_i tau_i², one entry at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for name, change in tau.items():
        for f, t in zip(fisher[name].flatten(), change.flatten(), strict=True):
            total = total + f * t * t
    return alpha / 2 * total


@pytest.mark.parametrize("kind", KINDS)
def test_the_anchor_is_the_written_quadratic_form(kind):
    tau = tau_of(deltas_of(kind))
    torch.testing.assert_close(
        ita_penalty(tau, FISHER, ALPHA), written_penalty(tau, FISHER, ALPHA), rtol=1e-12, atol=0
    )


def chain_rule(kind: Kind, delta: Delta, g: Tensor, weight: Tensor) -> list[Tensor]:
    """Oracle: from the gradient in tau, G, to that in each parameter."""
    if kind in (Kind.FULL, Kind.TANGENT):
        return [g]
    if kind is Kind.LORA:
        return [delta.B.T @ g, g @ delta.A.T]
    return [(g * weight).sum(1, keepdim=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_anchors_gradient_follows_the_chain_rule_of_its_kind(kind):
    deltas = deltas_of(kind)
    for name, delta in deltas.items():
        penalty = ita_penalty({name: delta()}, FISHER, ALPHA)
        actual = torch.autograd.grad(penalty, list(delta.parameters()))
        g = ALPHA * FISHER[name] * delta()
        expected = chain_rule(kind, delta, g, THETA_0[name])
        torch.testing.assert_close(list(actual), [e.detach() for e in expected])


def test_the_anchor_does_nothing_at_the_pre_trained_weights():
    tau = {name: torch.zeros_like(weight) for name, weight in THETA_0.items()}
    assert ita_penalty(tau, FISHER, 100.0) == 0


def test_the_head_penalty_is_a_weighted_and_a_plain_square():
    change, fisher = normal(3, 4, seed=1), normal(3, 4, seed=2).square()
    expected = sum(
        0.7 * f * d * d + 0.2 * d * d
        for f, d in zip(fisher.flatten().tolist(), change.flatten().tolist(), strict=True)
    )
    actual = head_penalty(change, fisher, fisher_strength=0.7, plain_strength=0.2)
    assert float(actual) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clipped", [False, True])
def test_the_explicit_step_goes_down_the_clipped_gradient(kind, clipped):
    alpha = 1e4 if clipped else ALPHA
    deltas = deltas_of(kind)
    before = values_of(deltas)
    parameters = [p for delta in deltas.values() for p in delta.parameters()]
    gradients = torch.autograd.grad(written_penalty(tau_of(deltas), FISHER, alpha), parameters)
    norm = float(sum(g.square().sum() for g in gradients)) ** 0.5
    assert (norm > GRADIENT_LIMIT) == clipped
    share = min(1.0, GRADIENT_LIMIT / norm)
    explicit_step(deltas, FISHER, alpha, 0.4)
    expected = [p - 0.4 * share * g for p, g in zip(before, gradients, strict=True)]
    torch.testing.assert_close(values_of(deltas), expected)


def proximal_gradient(
    delta: Delta, name: str, parameter: Tensor, before: Tensor, strength: float
) -> Tensor:
    """Gradient of 1/2 |q - p|² + strength/2 tau(q)' F tau(q) in one parameter q of a delta."""
    anchor = written_penalty({name: delta()}, FISHER, strength)
    objective = 0.5 * (parameter - before).square().sum() + anchor
    return torch.autograd.grad(objective, parameter)[0]


@pytest.mark.parametrize("strength", [0.3, 1e4])
@pytest.mark.parametrize("kind", [Kind.FULL, Kind.IA3, Kind.TANGENT])
def test_the_implicit_step_ends_where_the_proximal_objective_is_least(kind, strength):
    deltas = deltas_of(kind)
    before = values_of(deltas)
    implicit_step(deltas, FISHER, strength / 0.5, 0.5)
    for (name, delta), old in zip(deltas.items(), before, strict=True):
        (parameter,) = delta.parameters()
        gradient = proximal_gradient(delta, name, parameter, old, strength)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-8)


@pytest.mark.parametrize("strength", [0.3, 1e4])
def test_the_implicit_step_of_a_lora_is_least_in_b_for_the_old_a_then_in_a_for_the_new_b(strength):
    deltas = deltas_of(Kind.LORA)
    before = {name: (d.A.detach().clone(), d.B.detach().clone()) for name, d in deltas.items()}
    implicit_step(deltas, FISHER, strength / 0.5, 0.5)
    for name, delta in deltas.items():
        old_a, old_b = before[name]
        new_a = delta.A.detach().clone()
        gradient_a = proximal_gradient(delta, name, delta.A, old_a, strength)
        with torch.no_grad():
            delta.A.copy_(old_a)
        gradient_b = proximal_gradient(delta, name, delta.B, old_b, strength)
        assert not torch.equal(new_a, old_a)
        for gradient in (gradient_a, gradient_b):
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_halving_a_small_step_quarters_what_implicit_and_explicit_differ_by(kind):
    def difference(schedule: float) -> float:
        stepped = []
        for step in STEPS:
            deltas = deltas_of(kind)
            step(deltas, FISHER, ALPHA, schedule)
            stepped.append(torch.cat([v.flatten() for v in values_of(deltas)]))
        return float((stepped[0] - stepped[1]).norm())

    assert difference(2e-3) / difference(1e-3) == pytest.approx(4, rel=0.02)


def heavy_tailed() -> Weights:
    """A Fisher like that of a real transformer: nearly all small, one entry at 775."""
    fisher = {name: 0.03 * f for name, f in FISHER.items()}
    for f in fisher.values():
        f[0, 0] = 775.0
    return fisher


def sizes_over_steps(step: Step, kind: Kind, *, count: int) -> list[float]:
    """Norm of the task vector before and after each of some steps."""
    deltas, fisher = deltas_of(kind, scale=0.01), heavy_tailed()
    sizes = []
    for _ in range(count + 1):
        sizes.append(
            float(torch.cat([t.detach().flatten() for t in tau_of(deltas).values()]).norm())
        )
        step(deltas, fisher, 1.0, 1.0)
    return sizes


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_heavy_tailed_fisher_explicit_explodes_where_implicit_only_shrinks(kind):
    explicit = sizes_over_steps(explicit_step, kind, count=50)
    implicit = sizes_over_steps(implicit_step, kind, count=50)
    # The clipped gradient bounds how far it is thrown, to and fro; it never comes back.
    assert max(explicit) > 100 * explicit[0]
    assert min(explicit[10:]) > 10 * explicit[0]
    assert all(after < before for before, after in pairwise(implicit))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [1e2, 1e6, 1e10])
def test_implicit_stays_finite_and_below_its_start_at_any_strength(kind, alpha):
    deltas = deltas_of(kind)
    before = ita_penalty(tau_of(deltas), heavy_tailed(), 1.0)
    implicit_step(deltas, heavy_tailed(), alpha, 1.0)
    after = ita_penalty(tau_of(deltas), heavy_tailed(), 1.0)
    assert 0 <= after < 0.1 * before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("alpha", "schedule"), [(0.0, 1.0), (100.0, 0.0)])
def test_a_step_of_no_strength_changes_no_bit(step, kind, alpha, schedule):
    deltas = deltas_of(kind)
    before = values_of(deltas)
    step(deltas, FISHER, alpha, schedule)
    assert all(torch.equal(a, b) for a, b in zip(values_of(deltas), before, strict=True))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_nothing_stays_nothing(step, kind):
    deltas = deltas_of(kind, scale=0.0)  # as they start
    step(deltas, FISHER, 100.0, 1.0)
    assert all((change == 0).all() for change in tau_of(deltas).values())


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_leaves_theta_0_and_the_fisher_alone(step, kind):
    theta_0 = {name: weight.clone() for name, weight in THETA_0.items()}
    fisher = {name: f.clone() for name, f in FISHER.items()}
    deltas = random_deltas(kind, theta_0, seed=3)
    step(deltas, fisher, 10.0, 1.0)
    assert all(torch.equal(theta_0[name], THETA_0[name]) for name in THETA_0)
    assert all(torch.equal(fisher[name], FISHER[name]) for name in FISHER)
