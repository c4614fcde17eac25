"""Whose task vectors enter a model, how much of each, and with which head."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import contribution, random_head, random_statistics, random_sums
from registry_builders import (
    QUICK,
    backbone,
    member,
    own_statistics,
    registry_of,
    same_bits,
    scale_by_hand,
)

from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.composition.head import head_of
from fedcompo.composition.rules import Changes, parse_rule
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Coefficients, Kind, Statistics
from fedcompo.config.run import BackboneConfig, RunConfig
from fedcompo.config.setting import Scalar
from fedcompo.errors import (
    BackboneMismatch,
    ConfigError,
    ContributionError,
    FedcompoError,
    FileFormatError,
)
from fedcompo.export.selected import Selection
from fedcompo.export.selection import from_folders, from_registry, new_folder
from fedcompo.method.contribution import Contribution, counts_of
from fedcompo.method.deltas import Weights
from fedcompo.method.heads import Head
from fedcompo.method.pool import Pool
from fedcompo.registry.registry import Registry
from fedcompo.storage.files import CONTENT


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Three kinds, ten, twenty-five and forty examples."""
    return registry_of(
        tmp_path_factory.mktemp("selection") / "registry",
        member("ada", Kind.FULL, seed=1, num_examples=10),
        member("ben", Kind.LORA, seed=2, classes=("dog", "owl"), num_examples=25),
        member("cho", Kind.IA3, seed=3, classes=("yak",), num_examples=40),
    )


def assert_same_head(found: Head, expected: Head) -> None:
    assert found.classes == expected.classes
    assert torch.equal(found.weight, expected.weight) and torch.equal(found.bias, expected.bias)


def assert_near(selection: Selection, pool: Pool, theta_0: Weights, **options: Any) -> None:
    expected = pool.compose(theta_0, **options)
    found = dict(selection.stream())
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


# -- of a registry --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "clients"),
    [
        ({}, ("ada", "ben", "cho")),
        ({"only": ("cho", "ada")}, ("ada", "cho")),
        ({"without": ("ada",)}, ("ben", "cho")),
        ({"only": ("ada", "ben"), "without": ("ben",)}, ("ada",)),
        ({"weights": {"ben": 0.25, "cho": 0.75}}, ("ben", "cho")),
        ({"weights": {"ben": 0.25, "cho": 0.75}, "without": ("ada",)}, ("ben", "cho")),
        ({"weights": {"ben": 0.25, "cho": 0.75}, "only": ("ben", "cho")}, ("ben", "cho")),
        ({"weights": {"ada": 0.0, "ben": 0.25, "cho": 0.75}}, ("ada", "ben", "cho")),
        ({"scale": 2.5, "without": ("cho",)}, ("ada", "ben")),
    ],
)
def test_those_who_are_asked_for_are_composed(
    registry: Registry,
    options: dict[str, Any],
    clients: tuple[str, ...],
) -> None:
    selection = from_registry(registry, **options)
    assert selection.pool.clients == clients
    some = () if len(clients) == 3 or "without" in options else tuple(options.get("weights", ()))
    assert selection.only == options.get("only", some)
    assert selection.without == options.get("without", ())
    weights = options.get("weights")
    assert selection.shares == (weights or {client: 1 / len(clients) for client in clients})
    pool = registry.pool().only(*clients)
    scale = options.get("scale") or scale_by_hand(pool, backbone().theta_0, weights)
    assert selection.scale == pytest.approx(scale, rel=1e-9)
    assert_near(selection, pool, backbone().theta_0, coefficients=weights, scale=scale)
    assert_same_head(selection.head, head_of(pool, QUICK))


def test_with_weights_the_sum_is_the_pools_own_bit_for_bit(registry: Registry) -> None:
    weights = {"ada": 0.5, "ben": 0.2, "cho": 0.3}
    selection = from_registry(registry, weights=weights)
    assert selection.scale == scale_by_hand(registry.pool(), backbone().theta_0, weights)
    expected = registry.pool().compose(backbone().theta_0, weights, scale=selection.scale)
    assert same_bits(dict(selection.stream()), expected)


def test_everyone_is_the_composition_of_the_registry_bit_for_bit(registry: Registry) -> None:
    selection = from_registry(registry)
    assert same_bits(dict(selection.stream()), registry.theta_p())
    assert_same_head(selection.head, registry.joint_head())


def test_everyone_has_the_head_that_was_aligned_again_and_some_have_not(tmp_path: Path) -> None:
    registry = registry_of(tmp_path / "r", member("ada"), member("ben", classes=("owl",)))
    registry.realign(own_statistics(registry, seed=9))
    pool = registry.pool()
    assert_same_head(from_registry(registry).head, registry.joint_head())
    assert not torch.equal(from_registry(registry).head.weight, head_of(pool, QUICK).weight)
    some = from_registry(registry, only=("ada",))
    assert_same_head(some.head, head_of(pool.only("ada"), QUICK))


def test_leaving_out_is_removing_bit_for_bit(tmp_path: Path) -> None:
    clients = [member("ada", Kind.FULL), member("ben", classes=("owl",)), member("cho", seed=3)]
    registry = registry_of(tmp_path / "r", *clients)
    left_out = from_registry(registry, without=("ben",))
    weights = dict(left_out.stream())
    registry.remove("ben")
    assert same_bits(weights, registry.theta_p())
    assert_same_head(left_out.head, registry.joint_head())


def test_a_client_stands_for_the_members_of_all_its_tasks(tmp_path: Path) -> None:
    clients = [member(name, seed=n) for n, name in enumerate(("a.task-0", "a.task-1", "b.task-0"))]
    registry = registry_of(tmp_path / "r", *clients)
    assert from_registry(registry, only=("a",)).pool.clients == ("a.task-0", "a.task-1")
    assert from_registry(registry, without=("a",)).pool.clients == ("b.task-0",)
    assert from_registry(registry, only=("a.task-1",)).pool.clients == ("a.task-1",)


def test_shares_follow_the_registrys_own_coefficients(tmp_path: Path) -> None:
    settings = replace(QUICK, coefficients=Coefficients.EXAMPLES)
    clients = [member("ada", num_examples=10), member("ben", num_examples=30, classes=("owl",))]
    registry = registry_of(tmp_path / "r", *clients, settings=settings)
    selection = from_registry(registry)
    assert selection.shares == {"ada": 0.25, "ben": 0.75}
    pool, theta_0 = registry.pool(), backbone().theta_0
    scale = scale_by_hand(pool, theta_0, {"ada": 10, "ben": 30})
    assert_near(selection, pool, theta_0, coefficients=selection.shares, scale=scale)


def test_a_voted_factor_stays_whoever_is_chosen(tmp_path: Path) -> None:
    clients = [member("ada", Kind.FULL), member("ben", classes=("owl",)), member("cho", seed=3)]
    registry = registry_of(tmp_path / "r", *clients)
    registry.realign(own_statistics(registry), factor=0.6)
    assert from_registry(registry).scale == pytest.approx(1.8)
    left_out = from_registry(registry, without=("ben",))
    assert left_out.scale == pytest.approx(1.2)
    weights = {"ada": 0.25, "cho": 0.75}
    weighted = from_registry(registry, weights=weights)
    assert weighted.scale == pytest.approx(1.2)
    assert from_registry(registry, without=("ben",), scale=1.0).scale == 1.0
    pool, theta_0 = registry.pool().without("ben"), backbone().theta_0
    assert_near(weighted, pool, theta_0, coefficients=weights, scale=1.2)
    composed = dict(left_out.stream())
    record = registry.remove("ben")
    assert (record.factor_before, record.factor_after, record.factor_by) == (0.6, 0.6, "vote")
    assert same_bits(composed, registry.theta_p())
    assert_same_head(left_out.head, registry.joint_head())


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"only": ("bne",)}, ContributionError, "Did you mean 'ben'"),
        ({"without": ("zoe",)}, ContributionError, "no client 'zoe'"),
        ({"weights": {"zoe": 1.0}}, ContributionError, "no client 'zoe'"),
        ({"without": ("ada", "ben", "cho")}, ContributionError, "empty pool"),
        ({"weights": {"ada": 0.5, "ben": 0.6}}, ContributionError, "sum to 1"),
        ({"weights": {"ada": 1.0}, "only": ("ben",)}, ContributionError, "expected exactly ben"),
        ({"weights": {"ada": 1.0}, "without": ("ben",)}, ContributionError, "exactly ada, cho"),
        ({"scale": 0.0}, ConfigError, "positive number, got 0"),
        ({"scale": -1.0}, ConfigError, "fedcompo negate"),
        ({"scale": float("nan")}, ConfigError, "positive number"),
        ({"scale": float("inf")}, ConfigError, "positive number"),
    ],
)
def test_what_cannot_be_composed_is_refused_before_anything_is_read(
    registry: Registry,
    options: dict[str, Any],
    error: type[Exception],
    reason: str,
) -> None:
    with pytest.raises(error, match=reason):
        from_registry(registry, **options)


# -- of folders -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> Backbone:
    return load_backbone(BackboneConfig())


def mailed(
    embedded: Backbone, client: str, kind: Kind, number: int, **settings: Scalar
) -> Contribution:
    """A contribution on the embedded backbone, with content drawn by a number."""
    made = contribution(
        client,
        kind,
        theta_0=embedded.theta_0,
        base=embedded.fingerprint,
        seed=number,
        classes=(f"{client}-1", f"{client}-2"),
        num_examples=10 * number,
        with_fisher=False,
        scale=0.01,
    )
    width = embedded.num_features
    return replace(
        made,
        head=random_head(made.head.classes, width, seed=number),
        statistics=random_sums(
            made.head.classes, width, seed=number, num_examples=made.num_examples
        ),
        settings={**RunConfig().flat(), **settings},
    )


@pytest.fixture(scope="module")
def mail(embedded: Backbone, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two contributions of runs with different settings; the folders' names say nothing."""
    folder = tmp_path_factory.mktemp("mail")
    mailed(embedded, "ada", Kind.IA3, 1, scale=1.5).save(folder / "B")
    mailed(embedded, "ben", Kind.LORA, 2, seed=7).save(folder / "A")
    return [folder / "B", folder / "A"]


def test_folders_compose_without_a_registry(embedded: Backbone, mail: list[Path]) -> None:
    pool = Pool(tuple(Contribution.open(folder) for folder in mail))
    with from_folders(mail) as selection:
        assert selection.pool.clients == ("ada", "ben")
        assert_near(selection, pool, embedded.theta_0, scale=1.5)
        counts = [counts_of(member.statistics) for member in pool]
        settings = CompositionSettings(max_count_ratio=1.5).with_caps(counts)
        assert settings.class_cap < max(max(own.values()) for own in counts)
        assert_same_head(selection.head, head_of(pool, settings))
        assert selection.backbone.fingerprint == embedded.fingerprint
        assert selection.backbone.path.is_file()
    assert not selection.backbone.path.exists()


@pytest.mark.parametrize("text", ["ties", "task-arithmetic", "iso-c"])
def test_folders_compose_by_any_rule(embedded: Backbone, mail: list[Path], text: str) -> None:
    """A fixed scale of the run they are from stays, unless the rule says λ."""
    members = sorted(map(Contribution.open, mail), key=lambda member: member.client)
    rule, name = parse_rule(text), min(embedded.theta_0)
    with from_folders(mail, rule=text) as selection:
        weight = embedded.theta_0[name]
        total = rule.total(Changes(name, weight, members, {"ada": 1, "ben": 1}))
        factor = 0.3 if text == "task-arithmetic" else 0.75
        assert selection.factor == factor
        expected = (weight.double() + factor * total).float()
        torch.testing.assert_close(dict(selection.stream())[name], expected, rtol=1e-6, atol=1e-8)


def test_the_order_of_folders_changes_nothing(mail: list[Path]) -> None:
    results = []
    for folders in itertools.permutations(mail):
        with from_folders(folders) as selection:
            results.append((dict(selection.stream()), selection.head, selection.settings))
    (one, one_head, one_settings), (other, other_head, other_settings) = results
    assert same_bits(one, other)
    assert_same_head(one_head, other_head)
    assert one_settings == other_settings


def test_some_of_the_folders_can_be_chosen(embedded: Backbone, mail: list[Path]) -> None:
    for options in ({"only": ("ben",)}, {"without": ("ada",)}, {"weights": {"ben": 1.0}}):
        with from_folders(mail, scale=1.0, **options) as selection:
            assert selection.pool.clients == ("ben",)
            assert selection.settings.seed == 7  # of ben's run
            pool = Pool((Contribution.open(mail[1]),))
            assert_near(selection, pool, embedded.theta_0)


def test_folders_compose_at_the_scale_that_keeps_their_length(
    embedded: Backbone, tmp_path: Path
) -> None:
    for number, client in enumerate(("ada", "ben", "cho"), 1):
        mailed(embedded, client, Kind.LORA, number).save(tmp_path / client)
    with from_folders(sorted(tmp_path.iterdir())) as selection:
        scale = scale_by_hand(selection.pool, embedded.theta_0)
        assert selection.scale == pytest.approx(scale, rel=1e-9)
        assert 1.5 < scale < 2


def test_folders_of_mixtures_compose_the_mean_as_they_always_did(
    embedded: Backbone, tmp_path: Path
) -> None:
    older = {"fisher": "leading", "fisher-form": "head", "align-samples": 4}
    for number, client in enumerate(("ada", "ben"), 1):
        made = mailed(embedded, client, Kind.LORA, number)
        width = embedded.num_features
        mixtures = random_statistics(
            Statistics.MIXTURES,
            made.head.classes,
            width,
            seed=number,
            num_examples=made.num_examples,
        )
        replace(made, statistics=mixtures, settings=older).save(tmp_path / client)
    with from_folders(sorted(tmp_path.iterdir())) as selection:
        assert selection.scale == 1
        assert_near(selection, selection.pool, embedded.theta_0)


@pytest.mark.parametrize("kind", ["another backbone", "sums of another width", "not finite"])
def test_folders_are_checked_as_at_a_registrys_door(
    embedded: Backbone, mail: list[Path], tmp_path: Path, kind: str
) -> None:
    wrong = mailed(embedded, "eve", Kind.IA3, 3)
    changes = {
        "another backbone": {"task_vector": replace(wrong.task_vector, base="embedded@0")},
        "sums of another width": {"statistics": random_sums(wrong.head.classes, 5, seed=0)},
        "not finite": {
            "task_vector": replace(
                wrong.task_vector,
                tensors={n: t * float("nan") for n, t in wrong.task_vector.tensors.items()},
            )
        },
    }
    replace(wrong, **changes[kind]).save(tmp_path / "eve")
    error = BackboneMismatch if kind == "another backbone" else ContributionError
    with pytest.raises(error, match=r"eve"), from_folders([*mail, tmp_path / "eve"]):
        pass


def test_folders_of_weights_that_are_not_here_are_refused(
    embedded: Backbone, tmp_path: Path
) -> None:
    wrong = mailed(embedded, "eve", Kind.IA3, 3)
    replace(wrong, task_vector=replace(wrong.task_vector, base="embedded@0")).save(tmp_path / "eve")
    with pytest.raises(BackboneMismatch, match="--checkpoint"), from_folders([tmp_path / "eve"]):
        pass


def test_a_checkpoint_for_weights_that_need_none_is_refused(mail: list[Path]) -> None:
    with (
        pytest.raises(FedcompoError, match="brings its weights"),
        from_folders(mail, checkpoint="elsewhere.safetensors"),
    ):
        pass


def test_every_byte_of_a_folder_is_checked(
    embedded: Backbone, mail: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "eve" / CONTENT
    mailed(embedded, "eve", Kind.IA3, 3).save(path.parent)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(FileFormatError, match=str(path)), from_folders([*mail, path.parent]):
        pass
    with pytest.raises(FileFormatError, match="nowhere"), from_folders([tmp_path / "nowhere"]):
        pass


def test_folders_of_one_client_are_refused_and_so_are_none(mail: list[Path]) -> None:
    with (
        pytest.raises(ContributionError, match="are in the pool already"),
        from_folders([mail[0], mail[0]]),
    ):
        pass
    with pytest.raises(ContributionError, match="name at least one folder"), from_folders([]):
        pass


# -- a folder for what comes of it ----------------------------------------------------------------


def test_a_folder_appears_when_all_is_in_it(tmp_path: Path) -> None:
    place = tmp_path / "made" / "out"
    with new_folder(place) as draft:
        (draft / "x").write_text("x")
        assert not place.exists()
    assert [path.name for path in place.iterdir()] == ["x"]
    assert [path.name for path in place.parent.iterdir()] == ["out"]


def test_an_empty_folder_is_taken_and_a_full_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as draft:
        (draft / "x").write_text("x")
    for place in (tmp_path / "empty", tmp_path / "empty" / "x"):
        with pytest.raises(ConfigError, match="holds something already"), new_folder(place):
            pass
    assert (tmp_path / "empty" / "x").read_text() == "x"


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as draft:
        (draft / "x").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_registry_takes_in_nothing_else(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(registry.path)
    for home in (registry.path, tmp_path / "link"):
        for place in (home / "out", home / "clients" / "out"):
            with pytest.raises(ConfigError, match="lies in the registry"), new_folder(place):
                pass


def test_where_one_stands_is_no_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="where you stand"), new_folder(Path()):
        pass
