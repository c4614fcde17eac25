"""IEL's penalty and its steps with a pull, against the sums over all clients they stand for."""

from __future__ import annotations

import inspect

import pytest
import torch
from builders import KINDS, normal, pico_weights, random_deltas, random_like
from torch import Tensor

from fedcompo.composition.diagnostics import composition_gap
from fedcompo.config.choices import Kind
from fedcompo.method.deltas import Delta, Weights
from fedcompo.method.penalties import (
    GRADIENT_LIMIT,
    explicit_step,
    iel_penalty,
    implicit_step,
    own_strength,
)

THETA_0 = pico_weights()
FISHER = random_like(THETA_0, seed=7, positive=True)
PULL = random_like(THETA_0, seed=40)
BETA = 0.7
ALIKE = (0.25, 0.25, 0.25, 0.25)
UNEQUAL = (0.4, 0.1, 0.2, 0.3)
"""Shares of four clients; the first one trains."""


def deltas_of(kind: Kind) -> dict[str, Delta]:
    return random_deltas(kind, THETA_0, seed=3)


def tau_of(deltas: dict[str, Delta]) -> Weights:
    return {name: delta() for name, delta in deltas.items()}


def values_of(deltas: dict[str, Delta]) -> list[Tensor]:
    return [p.detach().clone() for delta in deltas.values() for p in delta.parameters()]


def others(count: int = 3) -> list[Weights]:
    return [random_like(THETA_0, seed=60 + 10 * i) for i in range(count)]


def rest_of(shares: tuple[float, ...]) -> Weights:
    """Oracle of R, term by term."""
    taus = others(len(shares) - 1)
    return {
        name: sum(
            (w * tau[name] for w, tau in zip(shares[1:], taus, strict=True)),
            torch.zeros_like(THETA_0[name]),
        )
        for name in THETA_0
    }


def inner(a: Weights, b: Weights) -> Tensor:
    """<F a, b>, one entry at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for name in a:
        for f, x, y in zip(
            FISHER[name].flatten(), a[name].flatten(), b[name].flatten(), strict=True
        ):
            total = total + f * x * y
    return total


def assert_near(actual: list[Tensor], expected: list[Tensor], **tolerances: float) -> None:
    given = tolerances or {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(actual, [e.detach() for e in expected], **given)


@pytest.mark.parametrize("kind", KINDS)
def test_at_equal_shares_the_penalty_is_the_papers_sum_over_all_other_clients(kind):
    tau, count = tau_of(deltas_of(kind)), len(ALIKE)
    own = 0.5 * (1 - 1 / count) * inner(tau, tau)
    cross = sum(inner(tau, other) for other in others()) / count
    penalty = iel_penalty(tau, FISHER, rest_of(ALIKE), share=1 / count, beta=BETA)
    torch.testing.assert_close(penalty, BETA * (own - cross), rtol=1e-12, atol=0)


def chain_rule(kind: Kind, delta: Delta, g: Tensor, weight: Tensor) -> list[Tensor]:
    """Oracle: from the gradient in tau, G, to that in each parameter."""
    if kind in (Kind.FULL, Kind.TANGENT):
        return [g]
    if kind is Kind.LORA:
        return [delta.B.T @ g, g @ delta.A.T]
    return [(g * weight).sum(1, keepdim=True)]


@pytest.mark.parametrize("shares", [ALIKE, UNEQUAL])
@pytest.mark.parametrize("kind", KINDS)
def test_the_penaltys_gradient_is_the_closed_form_by_the_chain_rule_of_its_kind(kind, shares):
    deltas, rest = deltas_of(kind), rest_of(shares)
    for name, delta in deltas.items():
        part = {"share": shares[0], "beta": BETA}
        penalty = iel_penalty({name: delta()}, FISHER, rest, **part)
        actual = torch.autograd.grad(penalty, list(delta.parameters()))
        g = BETA * ((1 - shares[0]) * FISHER[name] * delta() - FISHER[name] * rest[name])
        assert_near(list(actual), chain_rule(kind, delta, g, THETA_0[name]))


@pytest.mark.parametrize("shares", [ALIKE, UNEQUAL])
def test_its_gradient_is_that_of_the_gap_of_theorem_1_over_the_clients_share(shares):
    """Times T where shares are equal: the authors' scaling. Half the difference of a quadratic form
    between two points is its derivative at their middle, exactly."""
    tau = {name: 0.3 * normal(*w.shape, seed=90) for name, w in THETA_0.items()}
    w = torch.tensor(shares, dtype=torch.float64)

    def gap(own: Weights) -> float:
        members = [own, *others()]
        gram = torch.stack([torch.stack([inner(a, b) for b in members]) for a in members])
        return composition_gap(gram, w)

    leaves = {name: change.clone().requires_grad_() for name, change in tau.items()}
    penalty = iel_penalty(leaves, FISHER, rest_of(shares), share=shares[0], beta=BETA)
    gradients = dict(zip(leaves, torch.autograd.grad(penalty, list(leaves.values())), strict=True))
    for seed in range(3):
        direction = random_like(THETA_0, seed=200 + 10 * seed)
        forth, back = (
            {name: tau[name] + sign * direction[name] for name in tau} for sign in (1, -1)
        )
        along_gap = BETA * (gap(forth) - gap(back)) / 2 / shares[0]
        along_penalty = sum(float((gradients[n] * direction[n]).sum()) for n in tau)
        assert along_penalty == pytest.approx(along_gap, rel=1e-9)


def test_whoever_is_alone_is_anchored_to_the_pre_trained_weights_with_half_the_strength():
    tau = tau_of(deltas_of(Kind.FULL))
    nobody = {name: torch.zeros_like(w) for name, w in THETA_0.items()}
    penalty = iel_penalty(tau, FISHER, nobody, share=1.0, beta=BETA)
    torch.testing.assert_close(penalty, BETA * 0.5 * 0.5 * inner(tau, tau), rtol=1e-12, atol=0)
    assert [own_strength(share) for share in (0.1, 0.5, 0.75, 1.0)] == [0.9, 0.5, 0.25, 0.5]


def written_objective(tau: Weights, strength: float, pull: Weights) -> Tensor:
    """Oracle: a/2 tau' F tau - <F tau, p>."""
    return 0.5 * strength * inner(tau, tau) - inner(tau, pull)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clipped", [False, True])
def test_the_explicit_step_goes_down_the_clipped_gradient_of_both_terms(kind, clipped):
    pull = {name: (1e4 if clipped else 1.0) * p for name, p in PULL.items()}
    deltas = deltas_of(kind)
    before = values_of(deltas)
    parameters = [p for delta in deltas.values() for p in delta.parameters()]
    gradients = torch.autograd.grad(written_objective(tau_of(deltas), 0.3, pull), parameters)
    norm = float(sum(g.square().sum() for g in gradients)) ** 0.5
    assert (norm > GRADIENT_LIMIT) == clipped
    explicit_step(deltas, FISHER, 0.3, 0.4, pull)
    share = min(1.0, GRADIENT_LIMIT / norm)
    expected = [p - 0.4 * share * g for p, g in zip(before, gradients, strict=True)]
    assert_near(values_of(deltas), expected)


def proximal_gradient(
    delta: Delta, name: str, parameter: Tensor, before: Tensor, strength: float, schedule: float
) -> Tensor:
    """Gradient of 1/2 |q - p|² + c [a/2 tau(q)' F tau(q) - <F tau(q), pull>] in one parameter q."""
    held = written_objective({name: delta()}, strength, PULL)
    objective = 0.5 * (parameter - before).square().sum() + schedule * held
    return torch.autograd.grad(objective, parameter)[0]


def assert_zero(gradient: Tensor) -> None:
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-8)


@pytest.mark.parametrize("strength", [0.0, 0.6, 1e4])
@pytest.mark.parametrize("kind", [Kind.FULL, Kind.IA3, Kind.TANGENT])
def test_the_implicit_step_ends_where_the_pulled_objective_is_least(kind, strength):
    deltas = deltas_of(kind)
    before = values_of(deltas)
    implicit_step(deltas, FISHER, strength, 0.5, PULL)
    for (name, delta), old in zip(deltas.items(), before, strict=True):
        (parameter,) = delta.parameters()
        assert not torch.equal(parameter, old)
        assert_zero(proximal_gradient(delta, name, parameter, old, strength, 0.5))


@pytest.mark.parametrize("strength", [0.0, 0.6, 1e4])
def test_of_a_lora_it_is_least_in_b_for_the_old_a_then_in_a_for_the_new_b(strength):
    deltas = deltas_of(Kind.LORA)
    before = {name: (d.A.detach().clone(), d.B.detach().clone()) for name, d in deltas.items()}
    implicit_step(deltas, FISHER, strength, 0.5, PULL)
    for name, delta in deltas.items():
        old_a, old_b = before[name]
        assert not torch.equal(delta.A, old_a)
        assert_zero(proximal_gradient(delta, name, delta.A, old_a, strength, 0.5))
        with torch.no_grad():
            delta.A.copy_(old_a)
        assert_zero(proximal_gradient(delta, name, delta.B, old_b, strength, 0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_strong_pull_towards_a_sum_ends_at_the_sum_over_the_strength(kind):
    """Without data only the penalty is left: (1 - w) tau = R, as far as the kind can."""
    target = tau_of(random_deltas(kind, THETA_0, seed=8))
    pull = {name: (0.75 * change).detach() for name, change in target.items()}
    deltas = random_deltas(kind, THETA_0, seed=9)
    for _ in range(200 if kind is Kind.LORA else 1):  # which alternates between its factors
        implicit_step(deltas, FISHER, 0.75, 1e6, pull)
    difference = {name: (tau_of(deltas)[name] - target[name]).detach() for name in target}
    assert inner(difference, difference) < 1e-3 * inner(target, target)


@pytest.mark.parametrize("step", [explicit_step, implicit_step])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pull_of_nothing_is_itas_step_bit_for_bit(kind, step):
    nothing = {name: torch.zeros_like(w) for name, w in THETA_0.items()}
    alone, pulled = deltas_of(kind), deltas_of(kind)
    step(alone, FISHER, 0.6, 0.5)
    step(pulled, FISHER, 0.6, 0.5, nothing)
    expected = values_of(alone)
    assert all(torch.equal(a, b) for a, b in zip(values_of(pulled), expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_halving_a_small_step_quarters_what_implicit_and_explicit_differ_by(kind):
    def difference(schedule: float) -> float:
        stepped = []
        for step in (explicit_step, implicit_step):
            deltas = deltas_of(kind)
            step(deltas, FISHER, 0.3, schedule, PULL)
            stepped.append(torch.cat([v.flatten() for v in values_of(deltas)]))
        return float((stepped[0] - stepped[1]).norm())

    assert difference(2e-3) / difference(1e-3) == pytest.approx(4, rel=0.02)


def test_the_number_of_clients_enters_by_their_sum_and_the_own_share_alone():
    """Two sets of others, of different number, with one sum: nothing can tell them apart."""
    many = others(5)
    summed = {name: sum(0.1 * tau[name] for tau in many) for name in THETA_0}
    one = {name: summed[name].clone() for name in THETA_0}
    tau = tau_of(deltas_of(Kind.FULL))
    penalties = [iel_penalty(tau, FISHER, r, share=0.5, beta=BETA) for r in (summed, one)]
    assert torch.equal(*penalties)
    assert set(inspect.signature(iel_penalty).parameters) == {
        "tau",
        "fisher",
        "rest",
        "share",
        "beta",
    }


@pytest.mark.parametrize("step", [explicit_step, implicit_step])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_leaves_what_pulls_and_the_fisher_alone(kind, step):
    pull, fisher = ({n: t.clone() for n, t in given.items()} for given in (PULL, FISHER))
    step(deltas_of(kind), fisher, 0.6, 0.5, pull)
    assert all(torch.equal(pull[name], PULL[name]) for name in PULL)
    assert all(torch.equal(fisher[name], FISHER[name]) for name in FISHER)
