"""What a client insists on: the registry's key, and a journal that only grows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from registry_builders import member, registry_of, three_clients
from service_runs import authority, credential, served

from fedcompo.errors import ConfigError, ServiceError
from fedcompo.registry import known
from fedcompo.registry.checkpoint import Checkpoint
from fedcompo.registry.registry import Registry
from fedcompo.registry.rotation import rotate
from fedcompo.registry.signing import PRIVATE, PUBLIC, create_key, fingerprint_of, signer_for
from fedcompo.service import registry_pb2 as wire
from fedcompo.service.acquaintance import Acquaintance
from fedcompo.service.client import Client
from fedcompo.service.receipt import Receipt

SERVER = "fed.example.org:9443"


@pytest.fixture(autouse=True)
def pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the client knows: nothing yet."""
    path = tmp_path / "client" / "known.json"
    monkeypatch.setenv(known.VARIABLE, str(path))
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_clients(tmp_path_factory.mktemp("service") / "r").path


@pytest.fixture
def registry(original: Path, tmp_path: Path) -> Registry:
    return Registry(shutil.copytree(original, tmp_path / "r", symlinks=True))


def said(registry: Registry, before: Acquaintance) -> wire.ListReply:
    """What an honest service of a registry answers, without a network."""
    from fedcompo.registry.rotation import rotations_in

    registry = Registry(registry.path)
    line, entries = before.sequence(), registry.entries()
    earlier = (line, entries[line - 1].sha256) if 0 < line <= len(entries) else (0, "")
    signer = signer_for(registry.path)
    return wire.ListReply(
        identity=registry.identity,
        root=registry.state.root,
        sequence=registry.state.sequence,
        public_key=signer.public_pem,
        checkpoint=Checkpoint.of(registry.identity, registry.state, earlier).sealed(signer),
        rotations=[r.data for r in rotations_in(entries, registry.identity)],
    )


def met(registry: Registry) -> known.Known:
    """Meet a registry at the server's address."""
    before = Acquaintance(SERVER, known.read())
    return before.greet(said(registry, before))


def test_a_client_follows_changes_and_rotations_over_the_wire(registry: Registry) -> None:
    """Over the real service; the tests below speak to it without a network."""
    with (
        served(registry) as address,
        Client(
            address, authority().credential.certificate, credential("ada"), insisting=True
        ) as client,
    ):
        client.list()
        first = known.known(registry.identity)
        registry.remove("cho")
        rotation = rotate(registry)
        client.list()
        receipt = client.remove()
        receipt.checked("ada")
        client.list()
    held = known.known(registry.identity)
    assert first and held and held.fingerprint == fingerprint_of(rotation.after)
    assert held.former == {first.fingerprint: rotation.sequence}
    assert (first.sequence, held.sequence) == (2, 5)
    assert held.since == first.since


def test_another_key_without_a_rotation_is_refused_with_both_fingerprints(
    registry: Registry, tmp_path: Path
) -> None:
    pinned = met(registry)
    (registry.path / PRIVATE).unlink()
    forger = create_key(registry.path / PRIVATE)
    (registry.path / PUBLIC).write_bytes(forger.public_pem)
    with pytest.raises(ServiceError, match="Somebody may pose as") as caught:
        met(registry)
    assert forger.fingerprint in str(caught.value) and pinned.fingerprint in str(caught.value)


def test_the_stolen_old_key_does_not_lead_to_the_thiefs(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thiefs = Registry(shutil.copytree(registry.path, tmp_path / "thief", symlinks=True))
    rotate(registry)
    met(registry)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv(known.VARIABLE, str(tmp_path / "thief.json"))
        rotate(thiefs)  # from the same old key, which is no longer the registry's
    with pytest.raises(ServiceError, match="signs with another key"):
        met(thiefs)


def test_a_registry_that_was_set_back_is_refused_and_the_proof_is_kept(
    registry: Registry, tmp_path: Path, pins: Path
) -> None:
    yesterday = Registry(shutil.copytree(registry.path, tmp_path / "yesterday", symlinks=True))
    registry.remove("cho")
    met(registry)
    with pytest.raises(ServiceError, match="had 3 lines, and has 2 now"):
        met(yesterday)
    proof = sorted(pins.parent.glob("contradiction-*"))
    assert len(proof) == 2 and known.known(registry.identity).sequence == 3  # type: ignore[union-attr]
    for file in proof:
        stated, envelope = Checkpoint.parse(file.read_bytes(), source=str(file))
        assert envelope.is_signed_by((registry.path / PUBLIC).read_bytes())
    assert stated.sequence == 3 or stated.root == yesterday.state.root


@pytest.mark.parametrize("more", [0, 1], ids=["as many lines", "more lines"])
def test_two_stories_are_refused(registry: Registry, tmp_path: Path, more: int) -> None:
    other = Registry(shutil.copytree(registry.path, tmp_path / "other", symlinks=True))
    registry.remove("cho")
    met(registry)
    other.remove("ben")
    for _ in range(more):
        other.add(member("dee", seed=8, classes=("emu",)))
    expected = "line 3 of its journal was" if more else "3 lines as before, but root and last"
    with pytest.raises(ServiceError, match=expected):
        met(other)


def test_a_receipt_from_a_copy_is_refused_while_the_member_is_still_there(
    registry: Registry, tmp_path: Path
) -> None:
    copy = Registry(shutil.copytree(registry.path, tmp_path / "copy", symlinks=True))
    receipt = Receipt(copy.remove("ben").text.encode(), (registry.path / PUBLIC).read_bytes())
    registry.add(member("dee", seed=8, classes=("emu",)))
    registry.add(member("eve", seed=9, classes=("fox",)))  # as if the journal had gone on
    there = wire.ListReply(root=registry.state.root, sequence=registry.state.sequence)
    receipt.require_in(there)
    there.members.add(client="ben", added=registry.member("ben").added)
    with pytest.raises(ServiceError, match="without ben"):
        receipt.require_in(there)
    there.members[0].added = there.sequence  # it came back later
    receipt.require_in(there)


def test_each_former_key_signs_the_lines_of_its_time_alone() -> None:
    held = known.Known("c", former={"a": 5, "b": 9})
    lines = {key: [n for n in range(1, 12) if held.signs(key, n)] for key in "abcd"}
    assert lines == {"a": [1, 2, 3, 4], "b": [6, 7, 8], "c": [10, 11], "d": []}


def test_what_is_not_signed_or_of_another_registry_is_refused(
    registry: Registry, tmp_path: Path
) -> None:
    met(registry)
    before = Acquaintance(SERVER, known.read())
    bare = said(registry, before)
    bare.checkpoint = b""
    with pytest.raises(ServiceError, match="signs no checkpoint any more"):
        before.greet(bare)
    lying = said(registry, before)
    lying.root = "0" * 64
    with pytest.raises(ServiceError, match="of another registry"):
        before.greet(lying)
    with pytest.raises(ServiceError, match="had the registry"):
        met(registry_of(tmp_path / "another"))


def test_an_older_server_is_met_by_its_key_alone(registry: Registry) -> None:
    before = Acquaintance(SERVER, known.read())
    reply = said(registry, before)
    reply.ClearField("checkpoint")
    held = before.greet(reply)
    assert (held.sequence, held.checkpoint) == (0, "")
    assert met(registry).sequence == 2


def test_a_service_without_its_key_does_not_start(registry: Registry) -> None:
    (registry.path / PRIVATE).unlink()
    with pytest.raises(ConfigError, match="--signing-key"), served(registry):
        pass
