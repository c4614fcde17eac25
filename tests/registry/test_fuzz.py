"""Hostile contributions at the door: refused by name, or harmless; nothing else happens."""

from __future__ import annotations

import resource
import shutil
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hostile import Mutants
from registry_builders import (
    OF_MIXTURES,
    backbone,
    contents,
    member,
    one_of_each_kind,
    registry_of,
    three_clients,
)

from fedcompo.config.choices import FisherForm, Kind, Statistics
from fedcompo.errors import FedcompoError
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.method.kronecker import LEFT, RIGHT
from fedcompo.registry.company import Company
from fedcompo.registry.draft import drafted
from fedcompo.registry.registry import Registry

FEW, MANY = 300, 100_000
SECONDS, BYTES = 5.0, 64 << 20
"""What a single refusal may take, on a busy machine, and add to the peak of memory."""


class Enough(Exception):
    """The door is passed; go no further."""


def at_the_door(registry: Registry, folder: Path) -> None:
    """All that ``Registry.add`` does before it composes."""
    with drafted(registry, "fuzz") as draft:
        draft.stage(folder, Company.of(registry))
        raise Enough


@dataclass
class Door:
    """A registry and mutants of a newcomer's contribution."""

    folder: Path
    kind: Kind
    form: FisherForm
    statistics: Statistics = Statistics.SUMS

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.registry = self.new(self.folder / "registry")
        made = member(
            "mallory",
            self.kind,
            seed=9,
            classes=("cat", "emu"),
            with_fisher=True,
            statistics=self.statistics,
        )
        if self.form is FisherForm.FACTORED:
            made = replace(made, fisher=made.fisher.reduced())
        elif self.form is FisherForm.KRONECKER:
            whole = {
                f"{name}{end}": torch.eye(weight.shape[axis])
                for name, weight in backbone().theta_0.items()
                for axis, end in enumerate((LEFT, RIGHT))
            }
            made = replace(made, fisher=FisherDiagonal(whole, 20).thinned())
        self.mutants = Mutants(made, self.folder / "mallory")

    def new(self, path: Path) -> Registry:
        if self.statistics is Statistics.SUMS:
            return three_clients(path)
        return registry_of(path, *one_of_each_kind(self.statistics), settings=OF_MIXTURES)


def harmless(door: Door) -> str:
    """Add what passed the door, and take it out again; nobody else may feel it."""
    registry = door.new(door.folder / "other")
    sums, root = dict(registry.running_sum()), registry.state.root
    members, before = registry.clients, contents(registry.path / registry.state.version)
    try:
        registry.add(door.mutants.folder)
    except FedcompoError as error:
        assert registry.state.root == root
        shutil.rmtree(registry.path)
        return f"composing: {type(error).__name__}"
    (added,) = set(registry.clients) - {*members}
    weights = registry.composed()
    assert all(bool(weights[name].isfinite().all()) for name in weights)
    registry.remove(added)
    assert registry.state.root == root
    assert all(torch.equal(value, sums[name]) for name, value in registry.running_sum().items())
    assert contents(registry.path / registry.state.version) == before
    shutil.rmtree(registry.path)
    return "added"


def fuzz(tmp_path: Path, seeds: range) -> Counter[str]:
    """Let every mutant knock; returns how often each answer came."""
    doors = [
        Door(tmp_path / "a", Kind.LORA, FisherForm.DENSE),
        Door(tmp_path / "b", Kind.FULL, FisherForm.FACTORED),
        Door(tmp_path / "c", Kind.IA3, FisherForm.KRONECKER),
        Door(tmp_path / "d", Kind.LORA, FisherForm.FACTORED, Statistics.MIXTURES),
    ]
    before = [contents(door.registry.path) for door in doors]
    answers, slowest, grown = Counter[str](), (0.0, ""), (0, "")
    for seed in seeds:
        door = doors[seed % len(doors)]
        what = f"seed {seed}, {door.mutants.write(seed)}"
        peak, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        try:
            at_the_door(door.registry, door.mutants.folder)
        except FedcompoError as error:
            answer = type(error).__name__
        except Enough:
            answer = "passed"
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__} {what}") from error
        seconds = time.perf_counter() - started
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
        slowest, grown = max(slowest, (seconds, what)), max(grown, (more, what))
        answers[answer] += 1
        if answer == "passed" and seed % 9 == 0:
            try:
                answers[harmless(door)] += 1
            except BaseException as error:
                raise AssertionError(f"{type(error).__name__} {what}") from error
        if seed % 100 == 0:
            assert [contents(door.registry.path) for door in doors] == before, what
    assert [contents(door.registry.path) for door in doors] == before
    assert slowest[0] < SECONDS, slowest
    assert grown[0] < BYTES, grown
    print(answers, slowest, grown)  # noqa: T201
    return answers


def test_mutants_are_refused_or_harmless(tmp_path):
    answers = fuzz(tmp_path, range(FEW))
    assert answers["passed"] < FEW / 3
    assert answers["FileFormatError"] and answers["ContributionError"] and answers["added"]


@pytest.mark.slow
def test_a_hundred_thousand_mutants_are_refused_or_harmless(tmp_path):
    fuzz(tmp_path, range(MANY))
