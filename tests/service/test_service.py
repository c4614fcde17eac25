"""A registry over the wire: what is published, fetched, composed, removed, listed and verified."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
from forgery import reworded
from registry_builders import contents, member, one_of_each_kind, registry_of, three_clients
from service_runs import client_of, credential, intact, saved, served

from fedcompo.config.choices import Kind
from fedcompo.errors import ConfigError, ServiceError
from fedcompo.export.folder import publish
from fedcompo.export.selection import from_registry
from fedcompo.registry.registry import Registry
from fedcompo.registry.removal import RemovalRecord
from fedcompo.registry.signing import is_signed
from fedcompo.registry.state import PUBLIC
from fedcompo.service.access import _read_certificate

ADA, BEN, CHO = one_of_each_kind()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return three_clients(tmp_path / "registry")


def test_publishing_is_adding_and_nothing_is_left_beside(tmp_path: Path) -> None:
    registry = registry_of(tmp_path / "registry")
    with served(registry) as address:
        for contribution in (ADA, BEN):
            folder = saved(contribution, tmp_path / contribution.client)
            with client_of(address, contribution.client) as client:
                published = client.publish(folder)
    registry.refresh()
    assert (published.client, published.root) == ("ben", registry.state.root)
    assert registry.state.root == registry_of(tmp_path / "expected", ADA, BEN).state.root
    assert intact(registry)
    beside = tmp_path / ".registry.service"
    assert not [path for path in beside.rglob("*") if path.is_file()]


def test_paths_of_the_publisher_s_machine_do_not_leave_it(tmp_path: Path) -> None:
    registry = registry_of(tmp_path / "registry")
    paths = {"data": "folder:/srv/DOE_Jane", "checkpoint": "/home/DOE_Jane/a.pth"}
    settings = {**BEN.settings, **paths, "backbone": "local-dir:DOE_Jane"}
    folder = saved(replace(BEN, settings=settings), tmp_path / "ben")
    before = contents(folder)
    with served(registry) as address, client_of(address, "ben") as client:
        client.publish(folder)
        assert client.publish(folder).already
    registry.refresh()
    assert not [p for p in registry.path.rglob("*") if p.is_file() and b"DOE_" in p.read_bytes()]
    assert registry.contribution("ben").settings["data"] == "folder:not-told"
    assert contents(folder) == before
    assert intact(registry)


def test_publishing_again_changes_nothing_and_replacing_is_explicit(
    registry: Registry, tmp_path: Path
) -> None:
    same = saved(BEN, tmp_path / "same")
    other = saved(member("ben", Kind.FULL, seed=9, classes=("owl",)), tmp_path / "other")
    with served(registry) as address, client_of(address, "ben") as client:
        before = contents(registry.path)
        assert client.publish(same).already
        with pytest.raises(ServiceError, match="in the registry already, with other files"):
            client.publish(other)
        assert contents(registry.path) == before
        assert not client.publish(other, replace=True).already
    registry.refresh()
    assert registry.member("ben").classes == ("owl",)
    assert intact(registry)


def test_who_left_cannot_be_published_as_another(registry: Registry, tmp_path: Path) -> None:
    registry.remove("ben")
    before, lie = contents(registry.path), saved(replace(BEN, client="eve"), tmp_path / "eve")
    refused = pytest.raises(ServiceError, match="of 'ben', which the registry has removed")
    with served(registry) as address, client_of(address, "eve") as client, refused:
        client.publish(lie)
    assert contents(registry.path) == before
    with served(registry) as address, client_of(address, "ben") as client:
        client.publish(saved(BEN, tmp_path / "ben"))
    assert intact(registry)


def test_the_journal_says_who_asked(registry: Registry, tmp_path: Path) -> None:
    with served(registry) as address:
        with client_of(address, "dee") as client:
            client.publish(saved(member("dee", seed=8, classes=("emu",)), tmp_path / "dee"))
        with client_of(address, "olga", operator=True) as client:
            client.remove("ada")
    registry.refresh()
    added, removed = registry.entries()[-2:]
    dee, _, _ = _read_certificate(credential("dee").certificate)
    olga, _, _ = _read_certificate(credential("olga", operator=True).certificate)
    assert added.details["requested_by"] == dee.signature
    assert dee.signature == f"dee (client, certificate SHA-256 {dee.fingerprint})"
    assert removed.details["requested_by"] == olga.signature
    assert olga.signature.startswith("olga (operator, certificate SHA-256 ")
    assert intact(registry)


def test_what_is_fetched_is_what_was_published(registry: Registry, tmp_path: Path) -> None:
    with served(registry) as address:
        with client_of(address, "ben") as client:
            content = client.fetch(tmp_path / "own")
        with client_of(address, "olga", operator=True) as client:
            client.fetch(tmp_path / "any", "ben")
    expected = contents(registry.path / registry.member("ben").folder)
    assert contents(tmp_path / "own") == contents(tmp_path / "any") == expected
    assert list(content.clients) == ["ben"]


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"only": ("ada", "cho")},
        {"without": ("ben",), "scale": 2.0},
        {"weights": {"ada": 0.25, "ben": 0.75}},
    ],
    ids=str,
)
def test_a_composed_model_is_the_one_composed_at_the_registry(
    registry: Registry, tmp_path: Path, choice: dict
) -> None:
    publish(tmp_path / "expected", from_registry(registry, **choice))
    with served(registry) as address, client_of(address, "ada") as client:
        content = client.compose(tmp_path / "model", **choice)
    assert contents(tmp_path / "model") == contents(tmp_path / "expected")
    assert list(content.clients) == list(from_registry(registry, **choice).pool.clients)
    timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)


def test_who_leaves_gets_a_signed_receipt_and_gets_it_again(
    registry: Registry, tmp_path: Path
) -> None:
    with served(registry) as address, client_of(address, "ben") as client:
        receipt = client.remove(reason="moved away")
        assert client.remove() == receipt
    registry.refresh()
    record = RemovalRecord.parse(receipt.record, source="receipt")
    assert registry.clients == ("ada", "cho")
    assert registry.state.root == registry_of(tmp_path / "never", ADA, CHO).state.root
    assert (record.client, record.reason) == ("ben", "moved away")
    assert receipt.public_key == (registry.path / PUBLIC).read_bytes()
    assert is_signed(record.signed_bytes, record.signature, (registry.path / PUBLIC).read_bytes())
    assert [entry.event for entry in registry.entries()].count("removed") == 1
    assert intact(registry)


def test_a_list_says_who_is_there(registry: Registry) -> None:
    with served(registry) as address, client_of(address, "anybody") as client:
        found = client.list()
    assert [m.client for m in found.members] == ["ada", "ben", "cho"]
    assert [tuple(m.classes) for m in found.members] == [
        m.classes for m in registry.state.members.values()
    ]
    assert (found.root, found.identity) == (registry.state.root, registry.identity)
    assert (found.base, found.sequence) == (registry.state.base, registry.state.sequence)


def test_anybody_can_have_the_registry_verified_and_a_receipt(registry: Registry) -> None:
    with served(registry) as address, client_of(address, "anybody") as client:
        assert all(finding.holds for finding in client.verify())
        with client_of(address, "ben") as ben:
            record = ben.remove().record
        assert all(finding.holds for finding in client.verify(record))
        forged = reworded(record, '"client":"ben"', '"client":"bob"')
        findings = client.verify(forged)
        (registry.path / "stranger").write_text("x")
        assert not all(finding.holds for finding in client.verify())
    assert [finding.holds for finding in findings] == [False]
    assert str(registry.path) not in findings[0].detail


def test_nothing_is_written_over(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thing").write_text("x")
    with served(registry) as address, client_of(address, "ben") as client:
        for get in (client.fetch, client.compose):
            with pytest.raises(ConfigError, match="holds something already"):
                get(tmp_path / "taken")
