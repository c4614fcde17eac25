"""Whose key it is: rotation, copies without a key, pins, checkpoints; each lie is caught."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
from forgery import rewrite_line, rewrite_record, rewrite_state
from registry_builders import member, registry_of
from securesystemslib.dsse import Envelope as OthersEnvelope
from securesystemslib.signer import SSlibKey

from fedcompo.errors import ConfigError, FileFormatError
from fedcompo.registry import journal, known, signing
from fedcompo.registry.checkpoint import Checkpoint
from fedcompo.registry.key_verification import continues, whose_key
from fedcompo.registry.record_verification import verify_record
from fedcompo.registry.registry import Registry
from fedcompo.registry.removal import RemovalRecord
from fedcompo.registry.rotation import keys_of, rotate
from fedcompo.registry.signing import PRIVATE, PUBLIC, create_key, fingerprint_of, signer_for
from fedcompo.registry.transaction import JOURNAL, PENDING
from fedcompo.registry.verification import verify_registry
from fedcompo.storage.tensorstream import file_sha256


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry from which ben was removed before its key was changed, and cho after."""
    path = tmp_path_factory.mktemp("keys") / "r"
    registry = registry_of(path, *(member(c, classes=(c,)) for c in ("ada", "ben", "cho")))
    shutil.copytree(path, path.with_name("yesterday"), symlinks=True)
    registry.remove("ben")
    shutil.copy(path / PRIVATE, path.with_name("stolen.pem"))
    shutil.copytree(path, path.with_name("before"), symlinks=True)
    rotate(registry)
    Registry(path).remove("cho")
    return path


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy", symlinks=True)


def failing(path: Path) -> dict[str, str]:
    """Claims of a registry that do not hold, with the reasons."""
    return {f.claim: f.detail for f in verify_registry(path) if f.holds is False}


def receipt(path: Path, client: str) -> Path:
    (found,) = (path / "removals").glob(f"*-{client}.json")
    return found


# -- rotation -------------------------------------------------------------------------------------


def test_receipts_of_before_and_after_a_rotation_verify_each_with_its_key(made: Path) -> None:
    assert not failing(made)
    for client in ("ben", "cho"):
        findings = verify_record(receipt(made, client), registry=Registry(made))
        assert not [f for f in findings if f.holds is False]
    (_, first), (line, now) = keys_of(Registry(made), Registry(made).entries())
    assert first == signing.read_signer(made.with_name("stolen.pem")).public_pem
    assert (line, now) == (4, (made / PUBLIC).read_bytes())


def test_the_stolen_old_key_signs_nothing_after_its_rotation(copy: Path, made: Path) -> None:
    thief = signing.read_signer(made.with_name("stolen.pem"))
    path = receipt(copy, "cho")
    forged = RemovalRecord.parse(path.read_bytes(), source="").signed(thief)
    path.write_bytes(forged.text.encode())
    finding = verify_record(path, registry=Registry(copy))[0]
    assert finding.holds is False and PUBLIC in finding.detail
    shutil.copy(made.with_name("stolen.pem"), copy / PRIVATE)
    with pytest.raises(ConfigError, match="not that of"):
        Registry(copy).remove("ada")


def test_a_rotation_that_the_old_key_did_not_sign_is_found(copy: Path, tmp_path: Path) -> None:
    stranger = create_key(tmp_path / "stranger.pem")
    (copy / PUBLIC).write_bytes(stranger.public_pem)
    shutil.copy(tmp_path / "stranger.pem", copy / PRIVATE)
    state = Registry(copy).state
    rewrite_state(copy, fixed={**state.fixed, PUBLIC: file_sha256(copy / PUBLIC)})
    claim = "each change of the key is signed by the key before, and leads to the present one"
    assert "not the key that the journal's rotations lead to" in failing(copy)[claim]


@pytest.mark.parametrize("old_inside", [True, False])
def test_a_crash_anywhere_leaves_the_old_or_the_new_key(
    old_inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = registry_of(tmp_path / "r", member("ada")).path
    outside = None if old_inside else tmp_path / "old.pem"
    if outside:
        (original / PRIVATE).rename(outside)
    renames, number = Path.replace, 0
    keys = set()
    while True:
        path = shutil.copytree(original, tmp_path / f"r{number}", symlinks=True)
        old = outside and shutil.copy(outside, tmp_path / f"old{number}.pem")
        new = outside and tmp_path / f"new{number}.pem"
        left = [number]

        def breaking(source: Path, target: Path, left: list[int] = left) -> Path:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return renames(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", breaking)
            patch.setattr("fedcompo.registry.draft.transaction.recover", lambda root: None)
            try:
                rotate(Registry(path), key=old, new_key=new)
                done = True
            except KeyboardInterrupt:
                done = False
        registry = Registry(path)  # completes or undoes it
        place = next((p for p in (new, old) if p and p.exists()), path / PRIVATE)
        changed = len(registry.entries()) > 2
        place = (new if changed else old) or path / PRIVATE
        assert signer_for(path, place).public_pem == (path / PUBLIC).read_bytes()
        assert not failing(path) and not (path / PENDING).exists()
        keys.add(changed)
        if done:
            assert old is None or not Path(old).exists()
            return
        number += 1


# -- where the key lies ---------------------------------------------------------------------------


def test_a_copy_without_the_private_key_verifies_and_cannot_sign(copy: Path) -> None:
    (copy / PRIVATE).unlink()
    assert not failing(copy)
    before = (copy / JOURNAL).read_bytes()
    with pytest.raises(ConfigError, match=r"no signing key at .*--signing-key"):
        Registry(copy).remove("ada")
    assert (copy / JOURNAL).read_bytes() == before and not (copy / PENDING).exists()


def test_a_private_key_that_others_can_read_is_a_failing_claim(copy: Path) -> None:
    (copy / PRIVATE).chmod(0o640)
    claim = f"{PRIVATE} is readable by its owner alone"
    assert list(found := failing(copy)) == [claim]
    assert f"chmod 600 {copy / PRIVATE}" in found[claim]


def test_who_may_not_read_the_private_key_verifies_all_the_same(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def denied(path: Path) -> bytes:
        if path.name == PRIVATE:
            raise PermissionError(f"Permission denied: {path}")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    findings = verify_registry(copy)
    assert [f.claim for f in findings if not f.holds] == ["the keys belong together"]
    assert not failing(copy)


def test_a_key_that_the_registry_had_does_not_come_back(copy: Path, made: Path) -> None:
    stolen = made.with_name("stolen.pem")
    with pytest.raises(ConfigError, match="has or had"):
        rotate(Registry(copy), new_key=stolen)
    assert stolen.exists() and not failing(copy)


def test_an_old_key_that_cannot_be_deleted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old.pem", tmp_path / "new.pem"
    registry = Registry.create(tmp_path / "r", registry_of(tmp_path / "s").backbone.load(), key=old)
    before = known.known(registry.identity)
    deleted = Path.unlink

    def denied(path: Path, missing_ok: bool = False) -> None:
        if path == old:
            raise PermissionError("read-only")
        deleted(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", denied)
    with pytest.raises(ConfigError, match=r"was changed, but the old .*old\.pem is still there"):
        rotate(registry, key=old, new_key=new)
    now = known.known(registry.identity)
    assert before and now and now.former == {before.fingerprint: 2}
    assert signer_for(registry.path, new).fingerprint == now.fingerprint


def test_an_encrypted_key_outside_signs_with_its_password_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "elsewhere" / "key.pem"
    monkeypatch.setenv(signing.PASSWORD, "correct horse")
    registry = registry_of(tmp_path / "r", member("ada"), member("ben", classes=("owl",)))
    rotate(registry, new_key=key)
    assert b"ENCRYPTED" in key.read_bytes() and not (registry.path / PRIVATE).exists()
    monkeypatch.setenv(signing.PASSWORD, "battery staple")
    with pytest.raises(FileFormatError, match="password"):
        registry.remove("ben", key=key)
    monkeypatch.delenv(signing.PASSWORD)
    with pytest.raises(ConfigError, match="is encrypted"):
        registry.remove("ben", key=key)
    assert registry.clients == ("ada", "ben")
    monkeypatch.setenv(signing.PASSWORD, "correct horse")
    monkeypatch.setenv(signing.KEY, str(key))
    registry.remove("ben")
    rotate(Registry(registry.path), new_key=registry.path / PRIVATE)  # back into the registry
    assert not key.exists() and not failing(registry.path)
    monkeypatch.delenv(signing.PASSWORD)
    open_ = [f.claim for f in verify_registry(registry.path) if f.holds is None]
    assert open_ == ["the keys belong together"] and not failing(registry.path)


# -- pins -----------------------------------------------------------------------------------------


def test_a_registry_signed_anew_from_end_to_end_is_not_signed_by_the_pinned_key(
    made: Path, tmp_path: Path
) -> None:
    """Who has the files but not the key exchanges it everywhere: only the pin betrays it."""
    copy = shutil.copytree(made.with_name("before"), tmp_path / "copy", symlinks=True)
    finding = whose_key(Registry(copy), None, copy / PUBLIC, "")
    assert finding.holds is False  # it was set back to before the rotation
    (copy / PRIVATE).unlink()
    forger = create_key(copy / PRIVATE)
    (copy / PUBLIC).write_bytes(forger.public_pem)
    fixed = {**Registry(copy).state.fixed, PUBLIC: file_sha256(copy / PUBLIC)}
    rewrite_state(copy, fixed=fixed)
    rewrite_line(copy, 1, lambda details: {**details, "fixed": fixed})
    before = journal.read(copy / JOURNAL)[1].sha256
    rewrite_record(copy, receipt(copy, "ben"), journal_before=before)
    assert not failing(copy)  # it is consistent in itself
    record, public = receipt(copy, "ben"), copy / PUBLIC
    for registry, given in ((Registry(copy), None), (Registry(copy), record), (None, record)):
        finding = whose_key(registry, given, public, "")
        assert finding.holds is False
        assert forger.fingerprint in finding.claim
        assert "--public-key" in finding.detail
    assert whose_key(Registry(copy), None, public, forger.fingerprint).holds


def test_a_lone_receipt_counts_if_its_key_was_the_registrys_at_that_line(
    made: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old.pem"
    old.write_bytes(signing.read_signer(made.with_name("stolen.pem")).public_pem)
    assert whose_key(None, receipt(made, "ben"), old, "").holds
    assert whose_key(None, receipt(made, "cho"), old, "").holds is False
    assert whose_key(None, receipt(made, "cho"), made / PUBLIC, "").holds
    assert whose_key(None, receipt(made, "ben"), made / PUBLIC, "").holds is False


def test_pins_are_private_and_a_broken_file_is_said_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "sub" / "known.json"
    monkeypatch.setenv(known.VARIABLE, str(path))
    before = os.umask(0)
    try:
        registry = registry_of(tmp_path / "r")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    held = known.known(registry.identity)
    assert held and held.fingerprint == fingerprint_of((registry.path / PUBLIC).read_bytes())
    path.write_text("{")
    registry_of(tmp_path / "another")
    assert str(path) in caplog.text and path.read_text() == "{"
    monkeypatch.setenv(known.VARIABLE, str(tmp_path / "r" / PUBLIC / "known.json"))
    caplog.clear()
    assert registry_of(tmp_path / "third").clients == ()
    assert "could not be written" in caplog.text
    monkeypatch.delenv(known.VARIABLE)
    caplog.clear()

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    registry = registry_of(tmp_path / "fourth")
    assert known.known(registry.identity) is None
    assert known.VARIABLE in caplog.text


# -- checkpoints ----------------------------------------------------------------------------------


def checkpoint_of(path: Path, file: Path) -> Path:
    registry = Registry(path)
    file.write_bytes(Checkpoint.of(registry.identity, registry.state).sealed(signer_for(path)))
    return file


def refused(path: Path, since: str) -> list[str]:
    return [f.claim for f in continues(Registry(path), since) if f.holds is False]


def test_another_verifier_reads_a_checkpoint(made: Path, tmp_path: Path) -> None:
    data = checkpoint_of(made, tmp_path / "c.json").read_bytes()
    key = signer_for(made)
    theirs = SSlibKey(key.fingerprint, "ed25519", "ed25519", {"public": _raw(key.public_pem).hex()})
    envelope = OthersEnvelope.from_dict(json.loads(data))
    assert envelope.verify([theirs], 1)
    statement = json.loads(envelope.payload)
    assert statement["predicateType"] == "https://fedcompo.org/checkpoint/v1"
    assert statement["subject"][0]["digest"] == {"sha256": Registry(made).state.root}


def _raw(pem: bytes) -> bytes:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_public_key(pem)
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def test_a_registry_goes_on_from_its_checkpoint_also_across_a_rotation(
    made: Path, tmp_path: Path
) -> None:
    before = made.with_name("before")
    old = checkpoint_of(before, tmp_path / "old.json")
    state = Registry(before).state
    assert not refused(made, str(old))
    assert not refused(made, str(checkpoint_of(made, tmp_path / "now.json")))
    assert not refused(made, f"{state.root}@{state.sequence}")
    for line in range(1, len(Registry(made).entries()) + 1):
        assert not refused(made, f"{_root(made, line)}@{line}")


def _root(path: Path, line: int) -> str:
    entries = Registry(path).entries()
    own = entries[line - 1].details.get("root_after")
    return own or entries[line].details["root_before"]


def test_a_copy_of_yesterday_and_a_rewritten_history_are_refused(
    made: Path, tmp_path: Path
) -> None:
    yesterday = made.with_name("yesterday")
    now = checkpoint_of(made.with_name("before"), tmp_path / "now.json")
    root = Registry(made).state.root
    assert any("goes on" in claim for claim in refused(yesterday, str(now)))
    assert refused(yesterday, f"{root}@{Registry(made).state.sequence}")
    other = Registry(shutil.copytree(yesterday, tmp_path / "other", symlinks=True))
    other.remove("ada")  # the same number of lines, another story
    assert refused(other.path, str(now))
    with pytest.raises(FileFormatError, match="no signed statement"):
        list(continues(Registry(made), str(made / "registry.json")))
    with pytest.raises(ConfigError, match="neither ROOT@N nor"):
        list(continues(Registry(made), "yesterday"))


def test_no_bit_of_a_checkpoint_may_change(made: Path, tmp_path: Path) -> None:
    data = checkpoint_of(made, tmp_path / "c.json").read_bytes()
    path = tmp_path / "changed.json"
    keyid = data.index(signer_for(made).fingerprint.encode())  # a hint, which nothing relies on
    for position in {*range(0, len(data), 7)} - {*range(keyid, keyid + 64)}:
        changed = bytearray(data)
        changed[position] ^= 1
        path.write_bytes(changed)
        with contextlib.suppress(FileFormatError):
            assert refused(made, str(path)), position
