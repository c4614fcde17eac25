"""Changes of a folder, all or nothing; one writer at a time, who is known by name."""

from __future__ import annotations

import json
import os
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from failing_disk import PATIENCE, PROCESSES
from registry_builders import contents, member, one_of_each_kind, registry_of, same_bits

from fedcompo.errors import RegistryDamaged, RegistryError, RegistryLocked
from fedcompo.registry import transaction
from fedcompo.registry.registry import Registry
from fedcompo.registry.transaction import (
    Change,
    commit,
    locked,
    recover,
    recover_if_idle,
    stage,
)
from fedcompo.report.progress import Progress, listening
from fedcompo.storage.tensorfile import tensor_digest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "journal.jsonl").write_text("one\n")
    (tmp_path / "state.json").write_text("old")
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients" / "ben").write_text("his")
    return tmp_path


def staged(folder: Path, *names: str) -> None:
    new = stage(folder)
    for name in names:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).write_text(f"new {name}")


def change(*moves: str, deletions: tuple[str, ...] = (), model: str = "") -> Change:
    return Change(moves, 4, ("two", "three"), deletions, model)


# -- committing -----------------------------------------------------------------------------------


def test_a_committed_change_is_all_done(folder):
    with locked(folder, "test"):
        staged(folder, "clients/ada", "versions/1")
        commit(folder, change("clients/ada", "versions/1", deletions=("clients/ben",)), "new")
    assert contents(folder) == {
        "journal.jsonl": b"one\ntwo\nthree\n",
        "state.json": b"new",
        "clients": "folder",
        "clients/ada": b"new clients/ada",
        "versions": "folder",
        "versions/1": b"new versions/1",
    }


def test_what_is_staged_is_nothing_until_it_is_committed(folder):
    before = contents(folder)
    with locked(folder, "test"):
        staged(folder, "clients/ada")
        recover(folder)
    assert contents(folder) == before
    with locked(folder, "test"):
        staged(folder, "clients/ada")
    recover_if_idle(folder)
    assert contents(folder) == before


def test_half_a_line_left_in_the_journal_is_written_over(folder):
    with locked(folder, "test"):
        staged(folder)
        with (folder / "journal.jsonl").open("a") as file:
            file.write("half of a li")
        commit(folder, change(), "new")
    assert (folder / "journal.jsonl").read_text() == "one\ntwo\nthree\n"


def test_something_in_the_way_is_not_overwritten(folder):
    with locked(folder, "test"):
        staged(folder, "clients/ben")
        with pytest.raises(RegistryDamaged, match=r"clients/ben is in the way"):
            commit(folder, change("clients/ben"), "new")
        recover(folder)
    assert (folder / "clients" / "ben").read_text() == "his"
    assert (folder / "state.json").read_text() == "old"


def test_recovery_may_be_repeated(folder, monkeypatch):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with locked(folder, "test"):
        staged(folder, "clients/ada")
        with monkeypatch.context() as broken:
            broken.setattr(transaction, "_apply", fail)
            with pytest.raises(KeyboardInterrupt):
                commit(folder, change("clients/ada", deletions=("clients/ben",)), "new")
        assert (folder / "state.json").read_text() == "old"
        for _ in range(3):
            recover(folder)
    assert (folder / "state.json").read_text() == "new"
    assert sorted(p.name for p in (folder / "clients").iterdir()) == ["ada"]
    assert not (folder / "pending").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"moves": 1}'])
def test_a_commit_that_cannot_be_read_is_damage_not_a_guess(text, folder):
    staged(folder, "clients/ada")
    (folder / "pending" / "commit.json").write_text(text)
    with (
        pytest.raises(RegistryDamaged, match=r"commit\.json cannot be read .*restore"),
        locked(folder, "test"),
    ):
        pass
    assert (folder / "pending" / "new" / "clients" / "ada").exists()


# -- the lock -------------------------------------------------------------------------------------


def hold(folder: Path, pipe: Connection) -> None:
    with locked(folder, "adding 3 contribution(s)"):
        pipe.send("held")
        pipe.poll(PATIENCE)


@pytest.fixture
def holder(folder):
    """Another process that holds the lock until the pipe to it is closed."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=hold, args=(folder, theirs))
    process.start()
    theirs.close()
    assert ours.poll(PATIENCE)
    yield process, ours
    ours.close()
    process.join(PATIENCE)


def test_the_impatient_are_told_who_holds_the_lock_for_what_and_since_when(holder, folder):
    process, _ = holder
    with pytest.raises(RegistryLocked) as caught, locked(folder, "removing ada", patience=0.2):
        pass
    for part in ("adding 3 contribution(s)", f"process {process.pid}", "since 2", "0.2 s"):
        assert part in str(caught.value)


def test_the_patient_wait_and_are_told_once(holder, folder):
    process, line = holder
    told: list[str] = []

    def waiting(progress: Progress) -> None:
        told.append(progress.what)
        threading.Timer(0.3, line.send, ["enough"]).start()

    with listening(waiting), locked(folder, "removing ada"):
        process.join(PATIENCE)
        assert process.exitcode == 0
    assert len(told) == 1 and f"process {process.pid}" in told[0]


def test_the_lock_of_a_dead_process_is_free(holder, folder):
    process, _ = holder
    process.kill()
    process.join(PATIENCE)
    with locked(folder, "removing ada", patience=5.0):
        assert f"process {os.getpid()}" in (folder / "lock").read_text()
    assert (folder / "lock").read_text() == ""


def test_threads_of_one_process_wait_for_each_other_too(folder):
    with (
        locked(folder, "one"),
        pytest.raises(RegistryLocked, match=f"one, by .* {os.getpid()}"),
        locked(folder, "two", patience=0.1),
    ):
        pass


def test_opening_waits_for_nobody(holder, folder):
    (folder / "pending").mkdir()
    start = time.monotonic()
    recover_if_idle(folder)
    assert time.monotonic() - start < 5
    assert (folder / "pending").exists()  # it is the holder's


def test_what_cannot_be_written_can_still_be_opened(tmp_path, monkeypatch):
    registry = registry_of(tmp_path / "r", member("ada"))
    (registry.path / "pending").mkdir()

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(transaction, "_acquire", read_only)
    assert Registry(registry.path).state == registry.state
    with pytest.raises(RegistryError, match=r"could not be changed: .*Read-only"):
        registry.remove("ada")


# -- several at once ------------------------------------------------------------------------------


def come_and_go(path: Path, client: str, times: int) -> None:
    registry, given = Registry(path), member(client, seed=ord(client[0]))
    for _ in range(times):
        registry.add(given)
        registry.remove(client)
    registry.add(given)


def test_writers_take_turns_and_nothing_is_lost(tmp_path):
    path = registry_of(tmp_path / "r").path
    clients = ("dee", "eva", "fay")
    writers = [PROCESSES.Process(target=come_and_go, args=(path, c, 2)) for c in clients]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(PATIENCE)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    registry = Registry(path)
    expected = registry_of(tmp_path / "e", *(member(c, seed=ord(c[0])) for c in clients))
    assert registry.state.root == expected.state.root
    assert len(registry.entries()) == 1 + 3 * 5


def test_readers_never_see_half_a_state_nor_wait(tmp_path):
    path = registry_of(tmp_path / "r", *one_of_each_kind()).path
    without = Registry(path)
    known = {without.state.root: without.theta_p()}
    other = registry_of(tmp_path / "o", *one_of_each_kind(), member("dee", seed=ord("d")))
    known[other.state.root] = other.theta_p()
    writer = PROCESSES.Process(target=come_and_go, args=(path, "dee", 8))
    writer.start()
    seen = []
    while writer.is_alive():
        try:
            registry = Registry(path)
            theta_p, head = registry.theta_p(), registry.joint_head()
            digest = tensor_digest(registry.model().state_dict())
            registry.entries()
            for contribution in registry.pool():
                contribution.task_vector.delta(min(theta_p), theta_p[min(theta_p)])
        except RegistryError as error:
            assert "was changed while it was being read. Try again." in str(error)
            continue
        assert same_bits(theta_p, known[registry.state.root])
        assert len(head.classes) == len(registry.classes)
        seen.append((registry.state.root, digest))
    writer.join(PATIENCE)
    assert writer.exitcode == 0
    assert len(set(seen)) == len({root for root, _ in seen}) > 0  # a state is always the same one


@pytest.mark.parametrize("path", ["../victim", "/victim", ".", "a/../../victim", "out/victim"])
@pytest.mark.parametrize("part", ["moves", "deletions", "model"])
def test_a_commit_that_reaches_out_of_the_folder_is_refused(tmp_path, part, path):
    root, victim = tmp_path / "root", tmp_path / "victim"
    (root / "pending").mkdir(parents=True)
    victim.mkdir()
    (victim / "file").write_text("mine")
    (root / "out").symlink_to(tmp_path)
    (root / "journal.jsonl").touch()
    forged = {"moves": [], "journal_size": 0, "journal_lines": [], "deletions": [], "model": ""}
    forged[part] = path if part == "model" else [path]
    (root / "pending" / "commit.json").write_text(json.dumps(forged))
    with pytest.raises(RegistryDamaged, match="does not lie in"):
        recover(root)
    assert (victim / "file").read_text() == "mine"
    assert root.exists()
