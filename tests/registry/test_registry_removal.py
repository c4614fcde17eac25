"""Who leaves is gone, byte for byte, and the record says so."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from registry_builders import (
    QUICK,
    backbone,
    composition,
    member,
    one_of_each_kind,
    own_statistics,
    registry_of,
    tangents,
    three_clients,
)

from fedcompo.composition import lengths
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Coefficients, Kind
from fedcompo.errors import ContributionError
from fedcompo.method.contribution import Contribution
from fedcompo.method.lineage import Lineage
from fedcompo.method.task_vector import TaskVector
from fedcompo.registry.journal import Entry
from fedcompo.registry.registry import Registry
from fedcompo.registry.removal import RemovalRecord
from fedcompo.registry.signing import is_signed
from fedcompo.storage.tensorstream import file_sha256

ADA, BEN, CHO = one_of_each_kind()
TANGENT_ADA, _, _ = tangents()


@pytest.fixture
def registry(tmp_path):
    return three_clients(tmp_path / "registry")


def last(registry: Registry) -> Entry:
    return registry.entries()[-1]


# -- removal records ------------------------------------------------------------------------------


def test_the_record_says_what_happened_and_is_signed(registry):
    before, theirs = registry.state, registry.member("ben")
    record = registry.remove("ben", requested_by="Dr. B", reason="§ 17")
    path = registry.path / last(registry).details["record"]
    assert RemovalRecord.parse(path.read_bytes(), source="x") == record
    assert is_signed(
        record.signed_bytes, record.signature, (registry.path / "public.pem").read_bytes()
    )
    assert last(registry).details["record_sha256"] == file_sha256(path)
    assert (record.registry, record.sequence) == (registry.identity, registry.state.sequence)
    assert (record.requested_by, record.reason) == ("Dr. B", "§ 17")
    assert (record.root_before, record.root_after) == (before.root, registry.state.root)
    assert record.journal_before == before.journal_sha256
    assert record.composition_before == before.files
    assert record.composition_after == registry.state.files
    assert record.removed_files == theirs.files
    assert record.removed_rounded_sha256 == theirs.rounded_sha256
    assert (record.kind, record.num_examples, record.added) == ("lora", 25, theirs.added)
    assert (record.classes, record.classes_after) == (("dog", "owl"), ("cat", "dog", "yak"))
    assert record.survivors == registry.clients == ("ada", "cho")
    assert record.influence.exact and not record.recomposed


def test_lineage_is_followed_through_clients_and_contributions_that_are_gone(tmp_path):
    registry = registry_of(
        tmp_path / "r",
        member("ada"),
        member("ben", lineage=Lineage(anchored_by=("ada",))),
        member("cho", lineage=Lineage(aligned_with=("ben",))),
        member("dee", lineage=Lineage(ensemble=("cho",))),
        member("eva"),
    )
    registry.remove("cho")
    registry.add(member("ben", seed=5), replacing=True)  # trained again, without anyone
    record = registry.remove("ada")
    assert record.influence.to_retrain == ("dee",)
    assert record.influence.indirect == ("dee",)
    assert registry.influence_of("ben").to_retrain == ("dee",)
    registry.add(member("dee", seed=5), replacing=True)
    assert registry.influence_of("eva").exact


# -- deleting means deleting ----------------------------------------------------------------------


def raw(contribution: Contribution) -> dict[str, bytes]:
    """Bytes of everything a client sent; a LoRA's product and (IA)³'s change too."""
    tensors = {f"task vector {n}": t for n, t in contribution.task_vector.tensors.items()}
    tensors |= {f"τ {n}": t for n, t in contribution.task_vector.dense(backbone().theta_0).items()}
    tensors |= {"head": contribution.head.weight, "bias": contribution.head.bias}
    statistics = contribution.statistics.tensors()
    del statistics["statistics/counts"]  # two small numbers, which others may have too
    tensors |= statistics
    if contribution.fisher is not None:
        tensors |= {f"Fisher {n}": t for n, t in contribution.fisher.sums.items()}
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}


def traces(registry: Registry, parts: dict[str, bytes]) -> set[str]:
    """Which of the parts are found anywhere in the registry's files."""
    files = [path.read_bytes() for path in registry.path.rglob("*") if path.is_file()]
    return {name for name, data in parts.items() if any(data in file for file in files)}


def composed_parts(registry: Registry) -> dict[str, bytes]:
    """Bytes of all that a composition changes, and of its sum."""
    names = [*backbone().theta_0, "head.weight", "head.bias"]
    parts = {f"composed {n}": registry.composed()[n].numpy().tobytes() for n in names}
    return parts | {f"sum {n}": t.numpy().tobytes() for n, t in registry.running_sum().items()}


@pytest.mark.parametrize("kind", list(Kind))
def test_after_a_removal_no_byte_of_the_client_is_left(kind, tmp_path):
    given = member("dee", kind, seed=30, with_fisher=True)
    ada, others = (TANGENT_ADA, kind) if kind is Kind.TANGENT else (ADA, Kind.LORA)
    eva = member("eva", others, seed=40, with_fisher=True)
    registry = registry_of(tmp_path / "r", ada)
    registry.add(given, eva)
    registry.realign(own_statistics(registry))
    theirs = raw(given) | composed_parts(registry)
    is_dense = kind in (Kind.FULL, Kind.TANGENT)
    kept_dense = {name for name in theirs if name.startswith("τ") and not is_dense}
    assert traces(registry, theirs) == theirs.keys() - kept_dense
    registry.remove("dee")
    assert traces(registry, theirs) == set()
    assert traces(registry, raw(eva))


def test_after_a_replacement_no_byte_of_the_old_contribution_is_left(registry):
    theirs = raw(BEN) | composed_parts(registry)
    assert traces(registry, theirs)
    registry.add(member("ben", seed=55), replacing=True)
    assert traces(registry, theirs) == set()


def test_a_refused_contribution_leaves_no_byte_behind(registry):
    given = member("dee", seed=30)
    bad = replace(given, num_examples=0)
    with pytest.raises(ContributionError):
        registry.add(bad)
    assert traces(registry, raw(given)) == set()


def test_earlier_versions_go_with_the_client_unless_they_are_kept_on_request(tmp_path):
    settings = replace(QUICK, keep_versions=True)
    registry = registry_of(tmp_path / "r", ADA, settings=settings)
    alone = composed_parts(registry)
    registry.add(BEN)
    both = composed_parts(registry)
    registry.add(CHO)
    three = composed_parts(registry)
    assert traces(registry, alone | both | three) == {*alone, *both, *three}
    assert [kept["clients"] for kept in registry.state.kept.values()] == [["ada"], ["ada", "ben"]]
    record = registry.remove("cho", keep_versions=True)
    assert traces(registry, raw(CHO)) == set()
    assert traces(registry, three) == set(three)
    assert record.kept_versions == ("versions/000004",)
    record = registry.remove("ben")
    assert record.kept_versions == ()
    assert traces(registry, both) == traces(registry, three) == set()
    assert traces(registry, alone) == set(alone)
    assert {f"versions/{p.name}" for p in (registry.path / "versions").iterdir()} == {
        registry.state.version,
        "versions/000002",
    }


def test_the_composition_until_now_is_kept_on_request_where_none_are_kept_otherwise(registry):
    last_version, parts = registry.state.version, composed_parts(registry)
    record = registry.remove("ben", keep_versions=True)
    assert record.kept_versions == (last_version,)
    assert traces(registry, parts) == set(parts)
    assert traces(registry, raw(BEN)) == set()
    registry.remove("ada")  # it was in there, too
    assert traces(registry, parts) == set()
    assert registry.state.kept == {}


def test_who_cancelled_out_in_the_sum_can_leave_too(tmp_path, monkeypatch):
    """The survivors' sum alone would not be let in; what is left of it is exact all the same."""
    monkeypatch.setattr(lengths, "LONGEST", math.inf)
    clients = [
        replace(
            member(name, Kind.FULL, seed=seed, num_examples=3100),
            task_vector=TaskVector(
                Kind.FULL,
                {f"{n}/delta": torch.full_like(w, value) for n, w in backbone().theta_0.items()},
                backbone().fingerprint,
            ),
        )
        for seed, (name, value) in enumerate([("ada", 1023.0), ("ben", -1023.0), ("cho", 1022.0)])
    ]
    settings = CompositionSettings(coefficients=Coefficients.EXAMPLES)
    registry = registry_of(tmp_path / "registry", *clients, settings=settings)
    registry.remove("ben")
    assert registry.clients == ("ada", "cho")
    registry.remove("ada")
    alone = registry_of(tmp_path / "alone", clients[2], settings=settings)
    assert composition(registry) == composition(alone)
