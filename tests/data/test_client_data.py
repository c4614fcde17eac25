"""How data is dealt to clients: the interface, digits, the draws, and real files."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.data import DataConfig
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import (
    ClientData,
    Split,
    client_names,
    load_client_data,
    load_folder,
    set_aside,
)
from fedcompo.data.draws import (
    cap_members,
    deal_classes,
    draw_classes,
    frozen_generator,
    split_members,
)
from fedcompo.engine.simulation import count_clients
from fedcompo.errors import ConfigError, ContributionError, DataError

GREY_8 = Preprocessing(image_size=8, channels=1, mean=(0.5,), std=(0.5,))
RGB_16 = Preprocessing(image_size=16, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)


@functools.cache
def all_clients(config: DataConfig, *, seed: int = 0) -> list[ClientData]:
    return [
        load_client_data(config, GREY_8, partition=partition, seed=seed)
        for partition in range(len(client_names(config)))
    ]


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_digits_are_dealt_so_that_each_class_has_exactly_one_owner():
    owned = [name for client in all_clients(DataConfig()) for name in client.classes]
    assert sorted(owned) == list("0123456789")


def test_train_and_test_of_digits_are_disjoint_and_together_all_images():
    clients = all_clients(DataConfig())
    train = set().union(*(rows(client.train.images) for client in clients))
    test = set().union(*(rows(client.test.images) for client in clients))
    everything = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert not train & test
    assert train | test == {image.tobytes() for image in everything}
    assert sum(len(c.train.labels) + len(c.test.labels) for c in clients) == 1797


def test_labels_of_digits_name_the_digit_that_is_shown():
    shown = {
        np.rint(image * 255 / 16).astype(np.uint8).tobytes(): str(digit)
        for image, digit in zip(*load_digits(return_X_y=True), strict=True)
    }
    for client in all_clients(DataConfig()):
        for split in (client.train, client.test):
            named = [client.classes[label] for label in split.labels]
            assert named == [shown[image.numpy().tobytes()] for image in split.images]


def test_a_quarter_of_each_digit_is_for_testing():
    for client in all_clients(DataConfig()):
        for label in range(len(client.classes)):
            tests = int((client.test.labels == label).sum())
            total = tests + int((client.train.labels == label).sum())
            assert tests == round(0.25 * total)


def test_the_test_set_of_digits_is_the_same_for_all_seeds():
    expected = set().union(*(rows(c.test.images) for c in all_clients(DataConfig(), seed=0)))
    actual = set().union(*(rows(c.test.images) for c in all_clients(DataConfig(), seed=1)))
    assert actual == expected


def test_tensors_have_the_shapes_and_types_that_are_promised():
    client = load_client_data(DataConfig(), RGB_16, partition=2, seed=0)
    assert client.name == "client-2"
    assert client.classes == tuple(sorted(client.classes))
    for split in (client.train, client.test):
        assert split.images.shape == (len(split.labels), 3, 16, 16)
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)


def test_the_same_seed_gives_identical_tensors_and_another_seed_another_deal():
    config = DataConfig(num_tasks=2, images_per_class=10)
    first, again, other = (all_clients.__wrapped__(config, seed=seed) for seed in (3, 3, 4))
    for one, two in zip(first, again, strict=True):
        assert one.classes == two.classes
        torch.testing.assert_close(dataclasses.astuple(one.train), dataclasses.astuple(two.train))
    assert [client.classes for client in first] != [client.classes for client in other]


def test_a_cap_limits_training_images_and_leaves_test_images_alone():
    whole = load_client_data(DataConfig(), GREY_8, partition=0, seed=0)
    capped = load_client_data(DataConfig(images_per_class=7), GREY_8, partition=0, seed=0)
    assert torch.bincount(capped.train.labels).tolist() == [7, 7]
    assert rows(capped.train.images) < rows(whole.train.images)
    torch.testing.assert_close(capped.test.images, whole.test.images, rtol=0, atol=0)


def test_a_cap_draws_different_images_for_different_seeds():
    config = DataConfig(images_per_class=7, num_tasks=1)
    first, other = (load_client_data(config, GREY_8, partition=0, seed=seed) for seed in (0, 1))
    assert rows(first.train.images) != rows(other.train.images)


def test_images_of_a_class_do_not_depend_on_how_classes_are_dealt():
    alone = load_client_data(
        DataConfig(num_tasks=1, images_per_class=5), GREY_8, partition=0, seed=0
    )
    dealt = all_clients(DataConfig(num_tasks=5, images_per_class=5))
    assert rows(alone.train.images) == set().union(*(rows(c.train.images) for c in dealt))


def test_num_classes_keeps_that_many_classes():
    clients = all_clients(DataConfig(num_tasks=3, num_classes=7))
    assert [len(client.classes) for client in clients] == [3, 2, 2]
    assert len({name for client in clients for name in client.classes}) == 7


def test_a_client_may_own_a_single_class():
    clients = all_clients(DataConfig(num_tasks=8, images_per_class=3))
    assert [len(client.classes) for client in clients] == [2, 2, 1, 1, 1, 1, 1, 1]
    assert clients[-1].train.labels.tolist() == [0, 0, 0]
    assert set(clients[-1].test.labels.tolist()) == {0}


def numbered(*counts: int) -> Split:
    """Images that are told apart by their pixel, ``counts[k]`` of class k."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    return Split(images, labels)


def pixels(split: Split) -> list[int]:
    return split.images.flatten().tolist()


def aside_of(split: Split, **given: Any) -> tuple[Split, Split]:
    return set_aside(split, **{"share": 0.1, "seed": 0, "client": "ann", **given})


def test_images_kept_aside_are_a_share_of_each_class_and_the_others_stay_in_order():
    whole = numbered(50, 4, 5, 26)
    kept, aside = aside_of(whole)
    assert torch.bincount(aside.labels, minlength=4).tolist() == [5, 0, 1, 3]
    assert pixels(kept) == sorted(pixels(kept))
    assert pixels(aside) == sorted(pixels(aside))
    assert sorted(pixels(kept) + pixels(aside)) == pixels(whole)
    for part in (kept, aside):  # each label went with its image
        assert part.labels.tolist() == [int(whole.labels[i]) for i in pixels(part)]


def test_who_is_kept_aside_is_drawn_by_seed_client_and_class():
    whole = numbered(50, 50)
    first, again = (pixels(aside_of(whole)[1]) for _ in range(2))
    assert (
        first == again == [12, 21, 22, 28, 36, 52, 57, 71, 75, 85]
    )  # pinned: each machine draws it
    assert first != pixels(aside_of(whole, seed=1)[1])
    assert first != pixels(aside_of(whole, client="bob")[1])
    assert [i % 50 for i in first[:5]] != [i % 50 for i in first[5:]]
    assert [i for i in first if i < 50] == pixels(aside_of(numbered(50, 20))[1])[:5]


@pytest.mark.parametrize("split", [numbered(4, 3), numbered(1)])
def test_small_classes_keep_nothing_aside(split: Split):
    kept, aside = aside_of(split, share=0.5)
    assert pixels(kept) == pixels(split)
    assert aside.images.shape == (0, 1, 1, 1)
    assert aside.labels.dtype == torch.int64


def test_a_share_of_zero_keeps_nothing_aside_and_a_large_one_not_all():
    whole = numbered(50)
    kept, aside = aside_of(whole, share=0.0)
    assert (pixels(kept), len(aside.labels)) == (pixels(whole), 0)
    assert len(aside_of(whole, share=0.999)[0].labels) == 1


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 7, 20])
def test_a_deal_is_a_partition_into_groups_as_equal_as_possible(num_tasks: int):
    names = [f"class {number}" for number in range(20)]
    groups = deal_classes(names, num_tasks, num_classes=0, seed=5, source="here")
    assert sorted(name for group in groups for name in group) == sorted(names)
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    assert groups == deal_classes(names[::-1], num_tasks, num_classes=0, seed=5, source="here")


def test_draws_are_the_same_on_every_machine():
    # Pinned once; NumPy guarantees this stream for good (NEP 19). Clients deal for themselves.
    assert draw_classes(list("abcdefgh"), 0, seed=0) == tuple("bacdegfh")
    assert frozen_generator(2**70, "split", "é").randint(1000) == 765


def test_fewer_classes_are_drawn_as_the_head_of_a_longer_draw():
    names = list("abcdefgh")
    assert draw_classes(names, 3, seed=1) == draw_classes(names, 0, seed=1)[:3]


@pytest.mark.parametrize(("count", "tests"), [(2, 1), (3, 1), (10, 2), (101, 20)])
def test_a_split_leaves_at_least_one_image_on_either_side(count: int, tests: int):
    train, test = split_members(np.arange(count), share=0.2, draw=frozen_generator(0))
    assert len(test) == tests
    assert sorted([*train, *test]) == list(range(count))


def test_a_smaller_cap_keeps_a_subset_of_a_larger_one():
    few, more = (set(cap_members(np.arange(50), n, draw=frozen_generator(0))) for n in (5, 20))
    assert len(few) == 5
    assert few < more


def test_too_few_classes_are_refused_with_the_numbers():
    with pytest.raises(DataError, match=r"10 classes in digits .* 11 clients.*most 10"):
        load_client_data(DataConfig(num_tasks=11), GREY_8, partition=0, seed=0)
    with pytest.raises(DataError, match=r"4 classes \(`num-classes`\), of 10 in digits"):
        load_client_data(DataConfig(num_classes=4), GREY_8, partition=0, seed=0)
    with pytest.raises(DataError, match=r"asks for 11 classes, but digits has 10"):
        load_client_data(DataConfig(num_classes=11), GREY_8, partition=0, seed=0)


@pytest.mark.parametrize("partition", [-1, 5])
def test_a_partition_out_of_range_is_refused(partition: int):
    with pytest.raises(DataError, match=rf"no client {partition}.*yields 5 clients, 0 to 4"):
        load_client_data(DataConfig(), GREY_8, partition=partition, seed=0)


def test_clients_are_counted_by_the_data_or_by_the_setting():
    assert count_clients(RunConfig.parse({"num-tasks": 4})) == 4
    assert count_clients(RunConfig.parse({"num-tasks": 4, "num-clients": 3})) == 3
    with pytest.raises(ConfigError, match="asks for 5 clients, but digits yields 4"):
        count_clients(RunConfig.parse({"num-tasks": 4, "num-clients": 5}))
    with pytest.raises(ConfigError, match="needs 2 clients"):
        count_clients(RunConfig.parse({"num-tasks": 1}))


def test_folders_whose_names_no_client_can_have_are_refused_all_at_once(tmp_path):
    for name in ("Clinic; North", "lab @3", "site-0", "site-O"):
        (tmp_path / name).mkdir()
    config = RunConfig.parse({"data": f"folder:{tmp_path}"})
    with pytest.raises(ContributionError) as refused:
        count_clients(config)
    said = str(refused.value)
    assert all(name in said for name in ("'Clinic; North'", "'lab @3'", "'site-O' could be"))
    assert "Rename the folders" in said
    for name in ("lab @3", "site-O"):
        (tmp_path / name).rmdir()
    (tmp_path / "Clinic; North").rename(tmp_path / "Clinic North")
    assert count_clients(config) == 2


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        ("digit", "Did you mean 'digits'?"),
        ("cifar10", "Did you mean 'cifar100'?"),
        ("fodler:/scans", "Did you mean 'folder:/scans'?"),
        ("digits:8", "Did you mean 'digits'?"),
        ("folder:", "folder needs a path: folder:<path>."),
        ("npz", "npz needs a path: npz:<path>."),
        ("", "got ''. There is no such file or folder, either."),
        ("imagenet", "got 'imagenet'. There is no such file or folder, either."),
    ],
)
def test_an_unknown_source_is_refused_with_the_list_and_the_nearest(data: str, hint: str):
    with pytest.raises(DataError) as caught:
        client_names(DataConfig(data=data))
    listed = "digits, folder:<path>, manifest:<path>, npz:<path>, text:<path>, hf:<path>, hf:<name>"
    assert listed in str(caught.value)
    assert str(caught.value).endswith(hint)


def test_a_bare_path_is_refused_with_the_source_that_reads_it(tmp_path: Path):
    (tmp_path / "scans.npz").touch()
    with pytest.raises(DataError, match="Did you mean 'folder:"):
        client_names(DataConfig(data=str(tmp_path)))
    with pytest.raises(DataError, match="Did you mean 'npz:"):
        client_names(DataConfig(data=str(tmp_path / "scans.npz")))


@pytest.mark.parametrize(
    ("data", "tests"), [("cifar100_32.npz", (20, 20)), ("caltech101_128.npz", (6, 12))]
)
def test_real_npz_files_load(shared_data: Path, data: str, tests: tuple[int, int]):
    path = shared_data / data
    if not path.is_file():
        pytest.skip(f"no {data} in {shared_data}")
    config = DataConfig(data=f"npz:{path}", num_tasks=20, images_per_class=3)
    client = load_client_data(config, RGB_16, partition=19, seed=0)
    assert len(client.classes) == 5
    assert torch.bincount(client.train.labels).tolist() == [3] * 5
    counts = torch.bincount(client.test.labels)
    assert counts.min() >= tests[0]
    assert counts.max() <= tests[1]
    assert client.train.images.float().std() > 10


def test_what_a_node_owns_is_a_path_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    whole = load_folder("digits", GREY_8, seed=0)
    assert (whole.name, len(whole.classes)) == ("digits", 10)
    for number in range(4):
        file = tmp_path / "digits/cat" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(file)
    assert load_folder("digits", GREY_8, seed=0).classes == ("cat",)
    assert load_folder("digits", GREY_8, seed=0, client="ward").name == "ward"
    np.savez("scans.npz", images=np.zeros((4, 8, 8), np.uint8), labels=[0, 0, 1, 1])
    for own in ("scans.npz", "npz:scans.npz", tmp_path / "scans.npz"):
        client = load_folder(own, GREY_8, seed=0)
        assert (client.name, client.classes) == ("scans", ("0", "1"))


def test_load_folder_needs_no_config(tmp_path: Path):
    with pytest.raises(DataError, match=r"'ward'.*cannot be read"):
        load_folder(tmp_path / "ward", RGB_16, seed=0)
