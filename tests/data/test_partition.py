"""Clients that share classes: each image has one client, and the same one in every process."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.data import DataConfig
from fedcompo.config.run import RunConfig
from fedcompo.data import partition
from fedcompo.data.catalogue import Catalogue
from fedcompo.data.client_data import client_names, load_client_data
from fedcompo.data.draws import split_class
from fedcompo.data.partition import in_proportion, member_names, part_for, values_of
from fedcompo.data.sources import kinds
from fedcompo.data.sources.folders import folder_catalogue
from fedcompo.data.tasks import arrivals_of, client_of, member_name, members_of, task_of
from fedcompo.errors import ConfigError, DataError

GREY_8 = Preprocessing(image_size=8, channels=1, mean=(0.5,), std=(0.5,))


def catalogue_of(counts: dict[str, tuple[int, int]], *, marked: bool = True) -> Catalogue:
    """Numbers in place of pictures: so many to train and to test on, by class."""
    classes = [c for c, own in counts.items() for _ in range(sum(own))]
    is_test = [test for own in counts.values() for test in [False] * own[0] + [True] * own[1]]
    return Catalogue(
        source="numbers",
        classes=np.array(classes),
        is_test=np.array(is_test) if marked else None,
        open=lambda index: str(index).encode(),
        columns={"ward": np.array([f"ward {i % 3}" for i in range(len(classes))])},
    )


def dealt(catalogue: Catalogue, config: DataConfig, *, seed: int = 0) -> dict[str, Catalogue]:
    """The parts of all members, dealt anew."""
    partition._KEPT.clear()
    names = member_names(config) if config.rule != "column" else values_of(catalogue, config)
    return {name: part_for(name, catalogue, config, seed=seed) for name in names}


def numbers(part: Catalogue) -> list[int]:
    return [int(part.open(index)) for index in range(len(part.classes))]


SHARED = st.sampled_from(
    [
        {"partition": "iid", "num_tasks": 4},
        {"partition": "dirichlet:0.4", "num_tasks": 3},
        {"partition": "dirichlet:5", "num_tasks": 2, "clients_per_task": 2},
        {"partition": "iid", "num_tasks": 3, "clients_per_task": 1},
        {"partition": "column:ward"},
    ]
)
COUNTS = st.lists(st.tuples(st.integers(20, 40), st.integers(9, 15)), min_size=3, max_size=6)


@given(SHARED, COUNTS, st.integers(0, 99), st.booleans())
@settings(max_examples=15, deadline=None)
def test_each_image_has_exactly_one_client_and_its_own_class(shared, counts, seed, marked):
    catalogue = catalogue_of({f"c{i}": own for i, own in enumerate(counts)}, marked=marked)
    config = DataConfig(**shared)
    parts = dealt(catalogue, config, seed=seed)
    together = [number for part in parts.values() for number in numbers(part)]
    assert sorted(together) == list(range(len(catalogue.classes)))
    for part in parts.values():
        assert [catalogue.classes[number] for number in numbers(part)] == part.classes.tolist()
        if marked:
            assert catalogue.is_test[numbers(part)].tolist() == part.is_test.tolist()
        for name in part.names:
            assert len(split_class(part, name, client="x", seed=seed)[0])
    again = dealt(catalogue, config, seed=seed)
    assert all(numbers(again[name]) == numbers(part) for name, part in parts.items())


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(any), st.integers(0, 60))
def test_in_proportion_no_part_is_off_by_a_whole_image(counts, size):
    parts = in_proportion(np.arange(size), counts)
    assert np.concatenate(parts).tolist() == list(range(size))
    for part, count in zip(parts, counts, strict=True):
        assert abs(len(part) - size * count / sum(counts)) <= 1
        assert count or not len(part)


def test_another_seed_deals_otherwise():
    catalogue, config = catalogue_of({"a": (60, 20), "b": (60, 20)}), DataConfig(partition="iid")
    one, other = dealt(catalogue, config, seed=0), dealt(catalogue, config, seed=1)
    assert numbers(one["client-0"]) != numbers(other["client-0"])


def test_the_smaller_alpha_the_less_evenly_classes_are_shared():
    catalogue = catalogue_of({f"c{i}": (200, 20) for i in range(10)})

    def largest_share(alpha: float) -> float:
        parts = dealt(catalogue, DataConfig(partition=f"dirichlet:{alpha}")).values()
        trained = [p.classes[~p.is_test] for p in parts]
        return np.mean([max((own == f"c{i}").sum() for own in trained) / 200 for i in range(10)])

    assert largest_share(0.1) > 0.7
    assert largest_share(100) < 0.3


def test_tasks_divide_the_classes_and_a_limit_on_images_holds_for_all_clients_together():
    catalogue = catalogue_of({f"c{i}": (30, 10) for i in range(6)})
    config = DataConfig(
        partition="iid", num_tasks=2, clients_per_task=2, num_classes=4, images_per_class=12
    )
    parts = dealt(catalogue, config)
    assert list(parts) == [f"client-{c}.task-{t}" for t in (0, 1) for c in (0, 1)]
    classes = [
        {*parts[f"client-0.task-{t}"].names, *parts[f"client-1.task-{t}"].names} for t in (0, 1)
    ]
    assert [len(own) for own in classes] == [2, 2]
    assert not classes[0] & classes[1]
    for own in set().union(*classes):
        trained = [((part.classes == own) & ~part.is_test).sum() for part in parts.values()]
        assert sum(trained) == 12


def test_digits_are_shared_as_images_of_their_clients():
    config = DataConfig(partition="dirichlet:0.5")
    clients = [load_client_data(config, GREY_8, partition=i, seed=0) for i in range(5)]
    assert [client.name for client in clients] == list(client_names(config))
    assert sum(len(c.train.labels) + len(c.test.labels) for c in clients) == 1797
    assert len({name for c in clients for name in c.classes}) == 10
    for client in clients:
        assert set(client.train.labels.tolist()) == set(range(len(client.classes)))


def test_a_column_names_the_clients(monkeypatch):
    catalogue = catalogue_of({"a": (30, 9), "b": (30, 9)})
    monkeypatch.setitem(kinds.NAMED, "digits", lambda: catalogue)
    assert client_names(DataConfig(partition="column:ward")) == ("ward 0", "ward 1", "ward 2")
    with pytest.raises(DataError, match=r"column 'room'.*its columns: ward"):
        client_names(DataConfig(partition="column:room"))
    unnamed = {"ward": np.where(np.arange(78) % 3 == 0, "", catalogue.columns["ward"])}
    with pytest.raises(DataError, match="without a value in the column"):
        values_of(
            dataclasses.replace(catalogue, columns=unnamed), DataConfig(partition="column:ward")
        )


def test_spellings_of_a_column_s_value_are_one_client():
    catalogue = catalogue_of({"a": (6, 0)})
    spelt = np.array(["e\u0301", "\u00e9", " \u00e9 ", "b", "b ", "b"])
    catalogue = dataclasses.replace(catalogue, columns={"ward": spelt})
    config = DataConfig(partition="column:ward")
    assert values_of(catalogue, config) == ("b", "\u00e9")
    assert len(part_for("\u00e9", catalogue, config, seed=0).classes) == 3


# -- what cannot be dealt ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["classes:2", "dirichlet", "dirichlet:0", "dirichlet:nan", "iid:", "column:", "x"]
)
def test_an_unknown_partition_is_refused_with_the_known_ones(value):
    with pytest.raises(ConfigError, match="classes, iid, dirichlet:<alpha>"):
        RunConfig.parse({"partition": value})


@pytest.mark.parametrize("rule", ["classes", "column:ward"])
def test_tasks_need_a_rule_by_which_clients_share_them(rule):
    with pytest.raises(ConfigError, match="`clients-per-task` is 2, but `partition`"):
        RunConfig.parse({"clients-per-task": 2, "partition": rule})


def test_folders_have_their_clients_already(tmp_path):
    (tmp_path / "ann" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="says itself who its clients are"):
        client_names(DataConfig(data=f"folder:{tmp_path}", partition="iid"))


def test_too_few_images_for_the_clients_are_refused_with_what_to_do():
    one, few = catalogue_of({"a": (24, 8)}), catalogue_of({"a": (12, 4), "b": (12, 4)})
    with pytest.raises(DataError, match=r"one of 2 clients with fewer than 10.*set a larger alpha"):
        dealt(one, DataConfig(partition="dirichlet:0.01", num_tasks=2))
    with pytest.raises(DataError, match=r"0 test images .* Set fewer clients.*a larger alpha"):
        dealt(few, DataConfig(partition="iid", num_tasks=12))


def test_without_flwr_datasets_the_way_to_install_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    with pytest.raises(DataError, match=r"fedcompo\[datasets\].*partition = iid"):
        dealt(catalogue_of({"a": (60, 20)}), DataConfig(partition="dirichlet:1", num_tasks=2))


def test_a_folder_of_tasks_is_told_apart_from_a_clients(tmp_path):
    (tmp_path / "task-0" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="Each task of a client is a member of its own"):
        folder_catalogue(tmp_path, client="ann")


# -- names of members -------------------------------------------------------------------------


def test_a_members_name_says_its_client_and_task():
    for client in ("a", "hospital b", "client-0.task-x", "a.task-1"):
        assert client_of(member_name(client, 12)) == client
        assert task_of(member_name(client, 12)) == 12
    assert (client_of("task-3"), task_of("task-3")) == ("task-3", 3)
    assert (client_of("ann"), task_of("ann")) == ("ann", None)


def test_a_client_stands_for_all_its_members_unless_it_is_one():
    members = ("a", "a.task-1", "b.task-10", "b.task-2", "c")
    assert members_of("a", members) == ("a",)
    assert members_of("b", members) == ("b.task-2", "b.task-10")
    assert members_of("d", members) == ()


def test_tasks_arrive_by_number_and_whoever_has_none_alone():
    members = ["zoe", "b.task-10", "a.task-2", "b.task-2", "ann"]
    assert list(arrivals_of(members).items()) == [
        ("task-2", ("a.task-2", "b.task-2")),
        ("task-10", ("b.task-10",)),
        ("ann", ("ann",)),
        ("zoe", ("zoe",)),
    ]
