"""Receipts of removals: what they say, who signed them, and whose training the client shaped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from forgery import as_before
from hypothesis import given
from hypothesis import strategies as st

from fedcompo.errors import FileFormatError
from fedcompo.method.lineage import Lineage
from fedcompo.registry import signing
from fedcompo.registry.envelope import opened
from fedcompo.registry.removal import Influence, Lineages, RemovalRecord

NAMES = "abcdef"


def statement(client: str, lineages: Mapping[str, Lineage], *survivors: str) -> Influence:
    staying = survivors or [name for name in lineages if name != client]
    return Lineages(lineages.items()).influence(client, staying)


# -- influence ------------------------------------------------------------------------------------


def test_each_way_of_shaping_another_is_told_apart():
    lineages = {
        "a": Lineage(),
        "b": Lineage(anchored_by=("a",)),
        "c": Lineage(aligned_with=("a", "b")),
        "d": Lineage(ensemble=("a",)),
        "e": Lineage(anchored_by=("d",)),
        "f": Lineage(anchored_by=("x",)),
    }
    found = statement("a", lineages)
    assert found == Influence(("b",), ("c",), ("d",), ("e",))
    assert found.to_retrain == ("b", "c", "d", "e")
    assert not found.exact


def test_nobody_touched_means_influence_exact():
    found = statement("a", {"a": Lineage(anchored_by=("b",)), "b": Lineage(), "c": Lineage()})
    assert found == Influence((), (), (), ())
    assert found.exact


def test_influence_passes_through_clients_who_have_left():
    lineages = {"b": Lineage(anchored_by=("a",)), "c": Lineage(anchored_by=("b",))}
    assert statement("a", lineages, "c").indirect == ("c",)


def test_influence_passes_through_contributions_that_were_replaced():
    lineages = {"a": Lineage(), "b": Lineage(), "c": Lineage(anchored_by=("b",))}
    former = [("b", Lineage(anchored_by=("a",))), ("b", Lineage())]
    found = Lineages([*former, *lineages.items()]).influence("a", "bc")
    assert found.indirect == ("c",)  # shaped by what b was; b itself has trained again
    assert statement("a", lineages).exact


def test_clients_may_have_shaped_each_other():
    lineages = {n: Lineage(anchored_by=tuple(set("abc") - {n})) for n in "abc"}
    assert statement("a", lineages) == Influence(("b", "c"), (), (), ())


NAMED = st.lists(st.sampled_from("abcdex"), max_size=2, unique=True).map(tuple)
LINEAGES = st.builds(Lineage, anchored_by=NAMED, aligned_with=NAMED, ensemble=NAMED)


@given(st.lists(st.tuples(st.sampled_from("abcde"), LINEAGES)), st.sampled_from("abcdex"))
def test_influence_is_what_following_the_names_finds(lineages, client):
    present, touched = dict(lineages), {client}
    for _ in lineages:
        touched |= {name for name, own in lineages if own.shaped_by & touched}
    staying = sorted(present.keys() - {client})
    found = Lineages(lineages).influence(client, staying)
    assert found.fisher == tuple(n for n in staying if client in present[n].anchored_by)
    assert found.to_retrain == tuple(n for n in staying if present[n].shaped_by & touched)
    direct = {*found.fisher, *found.statistics, *found.ensemble}
    assert direct == {n for n in staying if client in present[n].shaped_by}
    assert direct.isdisjoint(found.indirect)


names = st.lists(st.sampled_from(NAMES), max_size=3).map(tuple)


@given(st.fixed_dictionaries({n: st.builds(Lineage, st.just("ita"), names, names) for n in NAMES}))
def test_whoever_a_path_leads_to_is_to_be_retrained_and_nobody_else(lineages):
    shapes = {(by, n) for n, own in lineages.items() for by in own.anchored_by + own.aligned_with}
    paths = set(shapes)
    for middle in NAMES:  # Warshall
        paths |= {(x, z) for x in NAMES for z in NAMES if {(x, middle), (middle, z)} <= paths}
    found = statement("a", lineages)
    assert found.to_retrain == tuple(n for n in NAMES[1:] if ("a", n) in paths)
    assert found.indirect == tuple(n for n in found.to_retrain if ("a", n) not in shapes)


# -- the record -----------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "public.pem").write_bytes(signing.create_key(tmp_path / "key.pem").public_pem)
    return tmp_path / "key.pem", tmp_path / "public.pem"


def unsigned() -> RemovalRecord:
    return RemovalRecord(
        registry="1f" * 16,
        sequence=7,
        time="2030-01-02T03:04:05Z",
        client="Klinik Süd",
        requested_by='"them"',
        reason="§ 17\nDSGVO",
        kind="lora",
        num_examples=20,
        classes=("cat", "dog"),
        removed_files={"card.json": "ab" * 32},
        removed_rounded_sha256="cd" * 32,
        added=2,
        root_before="01" * 32,
        root_after="02" * 32,
        journal_before="03" * 32,
        composition_before={"model.safetensors": "04" * 32},
        composition_after={},
        survivors=("ada", "ben"),
        classes_after=("owl",),
        kept_versions=(),
        recomposed=False,
        influence=Influence(("ada",), (), (), ("ben",)),
        fedcompo_version="0.1.0",
        removed_content={"task_vector": "cd" * 32},
    )


def holds(data: bytes, public: Path) -> bool:
    """What a sceptic checks: that it is a record, and that the registry signed it."""
    try:
        record = RemovalRecord.parse(data, source="a letter")
    except FileFormatError:
        return False
    return signing.is_signed(record.signed_bytes, record.signature, public.read_bytes())


def old(keys) -> RemovalRecord:
    """The record as versions wrote it that knew no envelope."""
    return as_before(unsigned(), signing.read_signer(keys[0]))


@pytest.mark.parametrize("written", ["now", "before"])
def test_a_signed_record_survives_its_text(keys, written):
    record = unsigned().signed(signing.read_signer(keys[0])) if written == "now" else old(keys)
    assert RemovalRecord.parse(record.text.encode(), source="x") == record
    assert holds(record.text.encode(), keys[1])


def test_an_unsigned_record_and_one_signed_by_others_do_not_hold(keys, tmp_path):
    assert not holds(unsigned().text.encode(), keys[1])
    (tmp_path / "forged.pem").write_bytes(signing.create_key(tmp_path / "forger.pem").public_pem)
    assert not holds(
        unsigned().signed(signing.read_signer(tmp_path / "forger.pem")).text.encode(), keys[1]
    )


def test_a_changed_bit_is_refused_wherever_it_is(keys):
    data = old(keys).text.encode()
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        assert not holds(bytes(changed), keys[1]), position


STRANGE = (None, [], {}, ["a"], {"a": 1}, 3, 1.5, "t", True, math.nan, 10**30, [[["x"]]])


@pytest.mark.parametrize("value", STRANGE, ids=repr)
def test_values_of_another_type_are_refused(keys, value):
    values = json.loads(old(keys).text)
    for key in values:
        changed = values | {key: value}
        text = json.dumps(changed, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        assert changed == values or not holds(text.encode(), keys[1]), key


def test_added_dropped_and_rewritten_text_is_refused(keys):
    data = old(keys).text
    values = json.loads(data)
    others = [
        data + "\n",
        data.rstrip("\n"),
        data.replace("\n", "\r\n"),
        "\ufeff" + data,
        json.dumps(values),
        json.dumps(values, indent=2, sort_keys=True) + "\n",  # ü as an escape
        data.replace('"sequence": 7', '"sequence": 7.0'),
        data.replace('"sequence": 7', '"sequence": 7,\n  "sequence": 7'),
        data.replace('"client"', '"extra": 1,\n  "client"'),
        "[" * 5000,
        "null",
    ]
    for other in others:
        assert other != data
        assert not holds(other.encode(), keys[1]), other[:200]


@pytest.mark.parametrize(
    "change",
    [
        {"client": "Klinik Nord"},
        {"reason": ""},
        {"survivors": ("ada",)},
        {"removed_files": {}},
        {"recomposed": True},
        {"influence": Influence((), (), (), ())},
        {"removed_content": {"task_vector": "00" * 32}},
        {"reveals": "nothing"},
        {"limits": "none"},
        {"keyid": "00" * 32},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_statement_is_signed(change, keys):
    record = unsigned().signed(signing.read_signer(keys[0]))
    assert not holds(replace(record, **change).text.encode(), keys[1])


def predicate(record: RemovalRecord) -> dict[str, object]:
    statement = opened(replace(record, signature="00").text.encode(), source="it").statement
    assert statement["subject"] == [{"name": "root", "digest": {"sha256": record.root_after}}]
    return dict(statement["predicate"])


def test_the_lineage_statement_says_what_follows_from_it():
    lineage = predicate(unsigned())["lineage"]
    assert lineage["composition_exact"] is True
    assert lineage["influence_exact"] is False
    assert lineage["to_retrain"] == ["ada", "ben"]
    clean = replace(unsigned(), influence=Influence((), (), (), ()))
    assert predicate(clean)["lineage"]["influence_exact"] is True
