"""Every refusal at every door: a run, `add`, `publish`, and `compose` of folders."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import random_head
from registry_builders import (
    OF_MIXTURES,
    backbone,
    contents,
    member,
    one_of_each_kind,
    registry_of,
)
from service_runs import client_of, saved, served

from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Kind, Statistics
from fedcompo.config.run import RunConfig
from fedcompo.errors import ContributionError, FedcompoError
from fedcompo.export import selection
from fedcompo.messages.answers import DescribeAnswer, TrainAnswer
from fedcompo.method.contribution import Contribution
from fedcompo.method.heads import head_tensors
from fedcompo.method.lineage import Lineage
from fedcompo.registry import admission
from fedcompo.registry.admission import check_described, outliers
from fedcompo.registry.company import LIMITS, Company
from fedcompo.registry.registry import Registry
from server.phases.fitting import Fitting
from server.phases.participants import Participants
from server.phases.roster import Roster

NAME = "blocks.0.mlp.fc1.weight"
RATIO = 2.0
MEMBERS = [
    member("ada", seed=1),
    member("ben", seed=2, classes=("dog", "owl")),
    member("cho", seed=3, classes=("yak",)),
]


def dee(**parts: Any) -> Contribution:
    return replace(member("dee", seed=8), **parts)


def of_classes(*classes: str) -> Contribution:
    return member("dee", seed=8, classes=classes)


def changed(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Contribution:
    vector = dee().task_vector
    return dee(
        task_vector=replace(
            vector, tensors={n: change(n, t.clone()) for n, t in vector.tensors.items()}
        )
    )


def longer(factor: float, part: str = "/B") -> Contribution:
    return changed(lambda name, t: t * factor if name.endswith(part) else t)


def of_rank(rank: int) -> Contribution:
    def grown(name: str, t: torch.Tensor) -> torch.Tensor:
        if not name.startswith(NAME):
            return t
        shape = (rank, t.shape[1]) if name.endswith("/A") else (t.shape[0], rank)
        return torch.full(shape, 1e-3)

    return changed(grown)


def copied() -> Contribution:
    """Ada's task vector under another name, beside other statistics."""
    return dee(task_vector=replace(dee().task_vector, tensors=MEMBERS[0].task_vector.tensors))


def counted(count: int) -> Contribution:
    statistics = dee().statistics
    counts = statistics.counts.clone()
    counts[0] = count
    statistics = replace(statistics, counts=counts)
    return dee(statistics=statistics, num_examples=statistics.num_examples)


def of_no_images() -> Contribution:
    statistics = dee().statistics
    return dee(statistics=replace(statistics, second=-statistics.second))


@dataclass(frozen=True)
class Refusal:
    make: Callable[[], Contribution]
    reason: str
    limits: dict[str, int] = field(default_factory=dict)
    not_at: tuple[str, ...] = ()


MADE = ("run",)
"""The server of a run makes that part itself."""


REFUSALS = {
    "a look-alike of a member": Refusal(lambda: replace(dee(), client="Ada"), "mistaken"),
    "a class in loose accents": Refusal(lambda: of_classes("cafe\u0301"), "composed form"),
    "a class written backwards": Refusal(lambda: of_classes("\u202ecat"), "steers"),
    "a class that moves the cursor": Refusal(lambda: of_classes("\x1b[2Jcat"), "steers"),
    "a class of no character": Refusal(lambda: of_classes(""), "1 to 128"),
    "a class of 129 characters": Refusal(lambda: of_classes("x" * 129), "1 to 128"),
    "too many classes": Refusal(
        lambda: of_classes("ape", "bat", "cat"), "names 3 classes", {"classes": 2}
    ),
    "too long names of classes": Refusal(
        lambda: of_classes("ape", "bat", "cat"), "have 9 bytes", {"class_names": 8}
    ),
    "too many classes in all": Refusal(
        lambda: of_classes("ape", "bat"), "6 classes in all", {"all_classes": 5}
    ),
    "too many images of a class": Refusal(lambda: counted(2**31 + 1), "at most 2147483648"),
    "too many images in all": Refusal(
        lambda: member("dee", num_examples=25), "25 examples in all", {"examples": 24}, MADE
    ),
    "statistics of no images": Refusal(of_no_images, "are of no images"),
    "mixtures among sums": Refusal(
        lambda: member("dee", statistics=Statistics.MIXTURES), "by mixtures, the others by sums"
    ),
    "a head too narrow": Refusal(lambda: dee(head=random_head(("cat", "dog"), 3, seed=0)), "head"),
    "rank 0": Refusal(lambda: of_rank(0), "rank 0, expected 1 to 8"),
    "a rank beyond the weight's": Refusal(lambda: of_rank(9), "rank 9, expected 1 to 8"),
    "NaN": Refusal(lambda: longer(math.nan), "not finite"),
    "beyond float32": Refusal(lambda: changed(lambda name, t: t.double() + 1e300), "not finite"),
    "ten times the weight": Refusal(lambda: longer(100.0), "10 times that of the weight"),
    "no change": Refusal(lambda: longer(0.0), "changes nothing", not_at=("run",)),
    "a copy": Refusal(copied, "the task vector of 'ada'"),
    "beyond the median": Refusal(lambda: longer(3.0), "`max-norm-ratio` = 2 times the median"),
    "other examples in all": Refusal(
        lambda: dee(num_examples=21), "21 examples in all, and 20 by class", not_at=MADE
    ),
    "a lineage of no names": Refusal(
        lambda: dee(lineage=Lineage(ensemble=("\x1b[2J",))),
        "cannot be a client's name",
        not_at=MADE,
    ),
    "a long lineage": Refusal(
        lambda: dee(lineage=Lineage(anchored_by=("x", "y"))), "up to 2 names", {"lineage": 1}, MADE
    ),
    "a lineage of another method": Refusal(
        lambda: dee(lineage=Lineage(method="\n")), "method", not_at=MADE
    ),
    "nested settings": Refusal(lambda: dee(settings={"a": {}}), "no table", not_at=MADE),
    "huge settings": Refusal(
        lambda: dee(settings={"a": "x" * 70_000}), "may have 65536", not_at=MADE
    ),
    "a negative Fisher": Refusal(
        lambda: _with_fisher(-1.0), "out of range", not_at=("run", "compose")
    ),
}


def _with_fisher(factor: float) -> Contribution:
    made = member("dee", seed=8, with_fisher=True)
    sums = {name: factor * total for name, total in made.fisher.sums.items()}
    return replace(made, fisher=replace(made.fisher, sums=sums))


@dataclass
class House:
    registry: Registry
    address: str
    mail: list[Path]


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    how = CompositionSettings(max_norm_ratio=RATIO)
    registry = registry_of(folder / "registry", *MEMBERS, settings=how)
    mail = [saved(one, folder / "mail" / one.client) for one in MEMBERS]
    with served(registry) as address:
        yield House(registry, address, mail)


def run(made: Contribution, house: House, folder: Path) -> None:
    """What the server of a run does with what a client describes and trains."""
    client, classes, base = made.client, made.head.classes, made.task_vector.base
    exchange = SimpleNamespace(clients=(client,))
    roster = Roster(exchange, backbone(), lambda: Company.of(house.registry, backbone()))
    check_described(client, classes, made.statistics, roster.company())
    about = {"client": client, "base": base, "classes": classes}
    described = DescribeAnswer(**about, num_test_examples=1, statistics=made.statistics)
    roster.participants = Participants(
        described={client: described}, kinds={client: made.task_vector.kind}
    )
    fitting = Fitting(roster, RunConfig.parse({}), house.registry, folder)
    fitting.lineage = lambda client: Lineage()
    tensors = {f"task_vector/{n}": t for n, t in made.task_vector.tensors.items()}
    tensors |= head_tensors(made.head)
    answer = TrainAnswer(**about, tensors=tensors, kind=made.task_vector.kind, losses=(1.0,))
    fitting.check_trained(client, answer)
    for reason in outliers([client], fitting.company()).values():
        raise ContributionError(reason)


def add(made: Contribution, house: House, folder: Path) -> None:
    Registry(house.registry.path).add(saved(made, folder / "inbox"))


def publish(made: Contribution, house: House, folder: Path) -> None:
    client = client_of(house.address, made.client, attempts=1)
    client.publish(saved(made, folder / "inbox"))


def compose(made: Contribution, house: House, folder: Path) -> None:
    inbox = saved(made, folder / "inbox")
    with selection.from_folders([*house.mail, inbox], max_norm_ratio=RATIO):
        pass


DOORS = {"run": run, "add": add, "publish": publish, "compose": compose}


@pytest.mark.parametrize(
    ("what", "door"),
    [(what, door) for what, own in REFUSALS.items() for door in DOORS if door not in own.not_at],
)
def test_each_door_refuses_alike_and_changes_nothing(what, door, house, tmp_path, monkeypatch):
    refusal = REFUSALS[what]
    monkeypatch.setattr(admission, "LIMITS", replace(LIMITS, **refusal.limits))
    monkeypatch.setattr(selection, "load_backbone", lambda config: backbone())
    before = contents(house.registry.path)
    with pytest.raises(FedcompoError) as caught:
        DOORS[door](refusal.make(), house, tmp_path)
    assert refusal.reason in str(caught.value)
    assert "dee" in str(caught.value) or "Ada" in str(caught.value) or door == "publish"
    assert contents(house.registry.path) == before


def test_the_same_contribution_without_the_fault_passes_each_door(house, tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "load_backbone", lambda config: backbone())
    run(dee(), house, tmp_path / "run")
    compose(dee(), house, tmp_path / "compose")
    publish(dee(), house, tmp_path / "publish")
    house.registry.refresh()
    house.registry.remove("dee")
    add(dee(), house, tmp_path / "add")
    house.registry.refresh()
    house.registry.remove("dee")


def test_mixtures_have_limits_of_their_own(tmp_path, monkeypatch):
    """The time and memory of their head grow with the square of the number of classes."""
    registry = registry_of(
        tmp_path / "r", *one_of_each_kind(Statistics.MIXTURES), settings=OF_MIXTURES
    )
    made = member("dee", Kind.FULL, classes=("emu",), statistics=Statistics.MIXTURES)
    before = contents(registry.path)
    for limits, reason in (
        ({"drawn_classes": 4}, "5 classes in all.*with `statistics = sums`"),
        ({"components": 1}, "has 2 components"),
    ):
        monkeypatch.setattr(admission, "LIMITS", replace(LIMITS, **limits))
        with pytest.raises(ContributionError, match=reason):
            registry.add(made)
    words = {"emu": replace(made.statistics["emu"], num_examples="many")}
    with pytest.raises(ContributionError, match="expected at least 1 example"):
        registry.add(replace(made, statistics=words))
    assert contents(registry.path) == before


@pytest.mark.parametrize("count", [1, 2])
def test_among_fewer_than_three_nobody_stands_out(count, tmp_path):
    how = CompositionSettings(max_norm_ratio=1.001)
    registry = registry_of(tmp_path / "r", *[MEMBERS[0]][: count - 1], settings=how)
    registry.add(longer(3.0))
    assert "dee" in registry.clients


def test_names_of_classes_that_are_there_already_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(admission, "check_class_names", lambda names, owner: None)
    registry = registry_of(tmp_path / "r", member("ada", classes=("cafe\u0301",)))
    monkeypatch.undo()
    registry.add(member("ada", seed=5, classes=("cafe\u0301",)), replacing=True)
    assert registry.classes == ("cafe\u0301",)
