"""A change happens or it does not: killed at any point, without disk, without power, while read."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from failing_disk import (
    PATIENCE,
    PROCESSES,
    Death,
    DeathAfter,
    Durable,
    Failing,
    Listener,
    watched,
)
from registry_builders import (
    backbone,
    contents,
    member,
    one_of_each_kind,
    own_statistics,
    registry_of,
    same_bits,
)

from fedcompo.config.choices import Kind
from fedcompo.errors import FedcompoError, RegistryError
from fedcompo.registry import journal
from fedcompo.registry.registry import Registry
from fedcompo.storage.tensorfile import tensor_digest

NEVER = 10**9


def replace(registry: Registry) -> None:
    """Add a contribution, and take another out."""
    registry.add(registry.path.parent / "replacement", replacing=True)


def remove(registry: Registry) -> None:
    registry.remove("ben", requested_by="ben", reason="moved away")


def realign(registry: Registry) -> None:
    registry.realign(own_statistics(registry, seed=9), factor=0.7)


def empty(registry: Registry) -> None:
    """Remove the last client."""
    registry.remove("ada", requested_by="ada")


CHANGES = {change.__name__: change for change in (replace, remove, realign, empty)}


def quickly(change: Callable[[Registry], None], path: Path, listener: Listener) -> None:
    """Change a registry under observation, always in the same bits and at the same time."""
    journal.utc_now = lambda: "2030-01-01T00:00:00Z"
    registry = Registry(path)
    with watched(listener):
        change(registry)


def create(path: Path, listener: Listener) -> None:
    made = backbone()
    with watched(listener):
        Registry.create(path / "registry", made)


def deaths(action: Callable[[Path, Listener], None], folder: Path, step: int) -> None:
    """Die at the first operation, at one some steps later, until one lives: a fork for each."""
    codes: list[int] = []
    gc.disable()
    gc.freeze()
    while not codes or codes[-1] != 0:
        path = folder / str(len(codes) + 1)
        shutil.copytree(folder / "old", path, symlinks=True)
        if (child := os.fork()) == 0:
            action(path, Death(len(codes) * step + 1))
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    (folder / "codes.json").write_text(json.dumps(codes))


def process(target: Callable[..., None], *arguments: Any) -> int | None:
    """Run a function in a process of its own; returns its exit code."""
    child = PROCESSES.Process(target=target, args=arguments)
    child.start()
    child.join(PATIENCE)
    if child.exitcode is None:
        child.kill()
    return child.exitcode


class Scene:
    """A registry before and after a change, and copies to try it on."""

    def __init__(self, folder: Path, change: str) -> None:
        self.folder, self.change = folder, CHANGES[change]
        members = one_of_each_kind()[: 1 if change == "empty" else 3]
        registry = registry_of(folder / "old", *members)
        if change == "remove":  # a joint head of more than its clients' statistics
            registry.realign({m.client: m.statistics for m in members})
        member("ben", Kind.FULL, seed=5, with_fisher=True).save(folder / "replacement")
        assert process(quickly, self.change, self.copy("new"), Death(NEVER)) == 0
        self.old, self.new = contents(folder / "old"), contents(folder / "new")
        self.roots = Registry(folder / "old").state.root, Registry(folder / "new").state.root
        assert self.roots[0] != self.roots[1]

    def within(self, folder: Path) -> Scene:
        """The same in another folder: it is made once."""
        shutil.copytree(self.folder, folder, symlinks=True, dirs_exist_ok=True)
        other = copy.copy(self)
        other.folder = folder
        return other

    def copy(self, name: str) -> Path:
        shutil.copytree(self.folder / "old", self.folder / name, symlinks=True)
        return self.folder / name

    def outcome(self, path: Path) -> str:
        """Open what was left behind: every file must be that of before, or that of after."""
        registry = Registry(path)
        found = contents(path)
        strange = [
            name
            for name in {*found, *self.old, *self.new}
            if found.get(name) not in (self.old.get(name), self.new.get(name))
        ]
        assert found in (self.old, self.new), strange
        assert registry.state.root == self.roots[found == self.new]
        registry.entries()
        return "new" if found == self.new else "old"


@pytest.fixture
def step(request) -> int:
    """Of how many operations one is tried; of all with ``--slow``."""
    return 1 if request.config.getoption("--slow") else 2


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return functools.cache(lambda change: Scene(tmp_path_factory.mktemp(change), change))


@pytest.fixture(params=CHANGES)
def scene(request, scenes, tmp_path):
    return scenes(request.param).within(tmp_path)


# -- killed ---------------------------------------------------------------------------------------


def points(folder: Path) -> list[int]:
    """Numbers of the processes that were killed, and of the one that lived."""
    *codes, last = json.loads((folder / "codes.json").read_text())
    assert set(codes) == {-signal.SIGKILL} and last == 0
    return list(range(1, len(codes) + 2))


def test_killed_at_any_operation_leaves_the_old_state_or_the_new(scene, step):
    assert process(deaths, partial(quickly, scene.change), scene.folder, step) == 0
    numbers = points(scene.folder)
    assert len(numbers) > 30 / step
    outcomes = [scene.outcome(scene.folder / str(number)) for number in numbers]
    assert outcomes == sorted(outcomes, key=["old", "new"].index)  # it happens at one moment
    assert outcomes[0] == "old" and outcomes[-1] == "new"
    for number in (1, len(numbers) // 2, len(numbers) - 1):  # what follows works
        registry = Registry(scene.folder / str(number))
        before = registry.clients, dict(registry.running_sum()) if registry.clients else {}
        registry.add(member("eva", seed=4))
        registry.remove("eva")
        after = registry.clients, dict(registry.running_sum()) if registry.clients else {}
        assert after[0] == before[0] and same_bits(after[1], before[1])


def test_killed_while_it_is_made_leaves_no_registry_or_a_whole_one(tmp_path, step):
    (tmp_path / "old").mkdir()
    expected = registry_of(tmp_path / "expected").state.root
    assert process(deaths, create, tmp_path, step) == 0
    numbers = points(tmp_path)
    assert len(numbers) > 20 / step
    paths = [tmp_path / str(number) / "registry" for number in numbers]
    made = [path.exists() for path in paths]
    assert made == sorted(made) and not made[0] and made[-1]
    for path, whole in zip(paths, made, strict=True):
        registry = Registry(path) if whole else registry_of(path)
        assert registry.state.root == expected
        assert registry.entries()[0].event == "created"


# -- full disks, and broken ones ------------------------------------------------------------------


def failures(change: Callable[[Registry], None], folder: Path, full: bool, step: int) -> None:
    """Fail at one operation after the other; writes down what was said, and what failed."""
    told = []
    for point in range(1, NEVER, step):
        path = folder / f"failed-{point}"
        shutil.copytree(folder / "old", path, symlinks=True)
        failing, message = Failing(point, full=full), ""
        try:
            quickly(change, path, failing)
        except RegistryError as error:
            message = str(error)
        if not failing.failed:
            break
        tidy = full or not (path / "pending").exists()  # unless there is no room for that either
        told.append((path.name, failing.failed, message, tidy))
    (folder / "told.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("scene", "full"),
    [("replace", False), ("remove", True)],
    indirect=["scene"],
    ids=["one operation fails", "the disk is full"],
)
def test_a_failing_disk_leaves_the_old_state_or_the_new_and_says_so(scene, full, step):
    assert process(failures, scene.change, scene.folder, full, step) == 0
    told = json.loads((scene.folder / "told.json").read_text())
    assert len(told) > 30 / step
    for name, operation, message, tidy in told:
        assert tidy, operation
        outcome = scene.outcome(scene.folder / name)
        said = "could not be changed" in message and "No space left" in message * full
        assert said or "Input/output" in message or (outcome == "new" and not message), operation


# -- power cuts -----------------------------------------------------------------------------------


def power_cuts(change: Callable[[Registry], None], folder: Path) -> None:
    """Write down what each sync leaves on the disk."""
    path, states = folder / "powered", []
    shutil.copytree(folder / "old", path, symlinks=True)
    durable = Durable(path)

    def listener(operation: str, half: Callable[[], object]) -> None:
        if operation.startswith("fsync"):
            durable.after_sync(int(operation.split()[1]))
            states.append(f"cut-{len(states)}")
            durable.write(folder / states[-1])

    quickly(change, path, listener)
    durable.write(folder / "cut-at-the-end")


def test_what_was_synced_is_enough_at_any_moment(scene):
    assert process(power_cuts, scene.change, scene.folder) == 0
    cuts = len(list(scene.folder.glob("cut-*"))) - 1
    outcomes = [scene.outcome(scene.folder / f"cut-{number}") for number in range(cuts)]
    assert outcomes == sorted(outcomes, key=["old", "new"].index)
    assert outcomes[0] == "old"
    end = scene.folder / "cut-at-the-end"
    assert contents(end) == scene.new  # nothing comes back, and there is nothing left to do


# -- readers --------------------------------------------------------------------------------------


def reading(change: Callable[[Registry], None], path: Path, step: int) -> None:
    """Before operations of a change, look at the registry as another process would."""
    found, counted = [], itertools.count()
    early = Registry(path)  # opened before, and not told of the change

    def look(operation: str, half: Callable[[], object]) -> None:
        if next(counted) % step:
            return
        try:
            found.append((operation, description(Registry(path)), described(early)))
        except FedcompoError as error:
            found.append((operation, repr(error), ""))

    quickly(change, path, look)
    counted = itertools.repeat(0)
    look("the end", lambda: None)
    (path.parent / "found.json").write_text(json.dumps(found))


def described(registry: Registry) -> str:
    """What a reader sees, unless it is told to try again."""
    try:
        return description(registry)
    except RegistryError as error:
        if "was changed while it was being read. Try again." not in str(error):
            raise
        return "try again"


def description(registry: Registry) -> str:
    """All that a reader can see, in few words."""
    seen = {"root": registry.state.root, "lines": len(registry.entries())}
    for client in registry.clients:
        contribution = registry.contribution(client, with_fisher=True)
        seen[client] = tensor_digest(contribution.task_vector.tensors)
    if registry.clients:
        seen["model"] = tensor_digest(registry.model().state_dict())
        seen["sum"] = tensor_digest(registry.running_sum())
    return json.dumps(seen)


@pytest.mark.parametrize("scene", ["replace", "remove"], indirect=True)
def test_a_reader_sees_the_old_state_or_the_new_at_every_moment(scene, step):
    known = [description(Registry(scene.folder / name)) for name in ("old", "new")]
    assert process(reading, scene.change, scene.copy("read"), step) == 0
    found = json.loads((scene.folder / "found.json").read_text())
    seen = [known.index(now) for _, now, _ in found if now in known]
    assert len(seen) == len(found), [(o, now) for o, now, _ in found if now not in known]
    assert seen == sorted(seen) and {*seen} == {0, 1}
    patient = {late for _, _, late in found}
    assert patient <= {known[0], "try again"}


def recovering(path: Path, step: int) -> None:
    """The same while a dead writer's change is completed, which happens on opening."""
    found, counted = [], itertools.count()

    def look(operation: str, half: Callable[[], object]) -> None:
        # With the lock not held yet, the reader itself would complete it.
        if operation == f"open {path / 'lock'}" or next(counted) % step:
            return
        try:
            found.append((operation, description(Registry(path))))
        except FedcompoError as error:
            found.append((operation, repr(error)))

    with watched(look):
        Registry(path)
    (path.parent / "found.json").write_text(json.dumps(found))


@pytest.mark.parametrize("done", ["pending/commit", "pending/state.json"])
@pytest.mark.parametrize("scene", ["replace", "remove"], indirect=True)
def test_a_reader_sees_a_whole_state_while_a_dead_writers_change_is_completed(scene, done, step):
    known = [description(Registry(scene.folder / name)) for name in ("old", "new")]
    path = scene.copy("left")
    assert process(quickly, scene.change, path, DeathAfter(done)) == -signal.SIGKILL
    assert process(recovering, path, step) == 0
    found = json.loads((scene.folder / "found.json").read_text())
    assert len(found) > 10 / step
    assert [(operation, seen) for operation, seen in found if seen not in known] == []
    assert scene.outcome(path) == "new"
