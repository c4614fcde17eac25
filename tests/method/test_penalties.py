"""The penalties' values, gradients and steps, against the sums that their equations write."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from builders import KINDS, normal, pico_weights, random_deltas, random_like
from torch import Tensor

from fedcompo.composition.diagnostics import composition_gap
from fedcompo.config.choices import Kind
from fedcompo.method.deltas import Delta, Weights
from fedcompo.method.penalties import (
    GRADIENT_LIMIT,
    bounding_step,
    explicit_step,
    iel_penalty,
    implicit_step,
    ita_penalty,
    own_strength,
)

THETA_0 = pico_weights()
FISHER = random_like(THETA_0, seed=7, positive=True)
PULL = random_like(THETA_0, seed=40)
ALPHA, BETA = 0.3, 0.7
ALIKE = (0.25, 0.25, 0.25, 0.25)
UNEQUAL = (0.4, 0.1, 0.2, 0.3)
"""Shares of four clients; the first one trains."""
STEPS = [explicit_step, implicit_step]
Step = Callable[[dict[str, Delta], Weights, float, float], None]
pulls = pytest.mark.parametrize("pull", [None, PULL], ids=["ita", "iel"])


def deltas_of(kind: Kind, *, scale: float = 0.5) -> dict[str, Delta]:
    return random_deltas(kind, THETA_0, seed=3, scale=scale)


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


def written_penalty(tau: Weights, strength: float, pull: Weights | None = None) -> Tensor:
    """Oracle: a/2 tau' F tau - <F tau, p>."""
    penalty = 0.5 * strength * inner(tau, tau)
    return penalty if pull is None else penalty - inner(tau, pull)


# -- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_anchor_is_the_written_quadratic_form(kind):
    tau = tau_of(deltas_of(kind))
    expected = written_penalty(tau, ALPHA)
    torch.testing.assert_close(ita_penalty(tau, FISHER, ALPHA), expected, rtol=1e-12, atol=0)


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


@pytest.mark.parametrize("kind", KINDS)
def test_the_anchors_gradient_follows_the_chain_rule_of_its_kind(kind):
    for name, delta in deltas_of(kind).items():
        penalty = ita_penalty({name: delta()}, FISHER, ALPHA)
        actual = torch.autograd.grad(penalty, list(delta.parameters()))
        g = ALPHA * FISHER[name] * delta()
        assert_near(list(actual), chain_rule(kind, delta, g, THETA_0[name]))


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


def test_the_anchor_does_nothing_at_the_pre_trained_weights():
    tau = {name: torch.zeros_like(weight) for name, weight in THETA_0.items()}
    assert ita_penalty(tau, FISHER, 100.0) == 0


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


# -- steps ----------------------------------------------------------------------------------------


@pulls
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clipped", [False, True])
def test_the_explicit_step_goes_down_the_clipped_gradient(kind, clipped, pull):
    strength = 1e4 if clipped else ALPHA
    deltas = deltas_of(kind)
    before = values_of(deltas)
    parameters = [p for delta in deltas.values() for p in delta.parameters()]
    gradients = torch.autograd.grad(written_penalty(tau_of(deltas), strength, pull), parameters)
    norm = float(sum(g.square().sum() for g in gradients)) ** 0.5
    assert (norm > GRADIENT_LIMIT) == clipped
    explicit_step(deltas, FISHER, strength, 0.4, pull)
    share = min(1.0, GRADIENT_LIMIT / norm)
    expected = [p - 0.4 * share * g for p, g in zip(before, gradients, strict=True)]
    assert_near(values_of(deltas), expected)


def assert_least(
    delta: Delta,
    name: str,
    parameter: Tensor,
    before: Tensor,
    strength: float,
    pull: Weights | None,
) -> None:
    """The gradient in one parameter q of 1/2 |q - before|² + c penalty(q) is zero, for c = 0.5."""
    held = written_penalty({name: delta()}, strength, pull)
    objective = 0.5 * (parameter - before).square().sum() + 0.5 * held
    gradient = torch.autograd.grad(objective, parameter)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-8)


@pulls
@pytest.mark.parametrize("strength", [0.0, 0.6, 2e4])
@pytest.mark.parametrize("kind", [Kind.FULL, Kind.IA3, Kind.TANGENT])
def test_the_implicit_step_ends_where_the_proximal_objective_is_least(kind, strength, pull):
    deltas = deltas_of(kind)
    before = values_of(deltas)
    implicit_step(deltas, FISHER, strength, 0.5, pull)
    for (name, delta), old in zip(deltas.items(), before, strict=True):
        (parameter,) = delta.parameters()
        assert torch.equal(parameter, old) == (strength == 0 and pull is None)
        assert_least(delta, name, parameter, old, strength, pull)


@pulls
@pytest.mark.parametrize("strength", [0.0, 0.6, 2e4])
def test_of_a_lora_it_is_least_in_b_for_the_old_a_then_in_a_for_the_new_b(strength, pull):
    deltas = deltas_of(Kind.LORA)
    before = {name: (d.A.detach().clone(), d.B.detach().clone()) for name, d in deltas.items()}
    implicit_step(deltas, FISHER, strength, 0.5, pull)
    for name, delta in deltas.items():
        old_a, old_b = before[name]
        assert torch.equal(delta.A, old_a) == (strength == 0 and pull is None)
        assert_least(delta, name, delta.A, old_a, strength, pull)
        with torch.no_grad():
            delta.A.copy_(old_a)
        assert_least(delta, name, delta.B, old_b, strength, pull)


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


@pulls
@pytest.mark.parametrize("kind", KINDS)
def test_halving_a_small_step_quarters_what_implicit_and_explicit_differ_by(kind, pull):
    def difference(schedule: float) -> float:
        stepped = []
        for step in STEPS:
            deltas = deltas_of(kind)
            step(deltas, FISHER, ALPHA, schedule, pull)
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


@pulls
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_leaves_theta_0_the_fisher_and_the_pull_alone(step, kind, pull):
    given = {"theta_0": THETA_0, "fisher": FISHER, "pull": pull or {}}
    copies = {name: {n: t.clone() for n, t in each.items()} for name, each in given.items()}
    deltas = random_deltas(kind, copies["theta_0"], seed=3)
    step(deltas, copies["fisher"], 10.0, 1.0, copies["pull"] or None)
    for name, each in given.items():
        assert all(torch.equal(copies[name][n], each[n]) for n in each)


# -- the trust region -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_within_the_trust_region_no_bit_changes(kind):
    deltas = deltas_of(kind)
    tau = tau_of(deltas)
    before, limit = values_of(deltas), 1.0001 * 0.5 * float(inner(tau, tau).detach())
    assert float(bounding_step(deltas, FISHER, limit)) == 0
    assert all(map(torch.equal, values_of(deltas), before))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.9, 0.1, 1e-6])
def test_a_change_that_went_too_far_is_brought_back_inside(kind, share):
    deltas = deltas_of(kind)
    tau = {name: change.detach().clone() for name, change in tau_of(deltas).items()}
    limit = share * 0.5 * float(inner(tau, tau))
    moved = float(bounding_step(deltas, FISHER, limit))
    after = {name: change.detach() for name, change in tau_of(deltas).items()}
    assert 0.99 * limit <= 0.5 * float(inner(after, after)) <= limit
    left = (limit * 0.999 / (0.5 * float(inner(tau, tau)))) ** 0.5
    assert_near(list(after.values()), [left * change for change in tau.values()])
    apart = sum(float((after[name] - tau[name]).square().sum()) for name in tau) ** 0.5
    assert moved == pytest.approx(apart)


@pytest.mark.parametrize("kind", KINDS)
def test_the_unit_of_fisher_and_limit_has_no_say(kind):
    one, other = deltas_of(kind), deltas_of(kind)
    limit = 0.05 * float(inner(tau_of(one), tau_of(one)).detach())
    bounding_step(one, FISHER, limit)
    bounding_step(other, {name: 1024.0 * f for name, f in FISHER.items()}, 1024.0 * limit)
    assert_near(values_of(other), values_of(one))
