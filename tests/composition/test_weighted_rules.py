"""Means weighted by what members know of their data, against slow oracles in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import KINDS, normal, random_like
from registry_builders import QUICK, backbone, member
from torch import Tensor

from fedcompo.composition.rules import Changes, parse_rule
from fedcompo.config.choices import Kind
from fedcompo.errors import ContributionError
from fedcompo.method.contribution import Contribution
from fedcompo.method.fisher import INPUTS, FisherDiagonal
from fedcompo.method.kronecker import thin_shape
from fedcompo.registry.registry import Registry

THETA_0 = backbone().theta_0
NAME = min(THETA_0)
OUT, IN = THETA_0[NAME].shape
RULES = "fisher", "regmean"
TIMES = {"ada": 3, "ben": 1, "cho": 2}


def fisher_of(seed: int, form: str = "dense", count: int = 7) -> FisherDiagonal:
    """Random sums of any form for all target weights, with squares of inputs."""
    sums = random_like(THETA_0, seed=seed, positive=True)
    inputs = {
        f"{name}{INPUTS}": normal(weight.shape[1], seed=seed + i, dtype=torch.float32).square()
        for i, (name, weight) in enumerate(THETA_0.items())
    }
    fisher = FisherDiagonal(sums, count, inputs)
    if form == "factored":
        return fisher.reduced()
    if form == "kronecker":
        ends = (("/left", 0), ("/right", 1))
        thin = {
            name + end: normal(*thin_shape(weight.shape[axis]), seed=seed, dtype=torch.float32)
            for name, weight in THETA_0.items()
            for end, axis in ends
        }
        return FisherDiagonal(thin, count, inputs)
    return fisher


def members(form: str = "dense", kinds: tuple[Kind, ...] = KINDS[:3]) -> list[Contribution]:
    return [
        replace(member(client, kind, seed=i), fisher=fisher_of(10 * i + 1, form, count=5 + i))
        for i, (client, kind) in enumerate(zip(TIMES, kinds, strict=False))
    ]


def changes(own: list[Contribution], times: dict[str, float] = TIMES) -> Changes:
    return Changes(NAME, THETA_0[NAME], own, times)


def taus(own: list[Contribution]) -> list[Tensor]:
    return [change.tau for change in changes(own)]


def diagonal_by_hand(fisher: FisherDiagonal) -> Tensor:
    """Entry by entry, in Python's numbers."""
    sums = {name: total.double() for name, total in fisher.sums.items()}
    if NAME in sums:
        return sums[NAME] / fisher.num_examples
    if f"{NAME}/rows" in sums:
        r, c = sums[f"{NAME}/rows"].tolist(), sums[f"{NAME}/columns"].tolist()
    else:
        sides = (sums[f"{NAME}/left"], sums[f"{NAME}/right"])
        r, c = ([sum(v * v for v in row) for row in side.tolist()] for side in sides)
    total = (sum(r) * sum(c)) ** 0.5
    return torch.tensor([[a * b / total for b in c] for a in r]).double() / fisher.num_examples


@pytest.mark.parametrize("form", ["dense", "factored", "kronecker"])
def test_fisher_weighted_is_its_equation(form):
    own = members(form)
    weights = [TIMES[c.client] * diagonal_by_hand(c.fisher) for c in own]
    above, below = torch.zeros(OUT, IN).double(), torch.zeros(OUT, IN).double()
    for i in range(OUT):
        for j in range(IN):
            for w, tau in zip(weights, taus(own), strict=True):
                above[i, j] += w[i, j] * tau[i, j]
                below[i, j] += w[i, j]
    actual = parse_rule("fisher").total(changes(own))
    torch.testing.assert_close(actual, 6 * above / below, rtol=1e-6, atol=1e-12)


def test_regmean_is_the_least_squares_solution_with_diagonal_gram_matrices():
    own = members()
    grams = [
        TIMES[c.client]
        * torch.diag(c.fisher.inputs[NAME + INPUTS].double())
        / c.fisher.num_examples
        for c in own
    ]
    theta = [THETA_0[NAME].double() + tau for tau in taus(own)]
    right = sum(gram @ weight.T for gram, weight in zip(grams, theta, strict=True))
    expected = torch.linalg.solve(sum(grams), right).T - THETA_0[NAME].double()
    actual = parse_rule("regmean").total(changes(own)) / 6
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_where_nobody_weighs_anything_it_is_the_mean(rule):
    own = members()
    for each in own:
        each.fisher.sums[NAME][:, 2] = 0
        each.fisher.inputs[NAME + INPUTS][2] = 0
    total, plain = (parse_rule(text).total(changes(own)) for text in (rule, "mean"))
    assert torch.equal(total[:, 2], plain[:, 2])
    assert not torch.isclose(total[:, 3:], plain[:, 3:]).any()


@pytest.mark.parametrize("rule", RULES)
def test_whoever_alone_weighs_something_decides_and_equals_make_the_mean(rule):
    own = members()
    alone = replace(own[0].fisher, sums=dict(own[0].fisher.sums))
    none = {n: torch.zeros_like(t) for n, t in alone.tensors.items()}
    rest = [replace(c, fisher=FisherDiagonal.read(none, 4)) for c in own[1:]]
    total = parse_rule(rule).on_grid(changes([own[0], *rest]))
    assert torch.equal(total, 6 * parse_rule(rule).on_grid(changes(own[:1], {"ada": 1})))
    same = [replace(c, fisher=alone) for c in own]
    equal, plain = (parse_rule(text).on_grid(changes(same)) for text in (rule, "mean"))
    assert (equal - plain).abs().max() <= 1


@pytest.mark.parametrize("rule", RULES)
def test_who_lacks_what_the_rule_needs_is_named_with_what_to_do(rule):
    ada, ben, cho = members()
    lacking = replace(cho, fisher=None if rule == "fisher" else replace(cho.fisher, inputs={}))
    with pytest.raises(ContributionError, match=r"which cho did not send.*`keep-fisher = true`"):
        parse_rule(rule).check([ada, ben, lacking], TIMES)
    parse_rule(rule).check([ada, ben, cho], TIMES)


def test_weights_below_zero_and_fishers_in_two_units_are_refused():
    own = members()
    for rule in ("regmean", "fisher", "ties", "iso-c", "dare"):
        with pytest.raises(ContributionError, match="counts less than nothing"):
            parse_rule(rule).check(own, {**TIMES, "ben": -1})
    parse_rule("mean").check(own, {**TIMES, "ben": -1})
    other = {"statistics": "sums", "curvature": "exact"}
    mixed = [own[0], replace(own[1], settings=other), own[2]]
    with pytest.raises(ContributionError, match="'ada' is of the features, that of 'ben'"):
        parse_rule("fisher").check(mixed, TIMES)
    parse_rule("regmean").check(mixed, TIMES)


@pytest.mark.parametrize("rule", RULES)
def test_a_registry_without_a_client_is_one_that_never_had_it(rule, tmp_path):
    settings = replace(QUICK, rule=rule)
    first, second = (Registry.create(tmp_path / n, backbone(), settings) for n in "ab")
    own = members("factored")
    first.add(*own)
    first.remove("ben")
    second.add(own[0])
    second.add(own[2])
    assert not list((tmp_path / "a").rglob("*ben*/*"))
    for one, other in ((first.total(), second.total()), (first.composed(), second.composed())):
        assert all(torch.equal(one[name], other[name]) for name in other)
    before = first.state.root
    with pytest.raises(ContributionError, match=f"The rule {rule} needs .* which dee did not send"):
        first.add(member("dee"))
    assert first.state.root == before
