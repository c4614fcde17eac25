"""Who reads while a client leaves gets all of what was there before, or a refusal: no mixture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from registry_builders import contents, member, three_clients
from service_runs import (
    chunk,
    client_of,
    code_of,
    credential,
    intact,
    offer_of,
    saved,
    served,
    stub_of,
)

from fedcompo.errors import RegistryError
from fedcompo.registry.removal import RemovalRecord
from fedcompo.service import downloads, transfer
from fedcompo.service import members as answers
from fedcompo.service import registry_pb2 as wire
from fedcompo.service.access import Audience
from fedcompo.service.downloads import Downloads
from fedcompo.service.limits import Limits, Places
from fedcompo.service.refusals import Code
from fedcompo.storage.files import CARD


@pytest.fixture
def registry(tmp_path):
    return three_clients(tmp_path / "registry")


@pytest.fixture
def handing_out(registry, tmp_path):
    """The methods themselves, to stop them in the middle."""
    limits = Limits()
    folder = tmp_path / "models"
    return Downloads(registry.path, folder, Audience.MEMBERS, 1, Places(1), Places(1), limits)


def calling(name):
    return SimpleNamespace(
        auth_context=lambda: {"x509_pem_cert": [credential(name).certificate]},
        time_remaining=lambda: None,
        is_active=lambda: True,
    )


def joined(parts):
    """The files that chunks make, by name."""
    files: dict[str, bytes] = {}
    for part in parts:
        files[part.chunk.file] = files.get(part.chunk.file, b"") + part.chunk.data
    return files


def test_a_fetch_that_has_begun_ends_with_what_it_opened(registry, handing_out, monkeypatch):
    monkeypatch.setattr(transfer, "PIECE", 512)
    before = contents(registry.path / registry.member("ben").folder)
    parts = handing_out.fetch(wire.FetchRequest(), calling("ben"))
    next(parts)
    first = next(parts)
    registry.remove("ben")
    registry.add(member("ben", seed=9, classes=("owl",)))  # another one, in the same place
    assert joined([first, *parts]) == before


def test_a_model_that_is_being_sent_is_sent_to_its_end(
    registry, handing_out, monkeypatch, tmp_path
):
    monkeypatch.setattr(transfer, "PIECE", 512)
    expected = joined(list(handing_out.compose(wire.ComposeRequest(), calling("ada")))[1:])
    parts = handing_out.compose(wire.ComposeRequest(), calling("ada"))
    next(parts)
    registry.remove("ben")
    assert joined(parts) == expected
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_model_of_one_who_left_meanwhile_is_not_sent(registry, monkeypatch, moment, tmp_path):
    real = downloads.publish

    def publishing(output, selection):
        if moment == "before":
            registry.remove("ben")
        real(output, selection)
        if moment == "after":
            registry.remove("ben")

    monkeypatch.setattr(downloads, "publish", publishing)
    with served(registry) as address, stub_of(address, "ada") as stub:
        call = stub.Compose(wire.ComposeRequest(), timeout=60)
        assert code_of(lambda: call) is Code.ABORTED
        monkeypatch.setattr(downloads, "publish", real)
        with client_of(address, "ada") as client:
            content = client.compose(tmp_path / "model")
    assert list(content.clients) == ["ada", "cho"]


def test_one_who_left_and_came_back_is_another(registry, monkeypatch):
    """The same name and folder, other content: the composition of before must not pass."""
    real = downloads.publish

    def publishing(output, selection):
        real(output, selection)
        registry.remove("ben")
        registry.add(member("ben", seed=9, classes=("owl",)))

    monkeypatch.setattr(downloads, "publish", publishing)
    with served(registry) as address, stub_of(address, "ada") as stub:
        call = stub.Compose(wire.ComposeRequest(), timeout=60)
        assert code_of(lambda: call) is Code.ABORTED


def test_with_a_client_goes_what_it_had_sent_and_was_not_taken_in(registry, tmp_path):
    folder = saved(member("ben", seed=9), tmp_path / "ben")
    staged = tmp_path / ".registry.service" / "uploads"
    with served(registry) as address, stub_of(address, "ben") as stub:
        parts = [offer_of(folder, replace=True), chunk(CARD, 0, (folder / CARD).read_bytes())]
        code_of(lambda: stub.Publish(iter(parts), timeout=60))
        assert list(staged.rglob(CARD))
        stub.Remove(wire.RemoveRequest(), timeout=60)
    assert not list(staged.rglob(CARD))
    assert intact(registry)


def test_a_verification_that_was_overtaken_is_no_finding(registry, monkeypatch):
    real = answers.verify_registry

    def verifying(path):
        registry.remove("ben")
        (registry.path / "stranger").write_text("x")
        return real(path)

    monkeypatch.setattr(answers, "verify_registry", verifying)
    with served(registry) as address, stub_of(address, "ada") as stub:
        assert code_of(lambda: stub.Verify(wire.VerifyRequest(), timeout=60)) is Code.ABORTED


def test_two_that_remove_one_client_get_one_receipt(registry, monkeypatch):
    """The other was another process: between the look and the lock, it was faster."""
    real = answers.Registry.remove

    def slower(self, *arguments, **options):
        real(registry, "ben", requested_by="faster")
        return real(self, *arguments, **options)

    monkeypatch.setattr(answers.Registry, "remove", slower)
    with served(registry) as address, stub_of(address, "ben") as stub:
        reply = stub.Remove(wire.RemoveRequest(), timeout=60)
    assert RemovalRecord.parse(reply.record, source="it").requested_by == "faster"
    registry.refresh()
    assert [entry.event for entry in registry.entries()].count("removed") == 1


def test_a_file_that_is_not_what_the_registry_says_is_not_sent(registry, handing_out):
    path = registry.path / registry.member("ben").folder / CARD
    path.write_bytes(path.read_bytes().replace(b"ben", b"bob"))
    with pytest.raises(RegistryError, match="altered"):
        list(handing_out.fetch(wire.FetchRequest(), calling("ben")))
