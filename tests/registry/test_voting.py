"""A factor and a shrinkage that the clients chose: kept, composed with, and in every record."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from registry_builders import (
    OF_MIXTURES,
    QUICK,
    backbone,
    contents,
    member,
    one_of_each_kind,
    own_statistics,
    registry_of,
    three_clients,
)

from fedcompo.composition.head import SHRINKAGE, head_from_total
from fedcompo.composition.totals import exact_tensors
from fedcompo.config.choices import Statistics
from fedcompo.errors import ConfigError, ContributionError, RegistryError
from fedcompo.method.statistics import total_of
from fedcompo.registry import draft
from fedcompo.registry.record_verification import verify_record
from fedcompo.registry.registry import Registry
from fedcompo.registry.removal import RemovalRecord
from fedcompo.registry.verification import verify_registry
from fedcompo.storage.files import OLD_TOTALS, REALIGNED, TOTALS
from fedcompo.storage.tensorstream import save_streamed


@pytest.fixture
def registry(tmp_path):
    return three_clients(tmp_path / "registry")


def test_a_vote_recomposes_with_its_factor_and_head(registry):
    given = own_statistics(registry, seed=4)
    registry.realign(given, factor=0.75)
    assert (registry.factor, registry.state.factor_by, registry.state.shrinkage) == (
        0.75,
        "vote",
        SHRINKAGE,
    )
    assert registry.scale == pytest.approx(2.25)
    expected = registry.pool().compose(backbone().theta_0, scale=2.25)
    for name, weight in registry.theta_p().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6)
    head = head_from_total(total_of(given.values()), SHRINKAGE)
    assert torch.equal(registry.joint_head().weight, head.weight)
    assert all(finding.holds for finding in verify_registry(registry.path))


def test_the_sum_of_all_statistics_gives_what_those_of_each_give(registry, tmp_path):
    other = three_clients(tmp_path / "other")
    given = own_statistics(registry, seed=4)
    registry.realign(given, factor=0.75)
    other.realign(total_of(given.values()), factor=0.75)
    assert other.state.root == registry.state.root
    with pytest.raises(ContributionError, match="statistics of all members"):
        other.realign(given["ada"])


def test_the_frozen_backbone_may_win(registry):
    registry.realign(own_statistics(registry), factor=0.0)
    assert registry.scale == 0
    theta_p = registry.theta_p()
    assert all(torch.equal(theta_p[n], w) for n, w in backbone().theta_0.items())
    assert all(finding.holds for finding in verify_registry(registry.path))


def test_a_voted_factor_stays_until_the_next_vote_and_the_head_does_not(registry):
    registry.realign(own_statistics(registry), factor=0.75)
    registry.add(member("dee", seed=9))
    assert (registry.factor, registry.state.factor_by, registry.state.shrinkage) == (
        0.75,
        "vote",
        SHRINKAGE,
    )
    assert not registry.realigned
    registry.realign(own_statistics(registry))
    assert (registry.factor, registry.state.factor_by, registry.state.shrinkage) == (
        0.75,
        "vote",
        SHRINKAGE,
    )
    record = registry.remove("ada")
    assert (record.factor_before, record.factor_after, record.factor_by) == (0.75, 0.75, "vote")
    for client in registry.clients:
        record = registry.remove(client)
    assert (record.factor_before, record.factor_after, record.factor_by) == (0.75, 0.0, "")
    registry.add(member("eva"))
    assert registry.state.factor_by == "norms"


def test_without_a_vote_the_factor_is_computed_over_who_is_there(registry, tmp_path):
    before = registry.factor
    record = registry.remove("ada")
    never = registry_of(tmp_path / "never", *one_of_each_kind()[1:])
    after = never.factor
    assert before != after
    assert (record.factor_before, record.factor_after, record.factor_by) == (before, after, "norms")
    assert RemovalRecord.parse(record.text.encode(), source="it") == record
    assert record.format_version == 2


def test_a_record_is_verified_with_the_shrinkage_of_its_time(registry, monkeypatch):
    monkeypatch.setattr(draft, "SHRINKAGE", 0.1)
    record = registry.remove("ada")
    monkeypatch.undo()
    assert registry.state.shrinkage == 0.1 != SHRINKAGE
    findings = verify_record(registry.path / record.place, registry=registry)
    assert all(finding.holds for finding in findings)


def test_a_fixed_scale_is_divided_by_who_is_there(tmp_path):
    settings = replace(QUICK, scale=1.5)
    registry = registry_of(tmp_path / "r", *one_of_each_kind(), settings=settings)
    assert (registry.factor, registry.state.factor_by, registry.scale) == (0.5, "fixed", 1.5)
    record = registry.remove("ada")
    assert (record.factor_before, record.factor_after, record.factor_by) == (0.5, 0.75, "fixed")
    with pytest.raises(ConfigError, match=r"fixed scale 1\.5"):
        registry.realign(own_statistics(registry), factor=0.3)


@pytest.mark.parametrize("factor", [-0.1, math.nan, math.inf])
def test_factors_that_cannot_be_composed_with_change_nothing(factor, registry):
    before = contents(registry.path)
    with pytest.raises(ConfigError, match="A factor must be"):
        registry.realign(own_statistics(registry), factor=factor)
    assert contents(registry.path) == before


# -- totals of old registries ---------------------------------------------------------------------


def save_with_fishers(path, total):
    """Write totals as an earlier version did: Fisher diagonals are summed beside the statistics."""
    fishers = {"fisher/a": torch.ones(2, 3, dtype=torch.int64)}
    about = {"content": "statistics", "bits": 24, "classes": list(total.classes)}
    about |= {"fisher_bits": 24, "fisher_forms": {"dense": 3}, "fisher_examples": 60}
    save_streamed(path, exact_tensors(total) | fishers, about)


def test_sums_of_fishers_in_an_old_registry_are_ignored_and_go_with_the_next_change(
    tmp_path, monkeypatch
):
    members = one_of_each_kind()
    with monkeypatch.context() as earlier:
        earlier.setattr(draft, "TOTALS", OLD_TOTALS)
        earlier.setattr(draft, "save_total", save_with_fishers)
        old = registry_of(tmp_path / "old", *members)
        record = old.remove("cho")
    old = Registry(old.path)
    assert all(finding.holds for finding in verify_registry(old.path))
    findings = verify_record(old.path / record.place, registry=old)
    assert [f.claim for f in findings if not f.holds] == [
        f"the survivors alone give the record's {OLD_TOTALS}"
    ]
    assert all(finding.holds is not False for finding in findings)
    old.remove("ben")
    old.add(members[2])
    assert OLD_TOTALS not in old.state.files
    assert old.state.root == registry_of(tmp_path / "new", members[0], members[2]).state.root


# -- registries of mixtures -----------------------------------------------------------------------


@pytest.fixture
def older(tmp_path):
    members = one_of_each_kind(Statistics.MIXTURES)
    return registry_of(tmp_path / "older", *members, settings=OF_MIXTURES)


def test_a_registry_of_mixtures_is_written_as_it_always_was(older):
    state = (older.path / "state.json").read_text()
    assert '"format_version":1' in state
    assert not any(word in state for word in ("factor", "shrinkage", "squared_norm", 'statistics"'))
    assert TOTALS not in older.state.files
    assert (older.scale, older.state.factor_by, older.state.shrinkage) == (1.0, "fixed", None)
    assert older.factor == 1 / 3
    assert Registry(older.path).state == older.state
    record = older.remove("ada")
    assert record.format_version == 1 and "factor" not in record.text


def test_it_has_no_totals(older):
    with pytest.raises(RegistryError, match="mixtures, which do not add up"):
        older.total_statistics()


def test_its_scale_is_fixed_and_its_head_has_no_shrinkage(older):
    with pytest.raises(ConfigError, match="fixed scale 1"):
        older.realign(own_statistics(older), factor=0.5)
    older.realign(own_statistics(older))
    assert REALIGNED in older.state.files
    assert all(finding.holds for finding in verify_registry(older.path))


def test_sums_and_mixtures_do_not_meet(older, registry):
    for home, kind in ((older, Statistics.SUMS), (registry, Statistics.MIXTURES)):
        before = contents(home.path)
        with pytest.raises(ContributionError, match="into a new registry"):
            home.add(member("dee", statistics=kind))
        assert contents(home.path) == before
    with pytest.raises(ContributionError, match="by sums, the others by mixtures"):
        older.realign(own_statistics(registry))
