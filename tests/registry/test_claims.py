"""Caps on counts in a registry: removal stays exact, and owners and newcomers are told apart."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from cli_runs import run
from registry_builders import contents, member, registry_of, three_clients

from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Coefficients, Statistics
from fedcompo.errors import ConfigError, ContributionError
from fedcompo.registry.owners import OWNERS
from fedcompo.registry.record_verification import verify_record
from fedcompo.registry.verification import verify_registry

SETTINGS = [
    CompositionSettings(statistics=form, coefficients=by, align_samples=8, max_count_ratio=1.5)
    for form, by in itertools.product(Statistics, Coefficients)
]


def clients(form):
    given = ("ada", 20, ("cat", "dog")), ("ben", 30, ("dog", "owl")), ("cho", 24, ("cat",))
    return [
        counting(member(name, seed=seed, num_examples=n, classes=classes, statistics=form), n)
        for seed, (name, n, classes) in enumerate((*given, ("eve", 10_000, ("cat", "owl"))))
    ]


def counting(made, images):
    """Mixtures of so many images in all; sums are such already."""
    if not isinstance(made.statistics, dict):
        return made
    own = {
        n: replace(m, num_examples=images // len(made.statistics))
        for n, m in made.statistics.items()
    }
    return replace(made, statistics=own)


def test_settings_are_written_as_earlier_versions_wrote_them():
    names = "coefficients", "scale", "statistics", "align_samples", "ridge", "seed", "keep_versions"
    plain = CompositionSettings()
    assert tuple(plain.values) == names and plain.values["scale"] is None
    newer = replace(plain, max_norm_ratio=2.0, class_cap=7)
    assert newer.values == {**plain.values, "max_norm_ratio": 2.0, "class_cap": 7}
    assert CompositionSettings.parse(newer.values) == newer


@pytest.mark.parametrize("settings", SETTINGS)
def test_without_a_client_all_is_as_it_would_be_had_it_never_come(settings, tmp_path):
    """The caps stay as the first members chose them, which the record says."""
    ada, ben, cho, eve = clients(settings.statistics)
    registry = registry_of(tmp_path / "all", ada, ben, eve, settings=settings)
    registry.add(cho)
    assert registry.settings.caps == (23, 45)  # by ada, the one in the middle
    record = registry.remove("eve")
    assert record.caps == (23, 45)
    same = registry_of(tmp_path / "anew", cho, settings=registry.settings)
    for one in (ben, ada):
        same.add(one)
    assert same.state.root == registry.state.root
    assert same.state.files == registry.state.files
    for findings in (
        verify_registry(registry.path),
        verify_record(registry.path / record.place, registry=registry),
    ):
        assert all(finding.holds for finding in findings), findings


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_is_described_anew_is_capped_too(settings, tmp_path):
    registry = registry_of(tmp_path / "r", *clients(settings.statistics), settings=settings)
    stated = {c.client: c.statistics for c in clients(settings.statistics)}
    registry.realign(stated)
    uncapped = registry_of(
        tmp_path / "u",
        *clients(settings.statistics),
        settings=CompositionSettings(statistics=settings.statistics, align_samples=8),
    )
    uncapped.realign(stated)
    assert registry.joint_head().weight.ne(uncapped.joint_head().weight).any()
    assert all(finding.holds for finding in verify_registry(registry.path))


def test_a_registry_of_an_earlier_version_has_no_caps_and_says_so(tmp_path):
    registry = three_clients(tmp_path / "r")
    registry.add(member("eve", seed=9, num_examples=10**6))
    assert registry.settings.caps is registry.remove("eve").caps is None
    said = run("list", "--registry", registry.path).stdout
    assert "A client counts for all its images" in said


def test_a_class_of_others_is_refused_at_every_door(tmp_path):
    registry = three_clients(tmp_path / "r")
    (registry.path / OWNERS).write_text('yak = ["cho"]\n')
    before = contents(registry.path)
    with pytest.raises(ContributionError, match="claims the class 'yak', which "):
        registry.add(member("eve", seed=9, classes=("emu", "yak")))
    with pytest.raises(ContributionError, match="claims the class 'yak', which "):
        registry.add(member("eve.shard-0", seed=9, classes=("yak",)))
    assert contents(registry.path) == before
    registry.remove("cho")
    registry.add(member("cho.shard-0", seed=9, classes=("yak",)), member("eve", classes=("emu",)))
    assert all(finding.holds for finding in verify_registry(registry.path))


@pytest.mark.parametrize("table", ["yak = 'cho'", "yak =", "\xff"])
def test_a_table_that_cannot_be_read_lets_nobody_in(table, tmp_path):
    registry = three_clients(tmp_path / "r")
    (registry.path / OWNERS).write_text(table, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"owners of classes in .* cannot be read"):
        registry.add(member("eve", seed=9, classes=("emu",)))


def test_who_comes_to_a_class_that_another_has_is_noted(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    registry = three_clients(tmp_path / "r")
    member("eve", seed=9, classes=("emu", "yak")).save(tmp_path / "eve")
    added = run("add", tmp_path / "eve", "--registry", registry.path).stdout
    assert "Came to classes that others had before: eve ('yak')" in added
    assert added.splitlines()[1] in run("list", "--registry", registry.path).stdout
