"""A registry is verified: no changed byte, exchanged file or rewritten claim goes unseen."""

from __future__ import annotations

import itertools
import random
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forgery import reworded, rewrite_line, rewrite_record, rewrite_state
from registry_builders import member, own_statistics, registry_of

from fedcompo.composition.realigned import save_realigned
from fedcompo.config.choices import Kind
from fedcompo.method.heads import Head
from fedcompo.registry import signing
from fedcompo.registry.journal import read as read_journal
from fedcompo.registry.rederivation import Finding, head_finding
from fedcompo.registry.registry import Registry
from fedcompo.registry.state import ABOUT, PRIVATE, PUBLIC, State
from fedcompo.registry.transaction import JOURNAL, LOCK, MODEL, STATE
from fedcompo.registry.verification import all_but_folders, verify_registry
from fedcompo.storage.digests import raw_bytes
from fedcompo.storage.files import CONTENT, REALIGNED, SUM, WEIGHTS
from fedcompo.storage.identity import identity
from fedcompo.storage.manifest import OWN
from fedcompo.storage.tensorstream import StreamedTensors, file_sha256, save_streamed

RECORD = "removals/000004-dan.json"
KEPT = "versions/000003"
SMALL = (ABOUT, PUBLIC, PRIVATE, JOURNAL, STATE, "removals/000003-ben.json")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that a registry can hold.

    Members of each kind, a Fisher, a removal record, a kept version, a replaced client, a head that
    was aligned again.
    """
    registry = registry_of(
        tmp_path_factory.mktemp("mixed") / "registry",
        member("ada", Kind.FULL, seed=1, classes=("cat", "dog"), with_fisher=True),
        member("ben", Kind.LORA, seed=2, classes=("dog", "owl")),
    )
    registry.add(
        member("cho", Kind.IA3, seed=3, classes=("yak",)),
        member("dan", Kind.LORA, seed=4, classes=("emu",)),
    )
    registry.remove("dan", requested_by="dan", keep_versions=True)
    registry.add(member("ben", Kind.LORA, seed=5, classes=("dog", "owl")), replacing=True)
    registry.realign(own_statistics(registry, seed=9))
    return registry.path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One member and one who left: few enough bytes to try each."""
    path = tmp_path_factory.mktemp("small") / "registry"
    registry = registry_of(path, member("ada", classes=("cat",)), member("ben", classes=("owl",)))
    registry.remove("ben")
    return registry.path


@pytest.fixture(scope="module")
def part(request: pytest.FixtureRequest) -> int:
    """One of so many bytes is tried; each with ``--slow``."""
    return 1 if request.config.getoption("--slow") else 4


@pytest.fixture
def copy(mixed: Path, tmp_path: Path) -> Path:
    """A copy of the mixed registry, to be spoilt."""
    return Path(shutil.copytree(mixed, tmp_path / "copy", symlinks=True))


def files_of(root: Path) -> list[Path]:
    """Every file but the lock, which is empty while nobody writes."""
    return [p for p in sorted(root.rglob("*")) if p.is_file() and p.name != LOCK]


def failing(root: Path) -> list[Finding]:
    return [finding for finding in verify_registry(root) if finding.holds is False]


def claims(root: Path) -> list[str]:
    return [finding.claim for finding in failing(root)]


def names(found: list[Finding], file: Path) -> bool:
    """Whether a finding that fails names the file.

    `state.json` says where everything is and what it should be: what it says wrongly may be found
    at what it speaks of.
    """
    told = " ".join(finding.detail for finding in found)
    if file.name == STATE:
        return bool(found)
    return str(file) in told or f"no {file.name}" in told


@contextmanager
def written(file: Path, data: bytes) -> Iterator[None]:
    """Other bytes in a file, for a while."""
    before = file.read_bytes()
    file.write_bytes(data)
    try:
        yield
    finally:
        file.write_bytes(before)


def flipped(data: bytes, position: int, mask: int) -> bytes:
    return data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]


# -- bytes ----------------------------------------------------------------------------------------


def test_an_intact_registry_holds_in_every_claim(mixed: Path) -> None:
    found = verify_registry(mixed)
    assert [finding for finding in found if finding.holds is not True] == []
    assert len({finding.claim for finding in found}) == len(found) == 35
    held = {finding.claim for finding in found}
    for file in files_of(mixed):
        if file.name not in (STATE, JOURNAL, PRIVATE):  # these have claims of their own
            assert any(file.name in claim and "is unaltered" in claim for claim in held), file


def test_each_of_many_random_changes_of_a_byte_is_found(mixed: Path, part: int) -> None:
    """A bit is flipped or a byte exchanged, anywhere in any file.

    No byte is irrelevant but those of the file `lock`, which is not looked at: it is empty while
    nobody writes, and else says who does.
    """
    rng, files = random.Random(0), files_of(mixed)
    sizes = [file.stat().st_size for file in files]
    unseen = []
    for trial in range(1000 // part):  # in turn: each file as likely as the other, each byte so
        (file,) = rng.choices(files, weights=sizes if trial % 2 else None)
        data = file.read_bytes()
        position = rng.randrange(len(data))
        mask = 1 << rng.randrange(8) if trial % 4 < 2 else rng.randrange(1, 256)
        with written(file, flipped(data, position, mask)):
            if not names(failing(mixed), file):
                unseen.append((file.relative_to(mixed), position, mask))
    assert unseen == []
    assert failing(mixed) == []


@pytest.mark.parametrize("name", SMALL)
def test_no_byte_of_a_small_file_is_irrelevant(small: Path, name: str, part: int) -> None:
    file, rng = small / name, random.Random(name)
    data = file.read_bytes()
    unseen = []
    for position in range(0, len(data), part * (1 + len(data) // 500)):
        mask = 1 << rng.randrange(8)
        with written(file, flipped(data, position, mask)):
            if not names(failing(small), file):
                unseen.append((position, mask))
    assert unseen == []


def test_the_lock_alone_may_hold_anything(copy: Path) -> None:
    (copy / LOCK).write_bytes(b"\xff\x00 somebody")
    assert failing(copy) == []


@pytest.mark.parametrize("change", ["cut", "grown", "emptied", "deleted"])
def test_a_file_that_is_cut_grown_emptied_or_deleted_is_named(mixed: Path, change: str) -> None:
    for file in files_of(mixed):
        if (change, file.name) == ("deleted", PRIVATE):  # it may lie elsewhere
            continue
        data = file.read_bytes()
        changed = {"cut": data[:-1], "grown": data + b"\n", "emptied": b"", "deleted": data}
        with written(file, changed[change]):
            if change == "deleted":
                file.unlink()
            found = failing(mixed)
        assert names(found, file), (file, found)
    assert failing(mixed) == []


def test_two_files_that_are_exchanged_are_both_named(mixed: Path) -> None:
    alike = [file for file in files_of(mixed) if file.name in (CONTENT, WEIGHTS)]
    assert len(alike) == 5
    for one, other in itertools.combinations([*alike, mixed / PUBLIC, mixed / PRIVATE], 2):
        ones, others = one.read_bytes(), other.read_bytes()
        with written(one, others), written(other, ones):
            found = failing(mixed)
        assert names(found, one) and names(found, other), (one, other)


@pytest.mark.parametrize("place", ["x", "clients/ada/x", "clients/eve/x", f"{KEPT}/x", "model2/x"])
@pytest.mark.parametrize("kind", ["file", "empty", "link"])
def test_what_the_registry_did_not_put_there_is_named(copy: Path, place: str, kind: str) -> None:
    path = copy / place
    path.parent.mkdir(exist_ok=True)
    if kind == "link":
        path.symlink_to(copy / "clients" / "ada")
    else:
        path.write_bytes(b"x" if kind == "file" else b"")
    (found,) = failing(copy)
    assert found.claim == "there is no file that the registry does not know"
    assert found.detail == place


def test_a_link_that_leads_elsewhere_is_found(copy: Path) -> None:
    claim = "the link `model` leads to the composition"
    (copy / MODEL).unlink()
    assert claims(copy) == [claim]
    (copy / MODEL).symlink_to(KEPT)
    assert claims(copy) == [claim]
    (copy / MODEL).unlink()
    shutil.copytree(copy / State.read(copy / STATE).version, copy / MODEL)
    assert claim in claims(copy)


def test_a_file_in_place_of_the_link_of_an_empty_registry_is_found(tmp_path: Path) -> None:
    registry = registry_of(tmp_path / "registry")
    assert failing(registry.path) == []
    (registry.path / MODEL).write_text("of whom?")
    assert claims(registry.path) == ["there is no file that the registry does not know"]


def test_a_folder_that_is_no_registry_fails_with_a_sentence(tmp_path: Path) -> None:
    (found,) = failing(tmp_path)
    assert "There is no registry at" in found.detail


# -- attacks --------------------------------------------------------------------------------------


def test_an_old_state_that_is_put_back_is_found(small: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "copy", symlinks=True))
    old = (copy / STATE).read_bytes()
    Registry(copy).add(member("cho", classes=("yak",)))
    assert failing(copy) == []
    (copy / STATE).write_bytes(old)
    (found,) = failing(copy)
    assert STATE in found.detail and JOURNAL in found.detail


def test_journal_and_state_of_before_a_removal_are_found(tmp_path: Path) -> None:
    registry = registry_of(tmp_path / "r", member("ada"), member("ben", classes=("owl",)))
    before = {name: (registry.path / name).read_bytes() for name in (JOURNAL, STATE)}
    registry.remove("ben")
    for name, data in before.items():
        (registry.path / name).write_bytes(data)
    found = claims(registry.path)
    assert f"{CONTENT} of ben is unaltered" in found
    assert "there is no file that the registry does not know" in found  # the removal record


def test_a_dropped_last_line_is_found_even_where_the_state_knows_of_no_other(copy: Path) -> None:
    lines = (copy / JOURNAL).read_bytes().splitlines(keepends=True)
    (copy / JOURNAL).write_bytes(b"".join(lines[:-1]))
    assert claims(copy) == ["state and journal can be read and belong together"]
    entries = read_journal(copy / JOURNAL)
    rewrite_state(copy, sequence=len(entries), journal_sha256=entries[-1].sha256)
    assert claims(copy) == ["the root is that of the journal's last line"]


def test_a_journal_without_the_line_of_a_member_is_found(tmp_path: Path) -> None:
    registry = registry_of(tmp_path / "r", member("ada"))
    registry.add(member("ben", classes=("owl",)))
    lines = (registry.path / JOURNAL).read_bytes().splitlines(keepends=True)
    (registry.path / JOURNAL).write_bytes(b"".join(lines[:-1]))
    entries = read_journal(registry.path / JOURNAL)
    rewrite_state(registry.path, sequence=len(entries), journal_sha256=entries[-1].sha256)
    assert "the members are those of the journal" in claims(registry.path)


def test_a_record_signed_with_another_key_is_found(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "public").write_bytes(signing.create_key(tmp_path / "private").public_pem)
    keys = {PRIVATE: tmp_path / "private", PUBLIC: tmp_path / "public"}
    own = {name: (copy / name).read_bytes() for name in keys}
    (copy / PRIVATE).write_bytes(keys[PRIVATE].read_bytes())
    rewrite_record(copy, copy / RECORD, survivors=("ada",))
    (copy / PRIVATE).write_bytes(own[PRIVATE])
    assert claims(copy) == ["000004-dan.json is signed by the registry's key"]
    for name, path in keys.items():  # and the keys with it
        (copy / name).write_bytes(path.read_bytes())
    assert claims(copy) == [f"the {PUBLIC} is unaltered"]
    rewrite_state(copy, fixed={**Registry(copy).state.fixed, PUBLIC: file_sha256(copy / PUBLIC)})
    assert claims(copy) == ["the fixed files are those of the journal's first line"]


def test_a_record_that_the_journal_does_not_know_is_found(copy: Path) -> None:
    lie = reworded((copy / RECORD).read_bytes(), '"requested_by":"dan"', '"requested_by":"eve"')
    (copy / RECORD).write_bytes(lie)
    assert claims(copy) == [f"{RECORD} is unaltered"]


def test_what_is_kept_is_held_against_the_journal(copy: Path) -> None:
    """Who is in an earlier composition decides whether it goes with a client that is removed."""
    kept = dict(State.read(copy / STATE).kept[KEPT])
    claim = f"the kept {KEPT} is what the journal tells of it"
    rewrite_state(copy, kept={KEPT: {**kept, "clients": ["ada", "ben", "cho"]}})
    assert claims(copy) == [claim]
    (copy / KEPT / WEIGHTS).write_bytes(b"another model")
    files = {**kept["files"], WEIGHTS: file_sha256(copy / KEPT / WEIGHTS)}
    rewrite_state(copy, kept={KEPT: {**kept, "files": files}})
    assert claims(copy) == [claim]
    (copy / KEPT).rename(copy / "versions" / "000099")
    rewrite_state(copy, kept={"versions/000099": {**kept, "files": files}})
    assert claims(copy) == [claim.replace("000003", "000099")]


# -- the composition, where every hash is as it should be -----------------------------------------


def rehashed(root: Path, **claimed: str) -> None:
    """Let state and journal believe what lies there now, as whoever has the key could.

    Args:
        root: A registry, whose last line tells of all its members or of no client at all.
        claimed: What to claim of every member besides.
    """
    state = State.read(root / STATE)
    members = {}
    for client, known in state.members.items():
        files = {name: identity(root / known.folder / name) for name in known.files}
        members[client] = replace(known, files=files, **claimed)
    composed = {name: identity(root / state.version / name) for name in state.files}
    after = rewrite_state(root, members=members, files=composed)

    def believing(details: Mapping[str, Any]) -> dict[str, Any]:
        told = [
            {**line, **claimed, "files": members[line["client"]].files}
            if isinstance(line, dict)
            else line
            for line in details["clients"]
        ]
        return {**details, "clients": told, "root_after": after.root}

    rewrite_line(root, after.sequence, believing)


def change_tensor(root: Path, file: str, name: str, mask: int, *, byte: int = 0) -> None:
    """Flip bits in the first element of a tensor of the composition, and all hashes with it."""
    path = root / State.read(root / STATE).version / file
    tensors, manifest = dict(StreamedTensors(path)), StreamedTensors(path).manifest
    raw_bytes(tensors[name])[byte] ^= mask
    save_streamed(path, tensors, {k: v for k, v in manifest.items() if k not in OWN})
    rehashed(root)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Two members who came together."""
    contributions = member("ada", Kind.FULL, seed=1), member("ben", seed=2, classes=("owl",))
    return registry_of(tmp_path / "plain", *contributions).path


def test_a_composition_of_other_task_vectors_is_found(plain: Path) -> None:
    rehashed(plain)
    assert failing(plain) == []
    member("ada", Kind.FULL, seed=7).save(plain / "clients" / "ada")
    rehashed(plain)
    (found,) = [f for f in failing(plain) if "composition" in f.claim]
    assert found.claim == "the composition is that of the members"
    assert "the running sum differs at 'blocks.0.attn.proj.weight'" in found.detail


def test_a_model_that_does_not_follow_from_the_sum_is_found(plain: Path) -> None:
    name = "blocks.1.mlp.fc2.weight"
    change_tensor(plain, WEIGHTS, name, 1)
    assert [f.detail for f in failing(plain)] == [f"the model differs at {name!r}"]


def test_a_weight_that_nobody_trains_is_compared_too(plain: Path) -> None:
    change_tensor(plain, WEIGHTS, "cls_token", 1)
    assert [f.detail for f in failing(plain)] == ["the model differs at 'cls_token'"]


def test_a_sum_that_does_not_follow_from_the_members_is_found(plain: Path) -> None:
    name = "blocks.1.mlp.fc2.weight"
    change_tensor(plain, SUM, name, 1)
    assert [f.detail for f in failing(plain)] == [f"the running sum differs at {name!r}"]


def test_a_rounded_form_that_is_not_the_members_is_found(plain: Path) -> None:
    rehashed(plain, rounded_sha256="0" * 64)
    assert [f.detail for f in failing(plain)] == ["ada has a task vector of another digest"]


def test_a_head_that_is_not_fitted_to_the_members_is_found(plain: Path) -> None:
    change_tensor(plain, WEIGHTS, "head.bias", 0x40, byte=3)  # an exponent
    (found,) = failing(plain)
    assert found.claim == "the joint head is that of the members"
    assert "it differs by up to" in found.detail


def test_a_head_aligned_again_is_derived_from_its_own_statistics(plain: Path) -> None:
    registry = Registry(plain)
    of_the_clients = {c: registry.contribution(c).statistics for c in registry.clients}
    registry.realign(own_statistics(registry, seed=9))
    assert failing(plain) == []
    save_realigned(plain / registry.state.version / REALIGNED, of_the_clients)
    rehashed(plain)
    assert claims(plain) == ["the joint head is that of the members"]


def test_a_last_bit_that_another_processor_rounds_otherwise_leaves_the_claim_open() -> None:
    head = Head(("a", "b"), torch.ones(2, 3), torch.zeros(2))
    nearly = Head(head.classes, head.weight * (1 + 1e-6), head.bias)
    far = Head(head.classes, head.weight, head.bias + 1e-3)
    renamed = Head(("a", "c"), head.weight, head.bias)
    assert [head_finding(head, other).holds for other in (head, nearly, far, renamed)] == [
        True,
        None,
        False,
        False,
    ]


def test_folders_that_a_change_deletes_meanwhile_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    over = threading.Event()

    def changing() -> None:
        while not over.is_set():
            (tmp_path / "pending" / "new" / "versions").mkdir(parents=True)
            shutil.rmtree(tmp_path / "pending")

    other = threading.Thread(target=changing)
    other.start()
    try:
        for _ in range(300):
            assert tmp_path / "kept" / "file" in list(all_but_folders(tmp_path))
    finally:
        over.set()
        other.join()
