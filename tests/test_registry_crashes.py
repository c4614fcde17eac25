"""A change happens or it does not: killed at any point, without disk, without power, while read."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from failing_disk import Death, Listener, watched
from registry_builders import contents, member, mixtures, one_of_each_kind, registry_of

from fedcompo import heads, journal
from fedcompo.config import Kind
from fedcompo.registry import Registry
from fedcompo.registry_state import RegistrySettings

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "hypothesis", "fedcompo.data", "fedcompo.registry"])
SMALL = RegistrySettings(align_samples=1)
NEVER = 10**9
PATIENCE = 300.0
"""Seconds after which a process counts as stuck."""


def add(registry: Registry) -> None:
    registry.add(registry.path.parent / "newcomer")


def replace(registry: Registry) -> None:
    registry.add(
        registry.path.parent / "replacement", registry.path.parent / "newcomer", replacing=True
    )


def remove(registry: Registry) -> None:
    registry.remove("ben", requested_by="ben", reason="moved away")


def realign(registry: Registry) -> None:
    registry.realign({c: mixtures(m.classes, seed=9) for c, m in registry.state.members.items()})


def empty(registry: Registry) -> None:
    """Remove the last client."""
    registry.remove("ada", requested_by="ada")


CHANGES = {change.__name__: change for change in (add, replace, remove, realign, empty)}


def quickly(change: Callable[[Registry], None], path: Path, listener: Listener) -> None:
    """Change a registry under observation, always in the same bits and at the same time."""
    heads.ITERATIONS = 2  # how good the joint head is does not matter here
    journal.utc_now = lambda: "2030-01-01T00:00:00Z"
    registry = Registry(path)
    with watched(listener):
        change(registry)


def deaths(change: Callable[[Registry], None], folder: Path) -> None:
    """Die at the first operation, at the second, and so on until one lives: a fork for each."""
    codes: list[int] = []
    gc.disable()
    gc.freeze()
    while not codes or codes[-1] != 0:
        path = folder / str(len(codes) + 1)
        shutil.copytree(folder / "old", path, symlinks=True)
        if (child := os.fork()) == 0:
            quickly(change, path, Death(len(codes) + 1))
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
        registry = registry_of(folder / "old", *members, settings=SMALL)
        if change == "remove":  # a joint head of more than its clients' statistics
            registry.realign({m.client: m.features for m in members})
        for name, client in (("newcomer", "dee"), ("replacement", "ben")):
            member(client, Kind.FULL, seed=5, with_fisher=True).save(folder / name)
        assert process(quickly, self.change, self.copy("new"), Death(NEVER)) == 0
        self.old, self.new = contents(folder / "old"), contents(folder / "new")
        self.roots = Registry(folder / "old").state.root, Registry(folder / "new").state.root
        assert self.roots[0] != self.roots[1]

    def copy(self, name: str) -> Path:
        shutil.copytree(self.folder / "old", self.folder / name, symlinks=True)
        return self.folder / name

    def outcome(self, path: Path) -> str:
        """Open what was left behind: every file must be that of before, or that of after."""
        registry = Registry(path)
        found = contents(path)
        assert found in (self.old, self.new), sorted(
            name for name in found.keys() | self.old | self.new
            if found.get(name) not in (self.old.get(name), self.new.get(name))
        )  # fmt: skip
        assert registry.state.root == self.roots[found == self.new]
        registry.entries()
        return "new" if found == self.new else "old"


@pytest.fixture(params=CHANGES)
def scene(request, tmp_path):
    return Scene(tmp_path, request.param)


# -- killed ---------------------------------------------------------------------------------------


def test_killed_at_any_operation_leaves_the_old_state_or_the_new(scene, record_property):
    assert process(deaths, scene.change, scene.folder) == 0
    *codes, last = json.loads((scene.folder / "codes.json").read_text())
    assert set(codes) == {-signal.SIGKILL} and last == 0
    outcomes = [scene.outcome(scene.folder / str(point)) for point in range(1, len(codes) + 2)]
    print("POINTS", len(codes), outcomes.count("old"))
    assert len(codes) > 40
    assert outcomes == sorted(
        outcomes, key=["old", "new"].index
    )  # once it has happened, it has happened
    assert outcomes[0] == "old" and outcomes[-1] == "new"
