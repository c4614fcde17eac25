"""Whatever came and went, and in which order: the state is that of who is left, bit for bit."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import MIXABLE
from hypothesis import given, settings
from hypothesis import strategies as st
from registry_builders import (
    backbone,
    composition,
    exact_term,
    member,
    own_statistics,
    registry_of,
    same_bits,
)

from fedcompo.composition.fixed_point import BITS
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Coefficients, Kind, Statistics
from fedcompo.method.contribution import Contribution
from fedcompo.method.pool import Pool
from fedcompo.registry.registry import Registry

CLASSES = (("cat", "dog"), ("dog", "owl"), ("cat",), ("owl", "yak", "zebu"))


@dataclass(frozen=True)
class Spec:
    """What a contribution is made of; the same spec always makes the same one."""

    client: str
    kind: Kind
    seed: int
    classes: tuple[str, ...]
    num_examples: int
    statistics: Statistics = Statistics.SUMS

    @functools.cache  # noqa: B019  (specs are few, and live as long as the tests)
    def made(self) -> Contribution:
        made = member(
            self.client,
            self.kind,
            seed=self.seed,
            classes=self.classes,
            num_examples=self.num_examples,
            with_fisher=self.seed != 2,
            statistics=self.statistics,
        )
        if self.seed == 1:  # of the seeds, each has its own form of the Fisher, or none
            made = replace(made, fisher=made.fisher.reduced())
        return made

    @functools.cache  # noqa: B019  (specs are few, and live as long as the tests)
    def term(self, name: str) -> list[list[int]]:
        return exact_term(self.made().task_vector, name, backbone().theta_0[name])


def specs(kinds: Sequence[Kind], most: int) -> st.SearchStrategy[list[Spec]]:
    """Some contributions of different clients."""
    one = st.builds(
        Spec,
        st.sampled_from(("ada", "ben", "cho", "dee", "eva")),
        st.sampled_from(kinds),
        st.integers(0, 2),
        st.sampled_from(CLASSES),
        st.sampled_from((3, 7, 40)),
    )
    return st.lists(one, min_size=1, max_size=most, unique_by=lambda s: s.client)


factors = st.sampled_from((None, None, 0.0, 0.25, 0.7))
"""Of a vote; None: nobody votes."""


def steps(kinds: Sequence[Kind], least: int, most: int) -> st.SearchStrategy[list[Any]]:
    """What happens to a registry."""
    step = st.one_of(
        st.tuples(st.just("put"), specs(kinds, 3)),
        st.tuples(st.just("remove"), st.integers(0, 4)),
        st.tuples(st.just("realign"), st.tuples(st.integers(0, 2), factors)),
    )
    return st.lists(step, min_size=least, max_size=most)


together = st.sampled_from((MIXABLE, (Kind.TANGENT,)))
"""Kinds that may meet in a registry."""
selections = together.flatmap(lambda kinds: specs(kinds, 4))
compositions = st.builds(
    CompositionSettings,
    coefficients=st.sampled_from(Coefficients),
    scale=st.sampled_from((None, None, None, 1.0, 0.3, 2.5)),
)


@dataclass
class Expected:
    """Who is in, by the plainest bookkeeping there is."""

    specs: dict[str, Spec] = field(default_factory=dict)
    realigned: int | None = None
    voted: float | None = None

    def step(self, registry: Registry, action: str, value: Any) -> None:
        """Do the same to the registry and to the books."""
        if action == "put":
            registry.add(*(spec.made() for spec in value), replacing=True)
            self.specs |= {spec.client: spec for spec in value}
            self.realigned = None
        elif action == "remove" and self.specs:
            client, before = sorted(self.specs)[value % len(self.specs)], registry.factor
            record = registry.remove(client)
            del self.specs[client]
            assert record.survivors == tuple(sorted(self.specs))
            assert (record.root_after, record.recomposed) == (registry.state.root, False)
            after = registry.factor, registry.state.factor_by
            assert (record.factor_before, record.factor_after, record.factor_by) == (before, *after)
            self.realigned = None
        elif action == "realign" and self.specs:
            self.realigned, voted = value
            if registry.settings.scale is None and voted is not None:
                self.voted = voted
            self.align(registry, self.realigned, voted)
        if not self.specs:
            self.voted = None

    def align(self, registry: Registry, seed: int, voted: float | None) -> None:
        """Make the joint head again; a fixed scale leaves nothing to vote on."""
        factor = voted if registry.settings.scale is None else None
        registry.realign(own_statistics(registry, seed=seed), factor=factor)

    def rebuilt(self, path: Path, order: Sequence[Spec], settings: CompositionSettings) -> Registry:
        """A registry that was never given anyone else."""
        registry = registry_of(path, settings=settings)
        for number, spec in enumerate(order):
            registry.add(spec.made())
            if number == 0 and self.voted is not None:
                self.align(registry, 0, self.voted)
        if self.voted is not None and len(order) == 1:  # a change of members takes the head back
            registry.add(order[0].made(), replacing=True)
        if self.realigned is not None:
            self.align(registry, self.realigned, None)
        return registry


def assert_same(registry: Registry, other: Registry) -> None:
    assert registry.state.root == other.state.root
    assert (registry.clients, registry.classes) == (other.clients, other.classes)
    assert composition(registry) == composition(other)
    assert registry.state.chosen == other.state.chosen
    if registry.clients:
        assert same_bits(dict(registry.running_sum()), dict(other.running_sum()))
        assert same_bits(registry.theta_p(), other.theta_p())
        head, others = registry.joint_head(), other.joint_head()
        assert torch.equal(head.weight, others.weight) and torch.equal(head.bias, others.bias)


def assert_exact(registry: Registry, present: Mapping[str, Spec]) -> None:
    """Sums, factor and composed weights, in Python's integers and fractions."""
    count, times, squared = 0, {}, 0
    energy: dict[str, int] = dict.fromkeys(present, 0)
    for client, spec in present.items():
        by_examples = registry.settings.coefficients is Coefficients.EXAMPLES
        times[client] = spec.num_examples if by_examples else 1
        count += times[client]
    running, theta_p = registry.running_sum(), registry.theta_p()
    for name, weight in backbone().theta_0.items():
        total = np.zeros(tuple(weight.shape), dtype=object)
        for client, spec in present.items():
            term = np.array(spec.term(name), dtype=object)
            total = total + times[client] * term
            energy[client] += int((term * term).sum())
        assert running[name].tolist() == total.tolist()
        squared += int((total * total).sum())
        start, found = weight.tolist(), theta_p[name].tolist()
        factor = registry.factor / 2**BITS  # a float64, as the method states
        for i, j in np.ndindex(*weight.shape):
            assert found[i][j] == np.float32(float(total[i][j]) * factor + start[i][j])
        # and against the formula itself, with no rounding at all: half a unit of float32
        i, j = np.unravel_index(np.abs(total.astype(float)).argmax(), total.shape)
        exact = Fraction(start[i][j]) + Fraction(registry.factor) * total[i][j] / 2**BITS
        half = abs(np.spacing(np.float32(exact))) / 2
        assert abs(Fraction(found[i][j]) - exact) <= Fraction(float(half)) * Fraction(1001, 1000)
    if registry.state.factor_by == "norms":
        mean = Fraction(sum(times[c] * energy[c] for c in present), count)
        expected = min(math.sqrt(mean / squared), len(present) / count)
        assert registry.factor == pytest.approx(expected, rel=6e-4)
    elif registry.state.factor_by == "fixed":
        assert registry.factor == registry.settings.scale / count
    assert_totals(registry, [spec.made() for spec in present.values()])


def assert_totals(registry: Registry, members: Sequence[Contribution]) -> None:
    """Statistics, added up by hand."""
    total = registry.total_statistics()
    for row, name in enumerate(total.classes):
        rows = [(m.statistics, m.statistics.classes.index(name)) for m in members
                if name in m.statistics.classes]  # fmt: skip
        assert total.counts[row] == sum(int(own.counts[i]) for own, i in rows)
        assert total.sums[row].tolist() == sum(own.sums[i] for own, i in rows).tolist()
    assert total.second.tolist() == sum(m.statistics.second for m in members).tolist()


@settings(max_examples=15)
@given(together.flatmap(lambda kinds: steps(kinds, 1, 6)), compositions, st.data())
def test_state_is_that_of_a_registry_given_the_survivors_only(changes, how, data):
    with tempfile.TemporaryDirectory() as folder:
        registry, expected = registry_of(Path(folder) / "lived", settings=how), Expected()
        for action, value in changes:
            expected.step(registry, action, value)
            assert registry.clients == tuple(sorted(expected.specs))
        reopened = Registry(registry.path)
        assert reopened.state == registry.state
        order = data.draw(st.permutations(list(expected.specs.values())))
        assert_same(reopened, expected.rebuilt(Path(folder) / "anew", order, how))
        if expected.specs:
            assert_exact(reopened, expected.specs)


@settings(max_examples=8)
@given(together.flatmap(lambda kinds: steps(kinds, 2, 6)), compositions)
def test_state_is_right_after_every_single_step(changes, how):
    with tempfile.TemporaryDirectory() as folder:
        registry, expected = registry_of(Path(folder) / "lived", settings=how), Expected()
        for number, (action, value) in enumerate(changes):
            expected.step(registry, action, value)
            order = list(expected.specs.values())
            assert_same(registry, expected.rebuilt(Path(folder) / str(number), order, how))


@settings(max_examples=10)
@given(selections, compositions, st.data())
def test_any_selection_composes_as_if_the_others_had_never_come(chosen, how, data):
    only = data.draw(st.sets(st.sampled_from(chosen), min_size=1))
    shares = {s.client: data.draw(st.floats(0.1, 1)) for s in only}
    weights = {client: share / sum(shares.values()) for client, share in shares.items()}
    with tempfile.TemporaryDirectory() as folder:
        registry = registry_of(Path(folder) / "all", *(s.made() for s in chosen), settings=how)
        few = registry_of(Path(folder) / "few", *(s.made() for s in only), settings=how)
        left_out = [s.client for s in chosen if s not in only]
        for model in (registry.model(only=list(shares)), registry.model(without=left_out)):
            assert same_bits(model.state_dict(), few.model().state_dict())
            assert few.linearised or same_bits(model.state_dict(), dict(few.composed()))
        pool = Pool(tuple(s.made() for s in only))
        theta_0, scale = backbone().theta_0, 2.5
        assert same_bits(
            registry.pool().without(*left_out).compose(theta_0, weights, scale=scale),
            pool.compose(theta_0, weights, scale=scale),
        )


@settings(max_examples=6)
@given(selections, st.data())
def test_contributions_may_come_as_folders_or_from_another_registry(chosen, data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = registry_of(folder / "given", *(s.made() for s in chosen))
        for spec in chosen:
            spec.made().save(folder / "inbox" / spec.client)
        from_folders = registry_of(folder / "b")
        from_folders.add(*(folder / "inbox" / s.client for s in data.draw(st.permutations(chosen))))
        from_registry = registry_of(folder / "c")
        from_registry.add(*given.pool(with_fisher=True))
        assert_same(from_folders, given)
        assert_same(from_registry, given)
