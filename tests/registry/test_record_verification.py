"""A removal record is verified: each claim is derived anew, and a lie in one fails that one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forgery import reworded, rewrite_line, rewrite_record
from registry_builders import member, own_statistics, registry_of

from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Kind
from fedcompo.errors import FileFormatError
from fedcompo.method.contribution import Contribution
from fedcompo.method.lineage import Lineage
from fedcompo.registry import signing
from fedcompo.registry.record_verification import verify_record
from fedcompo.registry.rederivation import Finding
from fedcompo.registry.registry import Registry
from fedcompo.registry.removal import Influence, RemovalRecord
from fedcompo.registry.signing import read_signer
from fedcompo.registry.state import PRIVATE, PUBLIC
from fedcompo.registry.verification import verify_registry
from fedcompo.storage.files import CONFIG, CONTENT, SUM, TOTALS, WEIGHTS

PARTS = "task vector", "statistics"
SIGNED = "000003-ben.json is signed by the registry's key"
TOLD = "line 3 of the journal tells of this record"
GONE = "no file of ben is in the registry"
DIGESTS = "the digests of what was removed are the journal's"
VECTOR, STATISTICS = (f"nobody has had the {part} of ben since" for part in PARTS)
UNKNOWN = "no file lies there that the registry does not know"
KEPT = "of compositions that contain ben, only those named are kept"
COMPOSED = [
    f"the survivors alone give the record's {name}" for name in (SUM, TOTALS, WEIGHTS, "factor")
]
SETTINGS = CompositionSettings(keep_versions=True)


def members() -> list[Contribution]:
    """Three clients; ada was anchored by ben, who was trained with something of cho's."""
    return [
        member("ada", Kind.FULL, seed=1, lineage=Lineage(anchored_by=("ben",))),
        member("ben", seed=2, classes=("owl",), lineage=Lineage(aligned_with=("cho",))),
        member("cho", Kind.IA3, seed=3, classes=("yak",)),
    ]


@pytest.fixture(scope="module")
def removed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry of ada and cho, which ben has left; the composition with him is kept."""
    path = tmp_path_factory.mktemp("removed") / "registry"
    registry = registry_of(path, *members(), settings=SETTINGS)
    registry.remove("ben", requested_by="ben", reason="moved away", keep_versions=True)
    return path


@pytest.fixture
def root(removed: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(removed, tmp_path / "copy", symlinks=True))


def record_of(root: Path) -> Path:
    return root / "removals" / "000003-ben.json"


def findings(root: Path, **options: Any) -> dict[str, bool | None]:
    found = verify_record(record_of(root), registry=Registry(root), **options)
    assert len({finding.claim for finding in found}) == len(found)
    return {finding.claim: finding.holds for finding in found}


def failing(root: Path) -> list[str]:
    return [claim for claim, holds in findings(root).items() if holds is False]


def parsed(path: Path) -> RemovalRecord:
    return RemovalRecord.parse(path.read_bytes(), source=str(path))


def one(finding: list[Finding]) -> Finding:
    (only,) = finding
    return only


def test_an_honest_record_holds_in_every_claim(removed: Path) -> None:
    found = findings(removed)
    assert set(found.values()) == {True}
    assert {SIGNED, TOLD, GONE, KEPT, *COMPOSED} < set(found)


# -- lies -----------------------------------------------------------------------------------------

OTHER = "0" * 64
ADDED = "what was removed is what had been added"
LIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "registry": ({"registry": OTHER[:32]}, ["the registry is the one of the record"]),
    "client's files": ({"removed_files": {CONTENT: OTHER}}, [ADDED]),
    "rounded": ({"removed_rounded_sha256": OTHER}, [ADDED]),
    "kind": ({"kind": "full"}, [ADDED]),
    "examples": ({"num_examples": 21}, [ADDED]),
    "classes": ({"classes": ("emu",)}, [ADDED]),
    "added": ({"added": 1}, [ADDED]),
    "root before": ({"root_before": OTHER}, ["the root before is the journal's"]),
    "root after": ({"root_after": OTHER}, ["the root after is the journal's"]),
    "journal": ({"journal_before": OTHER}, ["the journal stood where it says"]),
    "one survivor less": (
        {"survivors": ("ada",)},
        ["the survivors are those of the journal", *COMPOSED],
    ),
    "one survivor more": (
        {"survivors": ("ada", "cho", "zoe")},
        ["the survivors are those of the journal"],
    ),
    "factor before": ({"factor_before": 0.5}, ["the factor before is the journal's"]),
    "factor after": ({"factor_after": 0.5}, ["the factor after is the journal's", COMPOSED[-1]]),
    "factor by": ({"factor_by": "vote"}, [COMPOSED[-1]]),
    "classes after": ({"classes_after": ("cat",)}, ["the classes are the survivors'"]),
    "kept": ({"kept_versions": ()}, [KEPT]),
    "digests": ({"removed_content": {"task_vector": OTHER, "statistics": OTHER}}, [DIGESTS]),
    "recomposed": ({"recomposed": True}, ["whether the sum was taken anew is as the journal says"]),
    "no influence": (
        {"influence": Influence((), (), (), ())},
        ["the lineage statement follows from the lineages"],
    ),
    "other influence": (
        {"influence": Influence(("ada", "cho"), (), (), ())},
        ["the lineage statement follows from the lineages"],
    ),
}
COVERED = "the composition {} is covered by the journal's root"


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_fails_its_own_claim_even_where_the_journal_lies_with_it(
    root: Path, lie: str
) -> None:
    changes, expected = LIES[lie]
    rewrite_record(root, record_of(root), **changes)
    assert failing(root) == expected


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("name", [SUM, TOTALS, WEIGHTS, CONFIG])
def test_a_lie_about_a_composition_is_found(root: Path, moment: str, name: str) -> None:
    field = f"composition_{moment}"
    files = {**getattr(parsed(record_of(root)), field), name: OTHER}
    rewrite_record(root, record_of(root), **{field: files})
    derived = {
        ("after", SUM): {COMPOSED[0]: False},
        ("after", TOTALS): {COMPOSED[1]: False},
        ("after", WEIGHTS): {COMPOSED[2]: None},
    }
    expected = {COVERED.format(moment): False, **derived.get((moment, name), {})}
    assert {claim: h for claim, h in findings(root).items() if h is not True} == expected


@pytest.mark.parametrize(
    "changes", [{"time": "1999"}, {"requested_by": "eve"}, {"reason": ""}, {"fedcompo_version": ""}]
)
def test_what_cannot_be_derived_is_held_by_the_journal(root: Path, changes: Any) -> None:
    record = replace(parsed(record_of(root)), **changes).signed(read_signer(root / PRIVATE))
    record_of(root).write_bytes(record.text.encode())
    assert failing(root) == [TOLD]


def test_a_record_that_names_another_line_or_client_is_found(root: Path) -> None:
    honest = parsed(record_of(root))
    for changes in ({"sequence": 2}, {"sequence": 4}, {"sequence": 1}, {"client": "ada"}):
        record = replace(honest, **changes).signed(read_signer(root / PRIVATE))
        record_of(root).write_bytes(record.text.encode())
        assert f"line {record.sequence} of the journal tells of this record" in failing(root)


def test_a_line_within_a_replacement_has_no_record(tmp_path: Path) -> None:
    registry = registry_of(tmp_path / "r", *members())
    registry.add(member("ben", seed=8, classes=("owl",)), replacing=True)  # lines 3 and 4
    record = registry.remove("ben")
    path = tmp_path / "000003-ben.json"
    path.write_bytes(
        replace(record, sequence=3).signed(read_signer(registry.path / PRIVATE)).text.encode()
    )
    claims = {f.claim: f.holds for f in verify_record(path, registry=registry)}
    assert claims[TOLD] is False


def test_a_removal_that_never_happened_cannot_be_claimed(root: Path) -> None:
    """Somebody keeps the client's file."""
    contribution = members()[1]
    contribution.save(root / "clients" / "somewhere")
    assert failing(root) == [GONE, VECTOR, STATISTICS]
    found = verify_record(record_of(root), registry=Registry(root))
    for claim in (GONE, UNKNOWN, VECTOR, STATISTICS):
        (left,) = (finding for finding in found if finding.claim == claim)
        assert str(root / "clients" / "somewhere") in left.detail


def test_a_registry_put_back_to_before_the_removal_is_unmasked_by_the_record(
    tmp_path: Path,
) -> None:
    """All by itself such a registry is as good as any: keep the record elsewhere."""
    registry = registry_of(tmp_path / "registry", *members())
    shutil.copytree(registry.path, tmp_path / "old", symlinks=True)
    registry.remove("ben")
    shutil.move(record_of(registry.path), tmp_path)
    old = Registry(tmp_path / "old")
    assert all(finding.holds for finding in verify_registry(old.path))
    found = {f.claim: f.holds for f in verify_record(tmp_path / "000003-ben.json", registry=old)}
    assert (found[TOLD], found[GONE]) == (False, False)


def test_a_journal_that_cannot_be_read_is_said_so(root: Path) -> None:
    registry = Registry(root)
    (root / "journal.jsonl").write_bytes(b"")
    (found,) = (f for f in verify_record(record_of(root), registry=registry) if not f.holds)
    assert "journal.jsonl has 0 lines" in found.detail


# -- what happens later ---------------------------------------------------------------------------


def test_later_additions_and_a_head_aligned_again_leave_every_claim_as_it_is(root: Path) -> None:
    registry = Registry(root)
    registry.add(member("dan", seed=4, classes=("emu",)))
    registry.realign(own_statistics(registry, seed=9))
    assert set(findings(root).values()) == {True}


@pytest.mark.parametrize("change", ["left", "replaced"])
def test_without_a_survivor_of_then_the_composition_cannot_be_derived(
    root: Path, change: str
) -> None:
    registry = Registry(root)
    if change == "left":
        registry.remove("ada")
    else:
        registry.add(member("ada", seed=8), replacing=True)
    found = findings(root)
    assert [claim for claim, holds in found.items() if holds is None] == COMPOSED
    assert {holds for claim, holds in found.items() if claim not in COMPOSED} == {True}
    assert "ada" in verify_record(record_of(root), registry=Registry(root))[-1].detail


def test_a_client_that_comes_back_with_the_same_files_leaves_their_absence_open(
    root: Path,
) -> None:
    registry = Registry(root)
    registry.add(members()[1], requested_by=f"ben (client, certificate SHA-256 {'0' * 64})")
    found = findings(root)
    open_ones = [claim for claim, holds in found.items() if holds is not True]
    assert open_ones == [GONE, VECTOR, STATISTICS]
    assert {found[claim] for claim in open_ones} == {None}
    members()[1].save(root / "clients" / "twice")
    assert findings(root)[GONE] is False
    shutil.rmtree(root / "clients" / "twice")
    registry.remove("ben")
    assert findings(root)[GONE] is True


def test_a_client_that_comes_back_trained_anew_leaves_nothing_open(root: Path) -> None:
    Registry(root).add(member("ben", seed=8, classes=("owl",)))
    assert set(findings(root).values()) == {True}


def test_the_last_client_that_leaves_leaves_nothing_composed(tmp_path: Path) -> None:
    registry = registry_of(tmp_path / "registry", member("ada"), member("ben"))
    registry.remove("ada")
    registry.remove("ben")
    path = registry.path / "removals" / "000004-ben.json"
    found = {f.claim: f.holds for f in verify_record(path, registry=registry)}
    assert set(found.values()) == {True}
    assert "nothing is composed of nobody" in found
    rewrite_record(registry.path, path, composition_after={WEIGHTS: OTHER})
    registry.refresh()
    found = {f.claim: f.holds for f in verify_record(path, registry=registry)}
    assert found["nothing is composed of nobody"] is False


# -- keys and other files -------------------------------------------------------------------------


def test_the_public_key_alone_proves_the_signature(removed: Path, tmp_path: Path) -> None:
    path = record_of(removed)
    assert one(verify_record(path, public_key=removed / PUBLIC)) == Finding(SIGNED, True)
    (tmp_path / "public").write_bytes(signing.create_key(tmp_path / "private").public_pem)
    finding = one(verify_record(path, public_key=tmp_path / "public"))
    assert finding.holds is False
    assert finding.detail == f"the signature is not that of {tmp_path / 'public'}"


def test_a_key_in_another_format_is_named(removed: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("no key")
    finding = one(verify_record(record_of(removed), public_key=tmp_path / "key"))
    assert finding.holds is False
    assert str(tmp_path / "key") in finding.detail


def test_a_record_needs_something_to_be_checked_with(removed: Path) -> None:
    with pytest.raises(FileFormatError, match="with its registry, or with a public key"):
        verify_record(record_of(removed))


def test_a_record_of_another_registry_is_not_signed_by_this_one(
    removed: Path, tmp_path: Path
) -> None:
    other = registry_of(tmp_path / "other", *members())
    assert one(verify_record(record_of(removed), registry=other)).holds is False
    found = verify_record(record_of(removed), registry=other, public_key=removed / PUBLIC)
    holds: Mapping[str, bool | None] = {finding.claim: finding.holds for finding in found}
    assert holds[SIGNED] is True
    assert holds["the registry is the one of the record"] is False
    assert holds[TOLD] is False


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00\xff", b"null", b"[]", b'"x"', b"{}", b'{"content": 1}', b"[" * 100_000],
    ids=["empty", "bytes", "null", "list", "text", "object", "content", "deep"],
)
def test_a_file_that_is_no_record_fails_with_a_sentence(
    removed: Path, tmp_path: Path, data: bytes
) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(data)
    finding = one(verify_record(path, registry=Registry(removed)))
    assert finding.holds is False
    assert re.match(f"{path} is no (removal record|signed statement)", finding.detail)


@pytest.mark.parametrize("lie", ['"5"', "null", "[5]"])
def test_a_record_with_a_value_of_another_kind_fails_with_a_sentence(
    removed: Path, tmp_path: Path, lie: str
) -> None:
    path, data = tmp_path / "record.json", record_of(removed).read_bytes()
    line = RemovalRecord.parse(data, source="it").sequence
    path.write_bytes(reworded(data, f'"sequence":{line}', f'"sequence":{lie}'))
    assert "it was altered" in one(verify_record(path, registry=Registry(removed))).detail


def test_a_file_that_is_not_there_fails_with_a_sentence(removed: Path, tmp_path: Path) -> None:
    finding = one(verify_record(tmp_path / "nowhere", registry=Registry(removed)))
    assert finding.holds is False
    assert "nowhere" in finding.detail


def test_no_byte_of_a_record_may_change(removed: Path, tmp_path: Path) -> None:
    data = record_of(removed).read_bytes()
    path = tmp_path / "000003-ben.json"
    for position in range(0, len(data), 7):
        path.write_bytes(
            data[:position] + bytes([data[position] ^ (1 << position % 8)]) + data[position + 1 :]
        )
        finding = one(verify_record(path, public_key=removed / PUBLIC))
        assert finding.holds is False, position


def test_a_lineage_rewritten_in_the_journal_contradicts_record_and_members(root: Path) -> None:
    """Who rewrites a lineage in the journal must rewrite the members too."""
    rewrite_line(
        root,
        2,
        lambda details: {
            **details,
            "clients": [
                {**told, "lineage": {**told["lineage"], "anchored_by": []}}
                for told in details["clients"]
            ],
        },
    )
    assert "the lineage statement follows from the lineages" in failing(root)
    assert "the members are those of the journal" in [
        f.claim for f in verify_registry(root) if not f.holds
    ]
