"""A registry composes by a rule: joining, leaving, verifying, voting, here or elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import normal
from registry_builders import (
    QUICK,
    backbone,
    composition,
    member,
    one_of_each_kind,
    own_statistics,
    registry_of,
    same_bits,
    tangents,
)

from fedcompo.composition.lengths import squared_length
from fedcompo.composition.models import factor_of, stream_composition
from fedcompo.composition.rules import Changes, Rule, parse_rule
from fedcompo.composition.rules.parsing import RULES
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Coefficients, Kind, Method, Statistics
from fedcompo.config.run import RunConfig
from fedcompo.errors import ConfigError, ContributionError
from fedcompo.export.selection import from_registry
from fedcompo.registry.record_verification import _composed_again, verify_record
from fedcompo.registry.registry import Registry
from fedcompo.registry.verification import verify_registry
from fedcompo.storage.files import RULED, WEIGHTS

NEW = [name for name, rule in RULES.items() if name != "mean" and not rule.needs]
BOTH = ["ties", "iso-c"]
"""One of each class of removal; the second takes singular vectors."""


def by(text, **settings):
    return replace(QUICK, rule=parse_rule(text).text, **settings)


def removed(path, text, **settings):
    """A registry of ada and cho, which ben has left, and the record of that."""
    registry = registry_of(path, *one_of_each_kind(), settings=by(text, **settings))
    return registry, registry.remove("ben")


@pytest.mark.parametrize("text", NEW)
def test_who_leaves_was_never_there(text, tmp_path):
    registry, record = removed(tmp_path / "left", text)
    ada, _, cho = one_of_each_kind()
    never = registry_of(tmp_path / "never", ada, cho, settings=by(text))
    assert composition(registry) == composition(never)
    assert registry.state.root == never.state.root
    assert record.rule == registry.settings.rule
    assert all(finding.holds for finding in verify_registry(registry.path))
    path = registry.path / record.place
    assert all(finding.holds for finding in verify_record(path, registry=registry))


@pytest.mark.parametrize("text", NEW)
def test_the_model_is_the_rules_total_of_its_members(text, tmp_path):
    members = one_of_each_kind()
    registry = registry_of(tmp_path / "registry", *members, settings=by(text))
    rule, theta_p = parse_rule(text), registry.theta_p()
    for name, weight in backbone().theta_0.items():
        changes = Changes(name, weight, members, dict.fromkeys(registry.clients, 1))
        total = rule.total(changes)
        expected = weight.double() + registry.factor * total
        torch.testing.assert_close(theta_p[name], expected.float(), rtol=1e-6, atol=1e-8)
    assert (RULED in registry.state.files) == (not rule.is_sum)
    pool = registry.pool()
    assert factor_of(pool, registry.backbone, registry.settings).value == registry.factor
    streamed = stream_composition(pool, registry.backbone, None, registry.settings)
    assert same_bits(dict(streamed), theta_p)


def test_a_rule_says_the_factor_or_keeps_the_length(tmp_path):
    fixed, record = removed(tmp_path / "fixed", "task-arithmetic:lambda=0.3")
    assert (fixed.factor, fixed.state.factor_by, fixed.scale) == (0.3, "rule", 0.6)
    assert (record.factor_before, record.factor_after) == (0.3, 0.3)
    ties = registry_of(tmp_path / "ties", *one_of_each_kind(), settings=by("ties"))
    squares = [squared_length(ties.total()[name]) for name in ties.total()]
    mean_square = sum(own.squared_norm for own in ties.state.members.values()) / 3
    assert ties.factor == pytest.approx((mean_square / sum(squares)) ** 0.5, rel=1e-3)
    assert registry_of(
        tmp_path / "scaled", *one_of_each_kind(), settings=by("ties", scale=1.5)
    ).factor == pytest.approx(0.5)


@pytest.mark.parametrize("text", BOTH)
def test_the_voted_factor_stays_and_the_total_is_not_made_again(text, tmp_path, monkeypatch):
    registry = registry_of(tmp_path / "registry", *one_of_each_kind(), settings=by(text))
    before = dict(registry.total())
    with monkeypatch.context() as patched:
        patched.setattr(Rule, "on_grid", None)
        registry.realign(own_statistics(registry), factor=0.7)
    assert same_bits(dict(registry.total()), before)
    record = registry.remove("ben")
    assert (registry.factor, registry.state.factor_by) == (0.7, "vote")
    assert all(finding.holds for finding in verify_registry(registry.path))
    findings = verify_record(registry.path / record.place, registry=registry)
    assert all(finding.holds for finding in findings)


@pytest.mark.parametrize("text", ["norm-preserving", "task-arithmetic:lambda=0.3"])
def test_a_rule_that_says_the_factor_leaves_nothing_to_vote_on(text, tmp_path):
    registry = registry_of(tmp_path / "registry", *one_of_each_kind(), settings=by(text))
    with pytest.raises(ConfigError, match=f"composes by the rule {text}, so no factor"):
        registry.realign(own_statistics(registry), factor=0.7)


def test_a_fixed_scale_leaves_nothing_to_vote_on_whoever_is_there(tmp_path):
    registry = registry_of(tmp_path / "registry", settings=by("ties", scale=1.5))
    with pytest.raises(ConfigError, match=r"at the fixed scale 1\.5, so no factor"):
        registry.realign({}, factor=0.7)


@pytest.mark.parametrize("text", BOTH)
@pytest.mark.parametrize("size", [1e-9, 1.0])
def test_another_total_is_an_open_question_where_machines_differ(text, size, tmp_path, monkeypatch):
    registry, record = removed(tmp_path / "registry", text)
    kind, here = RULES[text], RULES[text].total

    def elsewhere(rule, changes):
        total = here(rule, changes)
        return total + size * total.abs().max() * normal(*total.shape, seed=1)

    monkeypatch.setattr(kind, "total", elsewhere)
    found = {f.claim: f for f in verify_registry(registry.path)}
    finding = found["the composition is that of the members"]
    assert finding.holds is (None if text == "iso-c" and size < 1 else False)
    assert (
        "rounds otherwise" in finding.detail or f"what {registry.settings.rule}" in finding.detail
    )
    record_findings = verify_record(registry.path / record.place, registry=registry)
    holds = {f.claim.rpartition(" ")[2]: f.holds for f in record_findings}
    if size < 1:
        assert holds[RULED] is (None if text == "iso-c" else False)
        assert holds[WEIGHTS] is (None if text == "iso-c" else False)
    else:
        assert holds["factor"] is (None if text == "iso-c" else False)


def test_a_record_of_another_factor_is_false_where_the_rules_total_is_the_same(tmp_path):
    registry, record = removed(tmp_path / "registry", "iso-c")
    altered = replace(record, factor_after=2 * record.factor_after)
    entries = registry.entries()
    found = {f.claim.rpartition(" ")[2]: f for f in _composed_again(altered, registry, entries)}
    assert (found[RULED].holds, found["factor"].holds) == (True, False)


def test_members_leave_and_return_among_rules_that_read_all_of_them(tmp_path):
    registry = registry_of(tmp_path / "registry", settings=by("tsv-m"))
    for own in one_of_each_kind():
        registry.add(own)
    together = registry_of(tmp_path / "together", *one_of_each_kind(), settings=by("tsv-m"))
    assert composition(registry) == composition(together)
    registry.add(member("ben", Kind.LORA, seed=7, classes=("dog", "owl")), replacing=True)
    registry.remove("ada")
    registry.remove("cho")
    registry.remove("ben")
    registry.add(*one_of_each_kind())
    assert composition(registry) == composition(together)


def test_tangents_and_mixtures_are_composed_by_rules_too(tmp_path):
    registry = registry_of(tmp_path / "tangents", *tangents(), settings=by("ties"))
    assert registry.linearised
    mixed = one_of_each_kind(Statistics.MIXTURES)
    settings = replace(by("ties"), statistics=Statistics.MIXTURES, align_samples=8, scale=1.0)
    older = registry_of(tmp_path / "mixtures", *mixed, settings=settings)
    for each in (registry, older):
        assert all(finding.holds for finding in verify_registry(each.path))


def test_what_is_altered_is_found(tmp_path):
    registry = registry_of(tmp_path / "registry", *one_of_each_kind(), settings=by("ties"))
    (registry.path / registry.state.version / RULED).write_bytes(b"something else")
    assert not all(f.holds for f in verify_registry(registry.path))


# -- chosen on the spot ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["task-arithmetic", *BOTH])
def test_a_registry_of_the_mean_is_composed_by_any_rule(text, tmp_path):
    registry = registry_of(tmp_path / "registry", *one_of_each_kind())
    there = registry_of(tmp_path / "ruled", *one_of_each_kind(), settings=by(text))
    chosen = from_registry(registry, rule=text)
    assert same_bits(dict(chosen.stream()), there.theta_p())
    assert (chosen.factor, chosen.scale) == (there.factor, pytest.approx(there.scale))
    assert same_bits(dict(from_registry(there).stream()), there.theta_p())
    back = dict(from_registry(there, rule="mean").stream())
    assert same_bits(back, registry.theta_p())
    some = from_registry(there, without=["ben"])
    there.remove("ben")
    assert same_bits(dict(some.stream()), there.theta_p())


def test_weights_go_where_the_equation_has_them(tmp_path):
    registry = registry_of(tmp_path / "registry", *one_of_each_kind())
    weights = {"ada": 0.5, "ben": 0.25, "cho": 0.25}
    name = "blocks.0.mlp.fc1.weight"
    for text in ("task-arithmetic:lambda=1", "ties", "dare", "iso-c"):
        chosen = from_registry(registry, rule=text, weights=weights)
        changes = Changes(name, registry.backbone.tensors[name], one_of_each_kind(), weights)
        expected = changes.weight.double() + chosen.factor * parse_rule(text).total(changes)
        actual = dict(chosen.stream())[name]
        torch.testing.assert_close(actual, expected.float(), rtol=1e-6, atol=1e-8)
    with pytest.raises(ContributionError, match="tsv-m has no weights"):
        from_registry(registry, rule="tsv-m", weights=weights)
    with pytest.raises(ConfigError, match="says λ itself; leave out `scale`"):
        from_registry(registry, rule="task-arithmetic", scale=2.0)
    with pytest.raises(ConfigError, match="no rule 'tis'"):
        from_registry(registry, rule="tis")


# -- as a setting ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rule": "tis"}, "no rule 'tis'"),
        ({"rule": "ties:density=0"}, "`density` must be in"),
        ({"rule": "ties", "method": "iel"}, "iel trains for the mean"),
        ({"rule": "norm-preserving", "method": "fedavg"}, "fedavg trains for the mean"),
        ({"rule": "task-arithmetic", "scale": "1"}, "says λ itself"),
        ({"rule": "task-arithmetic", "statistics": "mixtures"}, "says λ itself"),
        ({"rule": "tsv-m", "coefficients": "examples"}, "has no weights in its equation"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        CompositionSettings.of(RunConfig.parse(values))


def test_older_registries_do_not_name_a_rule():
    assert "rule" not in CompositionSettings.of(RunConfig.parse({})).values
    settings = CompositionSettings.of(
        RunConfig.parse({"rule": " ties", "coefficients": "examples"})
    )
    assert settings.values["rule"] == "ties:density=0.2"
    assert settings.coefficients is Coefficients.EXAMPLES
    assert CompositionSettings.parse(settings.values) == settings
    settings.check_method(Method.ITA)


def test_a_registry_is_opened_with_its_rule(tmp_path):
    registry = registry_of(tmp_path / "registry", *one_of_each_kind(), settings=by("ties"))
    assert Registry(registry.path).settings == registry.settings
    assert Registry(registry.path).settings.made_by == parse_rule("ties")
