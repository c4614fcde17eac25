"""Runs in rounds of four small clients, in this process: who is heard, and who is there when."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from app_runs import run
from builders import in_memory, running_sum_of
from flwr.app import Message
from in_process_grid import Tamper
from PIL import Image
from torch import Tensor

from fedcompo.errors import FedcompoError
from fedcompo.messages.records import from_record
from fedcompo.method.contribution import Contribution
from fedcompo.registry.registry import Registry
from fedcompo.storage.tensorfile import section

OWNED = {
    "ann": {"cat": 6, "dog": 4},
    "ben": {"dog": 3, "eel": 5},
    "eve": {"fox": 7, "owl": 6},
    "zoe": {"cat": 5, "yak": 4},
}
"""Training images by client and class: unequal numbers, and classes that two clients share."""
EXAMPLES = {client: sum(classes.values()) for client, classes in OWNED.items()}
PARTITIONS = {client: i for i, client in enumerate(OWNED)}
SMALL = {
    "method": "iel",
    "num_server_rounds": 2,
    "batch_size": 8,
    "beta": 0.3,
    "head_start": "zero",
    "scale": 1.0,
    "realign": False,
    "wire": "float32",  # what arrives is, bit for bit, what was trained
    "timeout": 0.3,  # an answer is there as soon as its request was sent, or never
}


def draw_images(
    folder: Path, owned: Mapping[str, Mapping[str, int]] = OWNED, test: int = 3
) -> Path:
    """Pictures of noise, by client and class; so many of each class are for testing."""
    generator = torch.Generator().manual_seed(0)
    for client, classes in owned.items():
        for name, count in classes.items():
            for part, number in (("train", count), ("test", test)):
                place = folder / client / part / name
                place.mkdir(parents=True)
                for i in range(number):
                    pixels = torch.randint(0, 255, (28, 28), generator=generator)
                    Image.fromarray(pixels.to(torch.uint8).numpy()).save(place / f"{i}.png")
    return folder


def federate(
    images: Path, output: Path, grid: dict | None = None, *, clients: int = 3, **settings: object
) -> dict:
    """Run in rounds; returns the results.

    Args:
        images: What :func:`draw_images` drew.
        output: Folder of the results.
        grid: Options of the grid.
        clients: How many of the clients there are, in the order of their names.
        settings: That differ from :data:`SMALL`.
    """
    given = {**SMALL, "data": f"folder:{images}", "num_clients": clients, **settings}
    return run({**(grid or {}), "clients": clients}, output, **given)


def notes_of(results: Mapping[str, list[str]]) -> list[str]:
    """Notes but those on how well clients trained, on noise, and on their numbers of images."""
    of_noise = ("The own task vector of", "The task vector of", "The anchor undid")
    return [
        note
        for note in results["notes"]
        if not note.startswith(of_noise)
        and not any(words in note for words in ("learnt nothing", "weigh by"))
    ]


class Wire:
    """Hears what clients answer when they are asked to train, and may change it on its way.

    Args:
        changes: By client and number of its answer, from 1.
    """

    def __init__(self, changes: Mapping[tuple[str, int], Tamper] | None = None) -> None:
        self.changes, self.count = dict(changes or {}), Counter()
        self.heard: dict[str, list[dict[str, Tensor]]] = {client: [] for client in OWNED}
        """Task vectors that arrived and could be read, in order, by client."""
        self.tamper = {
            (i, "train"): functools.partial(self._pass_on, client)
            for client, i in PARTITIONS.items()
        }

    def _pass_on(self, client: str, reply: Message) -> Message | None:
        self.count[client] += 1
        change = self.changes.get((client, self.count[client]))
        passed = reply if change is None else change(reply)
        if passed is not None and passed.has_content():
            try:
                tensors, _ = from_record(passed.content, expected="train", source=client)
            except FedcompoError:
                return passed
            self.heard[client].append(section("task_vector", tensors))
        return passed


class Looks:
    """Who is connected when, by the number of the look; there is one before each round.

    Args:
        looks: By client the looks, from 1, at which its node is there; who is not named always is.
        nodes: By client the looks from which its node has another id.
    """

    def __init__(
        self,
        looks: Mapping[str, Collection[int]] | None = None,
        nodes: Mapping[str, Collection[int]] | None = None,
    ) -> None:
        self.number: Counter[int] = Counter()
        self._looks = {PARTITIONS[c]: set(at) for c, at in (looks or {}).items()}
        self._nodes = {PARTITIONS[c]: set(at) for c, at in (nodes or {}).items()}

    @property
    def options(self) -> dict[str, Callable[[int], object]]:
        """Of the grid."""
        return {"present": self.present, "node_of": self.node_of}

    def present(self, partition: int) -> bool:
        """Look."""
        self.number[partition] += 1
        return self.number[partition] in self._looks.get(partition, {self.number[partition]})

    def node_of(self, partition: int) -> int:
        """Its id at present."""
        restarts = {at for at in self._nodes.get(partition, ()) if at <= self.number[partition]}
        return 1000 + partition + 100 * len(restarts)


def sent_last(output: Path) -> dict[str, Contribution]:
    """Contributions in the registry of a run."""
    folders = (output / "registry" / "clients").iterdir()
    return {c.client: c for c in map(in_memory, sorted(folders))}


def assert_sum_of_the_last(output: Path, wire: Wire | None = None) -> None:
    """The registry's sum is, bit for bit, that of what its clients sent last."""
    registry, members = Registry(output / "registry"), sent_last(output)
    theta_0 = registry.backbone.load().theta_0
    vectors = {client: member.task_vector for client, member in members.items()}
    times = {c: registry.settings.times(member.num_examples) for c, member in members.items()}
    assert same(registry.running_sum(), running_sum_of(theta_0, vectors, times).total)
    for client in members if wire else ():
        assert same(members[client].task_vector.tensors, wire.heard[client][-1])


def same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether tensors are the same, bit for bit, under the same names."""
    return set(actual) == set(expected) and all(
        torch.equal(actual[name], expected[name]) for name in expected
    )


def same_contributions(one: Path, other: Path) -> bool:
    """Whether two runs left the same task vectors and heads, bit for bit."""
    left, right = sent_last(one), sent_last(other)
    return left.keys() == right.keys() and all(
        same(left[c].task_vector.tensors, right[c].task_vector.tensors)
        and torch.equal(left[c].head.weight, right[c].head.weight)
        for c in left
    )
