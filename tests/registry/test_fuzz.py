"""Hostile contributions at the door: refused by name, or harmless; nothing else happens."""

from __future__ import annotations

import resource
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hostile import Mutants
from registry_builders import contents, member, three_clients

from fedcompo.config.choices import Kind
from fedcompo.errors import FedcompoError
from fedcompo.registry.draft import drafted
from fedcompo.registry.registry import Registry

FEW, MANY = 300, 100_000
SECONDS, BYTES = 5.0, 64 << 20
"""What a single refusal may take, on a busy machine, and add to the peak of memory."""


class Enough(Exception):
    """The door is passed; go no further."""


def at_the_door(registry: Registry, folder: Path) -> None:
    """All that ``Registry.add`` does before it composes."""
    with drafted(registry, "fuzz", lambda step: None) as draft:
        draft.stage(folder, {*registry.state.members})
        raise Enough


def mutants_of(folder: Path, kind: Kind) -> Mutants:
    return Mutants(
        member("mallory", kind, seed=9, classes=("cat", "emu"), with_fisher=True), folder
    )


def harmless(place: Path, folder: Path) -> str:
    """Add what passed the door, and take it out again; nobody else may feel it."""
    registry = three_clients(place)
    before, total = registry.running_sum(), registry.total_statistics()
    sums, root, members = dict(before), registry.state.root, registry.clients
    try:
        registry.add(folder)
    except FedcompoError as error:
        assert registry.state.root == root
        return f"composing: {type(error).__name__}"
    (added,) = set(registry.clients) - {*members}
    weights, head = registry.composed(), registry.joint_head()
    assert all(bool(weights[name].isfinite().all()) for name in weights)
    assert head.is_finite
    registry.remove(added)
    assert registry.state.root == root
    assert all(torch.equal(value, sums[name]) for name, value in registry.running_sum().items())
    left = registry.total_statistics()
    assert torch.equal(left.sums, total.sums)
    assert torch.equal(left.second, total.second)
    return "added"


def fuzz(tmp_path: Path, seeds: range) -> Counter[str]:
    """Let every mutant knock; returns how often each answer came."""
    registry = three_clients(tmp_path / "registry")
    before, answers = contents(registry.path), Counter[str]()
    kinds = [mutants_of(tmp_path / kind, kind) for kind in (Kind.LORA, Kind.FULL, Kind.IA3)]
    slowest, grown = (0.0, ""), (0, "")
    for seed in seeds:
        mutants = kinds[seed % len(kinds)]
        what = f"seed {seed}, {mutants.write(seed)}"
        peak, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        try:
            at_the_door(registry, mutants.folder)
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
        if answer == "passed" and seed % 5 == 0:
            try:
                answers[harmless(tmp_path / "other", mutants.folder)] += 1
            except BaseException as error:
                raise AssertionError(f"{type(error).__name__} {what}") from error
            shutil.rmtree(tmp_path / "other")
        if seed % 100 == 0:
            assert contents(registry.path) == before, what
    assert contents(registry.path) == before
    assert slowest[0] < SECONDS, slowest
    assert grown[0] < BYTES or len(seeds) < 1000, grown
    print(answers, slowest, grown)  # noqa: T201
    return answers


def test_mutants_are_refused_or_harmless(tmp_path):
    answers = fuzz(tmp_path, range(FEW))
    assert answers["passed"] < FEW / 3
    assert answers["FileFormatError"] and answers["ContributionError"] and answers["added"]


@pytest.mark.slow
def test_a_hundred_thousand_mutants_are_refused_or_harmless(tmp_path):
    fuzz(tmp_path, range(MANY))
