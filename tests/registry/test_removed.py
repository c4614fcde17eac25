"""What was removed is known when it comes back under another name, by whatever way it comes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forgery import rewrite_as_before, rewrite_line, rewrite_record, rewrite_state
from registry_builders import (
    OF_MIXTURES,
    backbone,
    contents,
    member,
    one_of_each_kind,
    registry_of,
    three_clients,
)

from fedcompo.config.choices import Kind, Statistics
from fedcompo.config.presets import IMPORTED, STAND_IN
from fedcompo.errors import ContributionError
from fedcompo.method.contribution import Contribution
from fedcompo.method.features import FeatureMixture
from fedcompo.method.heads import Head
from fedcompo.registry.admission import admit, check_described
from fedcompo.registry.company import Company
from fedcompo.registry.record_verification import verify_record
from fedcompo.registry.rederivation import Finding
from fedcompo.registry.registry import Registry
from fedcompo.registry.removal import LIMITS, REVEALS, RemovalRecord
from fedcompo.registry.removed import Removed, statistics_digest
from fedcompo.registry.verification import NOTHING_BACK, verify_registry

ADA, BEN, CHO = one_of_each_kind()
VECTOR = "nobody has had the task vector of ben since"
STATISTICS = "nobody has had the statistics of ben since"
OLD_STATISTICS = "nobody has had the statistics and names of ben since"


def as_eve(contribution: Contribution, **changes) -> Contribution:
    """The contribution under another name."""
    return replace(contribution, client="eve", **changes)


def vector_of(contribution: Contribution) -> Contribution:
    """Its task vector beside statistics of eve's own."""
    own = member("eve", seed=60)
    return replace(own, task_vector=contribution.task_vector)


def statistics_of(contribution: Contribution) -> Contribution:
    """Its statistics beside a task vector of eve's own, every class called otherwise."""
    own, sums = member("eve", seed=60), contribution.statistics
    turned = replace(
        sums, classes=("aaa", "bbb"), counts=sums.counts.flip(0), sums=sums.sums.flip(0)
    )
    head = Head(("aaa", "bbb"), own.head.weight, own.head.bias)
    return replace(own, head=head, statistics=turned, num_examples=contribution.num_examples)


def in_double_precision(contribution: Contribution) -> Contribution:
    """Its task vector, the same numbers in twice as many bits."""
    wide = {n: t.double() for n, t in contribution.task_vector.tensors.items()}
    return vector_of(replace(contribution, task_vector=replace(BEN.task_vector, tensors=wide)))


DISGUISES = {
    "as it was": as_eve(BEN),
    "in double precision": in_double_precision(BEN),
    "its task vector": vector_of(BEN),
    "its statistics": statistics_of(BEN),
}
VECTORS = "its task vector", "in double precision"
"""Those that bring no other part."""


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Three clients, one of which has left."""
    registry = three_clients(tmp_path / "registry")
    registry.remove("ben", requested_by="ben")
    return registry


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner of a registry can leave any check out."""
    monkeypatch.setattr(Removed, "refuse", lambda *_: None)


def record_of(registry: Registry, line: int = 3, client: str = "ben") -> Path:
    return registry.path / "removals" / f"{line:06d}-{client}.json"


def of_record(registry: Registry, path: Path | None = None) -> dict[str, Finding]:
    found = verify_record(path or record_of(registry), registry=Registry(registry.path))
    return {finding.claim: finding for finding in found}


def failing(registry: Registry) -> list[str]:
    """Claims that fail, of the record and then of the registry."""
    found = [*of_record(registry).values(), *verify_registry(registry.path)]
    return [finding.claim for finding in found if finding.holds is False]


def assert_refused(
    registry: Registry, *sources: Contribution | Path, match: str, **options
) -> None:
    before = contents(registry.path)
    with pytest.raises(ContributionError, match=match):
        registry.add(*sources, **options)
    assert contents(registry.path) == before


# -- the doors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("disguise", DISGUISES)
def test_it_is_refused_under_another_name(
    registry: Registry, tmp_path: Path, disguise: str
) -> None:
    assert_refused(registry, DISGUISES[disguise], match="of 'ben', which the registry has removed")
    DISGUISES[disguise].save(tmp_path / "mail")
    assert_refused(registry, tmp_path / "mail", match="'eve' brings, number for number")
    with pytest.raises(ContributionError, match="Was 'ben' a mistyped name"):  # as a run asks
        admit(DISGUISES[disguise], Company.of(registry, backbone()), empty=True)


def test_a_run_refuses_statistics_before_anybody_trains(registry: Registry) -> None:
    lie = statistics_of(BEN)
    with pytest.raises(ContributionError, match="the statistics of 'ben'"):
        check_described("eve", lie.head.classes, lie.statistics, Company.of(registry))


def test_what_was_replaced_is_known_too_and_so_is_what_two_would_swap(registry: Registry) -> None:
    registry.add(member("ada", seed=70), replacing=True)
    assert_refused(registry, as_eve(ADA), match="of 'ada'")
    registry.add(BEN)
    swap = [
        replace(member("cho", seed=71), task_vector=BEN.task_vector),
        replace(member("ben", seed=72), task_vector=CHO.task_vector),
    ]
    assert_refused(registry, *swap, match="has removed", replacing=True)


def test_in_a_copy_of_before_it_has_not_left(registry: Registry, tmp_path: Path) -> None:
    (record,) = (registry.path / "removals").iterdir()
    before = three_clients(tmp_path / "before")
    found = {
        f.claim: f
        for f in verify_record(record, registry=before, public_key=registry.path / "public.pem")
    }
    assert found[VECTOR].holds is False
    assert found[VECTOR].detail == "it has not left: ben (line 2)"


def test_what_came_back_by_its_client_is_open_and_by_another_fails(registry: Registry) -> None:
    registry.add(replace(BEN, client="ben.task-1"))
    found = of_record(registry)
    assert (found[VECTOR].holds, found[STATISTICS].holds) == (False, False)
    told = "it came back, with line 4, asked for by nobody who is named: ben.task-1 (line 4)"
    assert found[VECTOR].detail == told  # an operator may have added it again
    registry.remove("ben.task-1")
    registry.add(BEN)
    told = told.replace("(line 4)", "(line 4 to 5), ben (line 6)")
    assert of_record(registry)[VECTOR].detail == told
    assert all(finding.holds for finding in verify_registry(registry.path))


def test_what_the_client_itself_handed_in_again_is_open(registry: Registry) -> None:
    registry.add(BEN, requested_by=f"ben (client, certificate SHA-256 {'0' * 64})")
    found = of_record(registry)
    assert (found[VECTOR].holds, found[STATISTICS].holds) == (None, None)


# -- who would be refused wrongly -----------------------------------------------------------------


def empty(client: str, seed: int) -> Contribution:
    own = member(client, Kind.FULL, seed=seed)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in own.task_vector.tensors.items()}
    return replace(own, task_vector=replace(own.task_vector, tensors=zeros))


def test_two_who_learnt_nothing_are_no_copies(registry: Registry) -> None:
    registry.add(empty("dan", 80), empty=True)
    registry.remove("dan")
    registry.add(empty("eva", 81), empty=True)
    found = of_record(registry, record_of(registry, 5, "dan"))
    assert {finding.holds for finding in found.values()} == {True}
    assert all(finding.holds for finding in verify_registry(registry.path))


def test_statistics_made_of_a_classifier_are_nobodys(registry: Registry) -> None:
    marked = {f"{IMPORTED}statistics": STAND_IN}
    registry.add(replace(member("dan", seed=80), settings=marked))
    registry.remove("dan")
    shared = replace(registry_twin("dan"), client="eva", settings=marked)
    registry.add(shared)
    found = of_record(registry, record_of(registry, 5, "dan"))
    claim = "nobody has had the statistics of dan since"
    assert (found.pop(claim).holds, {f.holds for f in found.values()}) == (None, {True})
    assert all(finding.holds for finding in verify_registry(registry.path))


def test_neither_are_they_where_an_earlier_version_removed_them_and_both_have_left(
    registry: Registry,
) -> None:
    marked = {f"{IMPORTED}statistics": STAND_IN}
    registry.add(replace(member("dan", seed=80), settings=marked))
    registry.remove("dan")
    rewrite_as_before(registry.path, record_of(registry, 5, "dan"))
    registry = Registry(registry.path)
    registry.add(replace(registry_twin("dan"), client="eva", settings=marked))
    registry.remove("eva")
    assert all(finding.holds for finding in verify_registry(registry.path))


def registry_twin(client: str) -> Contribution:
    """Somebody with the same images, who trained on them otherwise."""
    same = member(client, seed=80)
    return replace(same, client="twin", task_vector=member("twin", seed=82).task_vector)


def test_who_had_the_same_images_all_along_stays_and_may_train_again(registry: Registry) -> None:
    registry.add(member("dan", seed=80), registry_twin("dan"))
    registry.remove("dan")
    again = replace(registry_twin("dan"), task_vector=member("twin", seed=83).task_vector)
    registry.add(again, replacing=True)
    assert all(finding.holds for finding in verify_registry(registry.path))
    assert_refused(registry, replace(again, client="eve"), match="the statistics of")


# -- an owner who lies ----------------------------------------------------------------------------


@pytest.mark.parametrize("disguise", DISGUISES)
def test_the_receipt_fails_when_it_is_back(registry: Registry, unguarded, disguise: str) -> None:
    registry.add(DISGUISES[disguise])
    claims = {"its statistics": [STATISTICS], **{name: [VECTOR] for name in VECTORS}}
    assert failing(registry) == [*claims.get(disguise, [VECTOR, STATISTICS]), NOTHING_BACK]
    registry.remove("eve")  # it was there
    found = of_record(registry)
    assert [c for c, f in found.items() if not f.holds] == claims.get(
        disguise, [VECTOR, STATISTICS]
    )
    assert "it is back: eve (line 4 to 5)" in {finding.detail for finding in found.values()}


def test_the_journal_may_lie_about_the_newcomer(registry: Registry, unguarded) -> None:
    """The record reads the newcomers' files; of members of then the signed root tells."""
    registry.add(vector_of(BEN))
    other = "0" * 64

    def lie(details):
        return {**details, "clients": [{**details["clients"][0], "rounded_sha256": other}]}

    members = dict(registry.state.members)
    members["eve"] = replace(members["eve"], rounded_sha256=other)
    rewrite_state(registry.path, members=members)
    root = Registry(registry.path).state.root
    rewrite_line(registry.path, 4, lambda details: {**lie(details), "root_after": root})
    assert of_record(registry)[VECTOR].holds is False
    assert NOTHING_BACK not in failing(registry)  # which believes the journal, but composes again
    assert "the composition is that of the members" in failing(registry)


def test_the_record_may_lie_about_the_digests(registry: Registry, unguarded) -> None:
    registry.add(as_eve(BEN))
    record = RemovalRecord.parse(record_of(registry).read_bytes(), source="it")
    content = {**record.removed_content, "statistics": "0" * 64}
    rewrite_record(registry.path, record_of(registry), removed_content=content)
    assert "the digests of what was removed are the journal's" in failing(registry)


@pytest.mark.parametrize("unknown", ["export", "clients/dan"])
def test_a_stray_contribution_is_looked_into(registry: Registry, unknown: str) -> None:
    as_eve(BEN).save(registry.path / unknown)
    found = of_record(registry)
    assert [f.holds for f in (found[VECTOR], found[STATISTICS])] == [False, False]
    assert found["no file lies there that the registry does not know"].holds is None


@pytest.mark.parametrize("lie", [lambda name: f"other.{name}", lambda name: name])
def test_of_a_stray_contribution_that_fits_no_weight_the_statistics_are_known(
    registry: Registry, lie: Callable[[str], str]
) -> None:
    tensors = {lie(name): own[..., :-1] for name, own in BEN.task_vector.tensors.items()}
    as_eve(BEN, task_vector=replace(BEN.task_vector, tensors=tensors)).save(registry.path / "eve")
    found = of_record(registry)
    assert [found[VECTOR].holds, found[STATISTICS].holds] == [True, False]


def test_a_stray_contribution_may_lie_about_the_weights_that_it_was_trained_on(
    registry: Registry,
) -> None:
    lie = replace(BEN.task_vector, base="other@00")
    as_eve(BEN, task_vector=lie).save(registry.path / "eve")
    assert of_record(registry)[VECTOR].holds is False


def test_a_stray_model_that_holds_it_is_found(tmp_path: Path) -> None:
    registry = three_clients(tmp_path / "registry")
    shutil.copytree(registry.path / registry.state.version, tmp_path / "before")
    registry.remove("ben")
    shutil.move(tmp_path / "before" / "model.safetensors", registry.path / "export.safetensors")
    found = of_record(registry)["no file of ben is in the registry"]
    assert found.holds is False and "export.safetensors" in found.detail


# -- records and journals of earlier versions -----------------------------------------------------


@pytest.mark.parametrize("kind", [Statistics.SUMS, Statistics.MIXTURES])
def test_an_old_record_is_held_to_the_same(tmp_path: Path, kind: Statistics) -> None:
    ada, ben, cho = one_of_each_kind(kind)
    settings = {"settings": OF_MIXTURES} if kind is Statistics.MIXTURES else {}
    registry = registry_of(tmp_path / "registry", ada, ben, cho, **settings)
    registry.remove("ben")
    rewrite_as_before(registry.path, record_of(registry))
    assert json.loads(record_of(registry).read_text())["client"] == "ben"
    found = of_record(registry)
    assert OLD_STATISTICS in found and {f.holds for f in found.values()} == {True}
    assert_refused(Registry(registry.path), as_eve(ben), match="of 'ben'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Removed, "refuse", lambda *_: None)
        Registry(registry.path).add(as_eve(ben))
    assert failing(registry) == [VECTOR, OLD_STATISTICS, NOTHING_BACK]


# -- what it says ---------------------------------------------------------------------------------


def test_digests_hold_no_name_of_a_client_a_class_or_a_kind(tmp_path: Path) -> None:
    dense = {f"{n}/delta": t for n, t in BEN.task_vector.dense(backbone().theta_0).items()}
    full = replace(BEN.task_vector, kind=Kind.FULL, tensors=dense)
    tangent = replace(full, kind=Kind.TANGENT)
    one = registry_of(tmp_path / "one", replace(member("fay"), task_vector=full)).member("fay")
    two = registry_of(tmp_path / "two", replace(member("eve"), task_vector=tangent)).member("eve")
    assert (one.rounded_sha256, one.kind) == (two.rounded_sha256, "full")
    assert statistics_digest(BEN.statistics) == statistics_digest(statistics_of(BEN).statistics)
    assert statistics_digest(BEN.statistics) != statistics_digest(ADA.statistics)


def test_the_gaussians_of_a_mixture_may_stand_in_another_order() -> None:
    one = FeatureMixture(torch.tensor([0.25, 0.75]), torch.eye(2), torch.ones(2, 2), 4)
    turned = FeatureMixture(one.weights.flip(0), one.means.flip(0), one.variances.double(), 4)
    assert statistics_digest({"a": one}) == statistics_digest({"b": turned})
    fewer = replace(one, num_examples=3)
    assert statistics_digest({"a": one}) != statistics_digest({"a": fewer})


def test_the_record_says_what_it_reveals_and_what_cannot_be_found(registry: Registry) -> None:
    record = RemovalRecord.parse(record_of(registry).read_bytes(), source="it")
    assert (record.reveals, record.limits) == (REVEALS, LIMITS)
    assert record.removed_content == {
        "task_vector": record.removed_rounded_sha256,
        "statistics": statistics_digest(BEN.statistics),
    }


def test_as_the_limits_say_a_changed_bit_is_not_found(registry: Registry) -> None:
    tensors = dict(BEN.task_vector.tensors)
    name = min(tensors)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] *= 1 + 1e-3
    jittered = replace(BEN, task_vector=replace(BEN.task_vector, tensors=tensors))
    registry.add(vector_of(jittered))
    assert {finding.holds for finding in of_record(registry).values()} == {True}
    assert "changed by a bit or scaled" in LIMITS
