"""Shards: which image is in which, also after others were deleted, and what the map says of it."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clients.store import maps_home
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import folder_share
from fedcompo.data.shards import dealt, needed_for
from fedcompo.data.tasks import (
    check_whole,
    client_of,
    members_of,
    one_of_each,
    shard_name,
    shard_of,
    task_of,
    whole_of,
)
from fedcompo.engine.run_folder import LOGS
from fedcompo.errors import ContributionError, DataError

CLASSES = ("cat", "dog")


@pytest.fixture
def hospital(tmp_path) -> Path:
    """Twelve patients with one to four images each of two classes; test images are not marked."""
    lines = ["path,label,group"]
    for patient in range(12):
        for number in range(1 + patient % 4):
            for label in CLASSES:
                name = f"{label}-{patient}-{number}.png"
                (tmp_path / name).touch()  # nobody looks into it
                lines.append(f"{name},{label},patient-{patient}")
    (tmp_path / "scans.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def deal(data: Path, file: Path, shards: int = 3, *, cap: int = 0, needed: int = 1):
    """Deal; returns the shard by sample, of the training images, and the test images."""
    share = folder_share(str(data), seed=0, images_per_class=cap, client="a")
    share, numbers = dealt(share, shards, seed=0, cap=cap, needed=needed, file=file)
    named = share.catalogue.file
    train = [named(i).name for i in np.concatenate(share.train).tolist()]
    tests = {named(i).name for i in np.concatenate(share.test).tolist()}
    return dict(zip(train, numbers.tolist(), strict=True)), tests


def rows(file: Path) -> list[list[str]]:
    with file.open(newline="") as opened:
        return list(csv.reader(opened))


def without(data: Path, keep) -> None:
    """Delete rows of the table and their files."""
    head, *lines = data.read_text().splitlines()
    for line in lines:
        if not keep(line):
            (data.parent / line.split(",")[0]).unlink()
    data.write_text("\n".join([head, *filter(keep, lines)]) + "\n")


def test_each_shard_has_its_share_of_each_class_and_a_patient_is_in_one(hospital, tmp_path):
    place, tests = deal(hospital / "scans.csv", tmp_path / "map.csv")
    counts = Counter((name.split("-")[0], shard) for name, shard in place.items())
    for label in CLASSES:
        own = [counts[label, shard] for shard in range(3)]
        assert max(own) - min(own) <= 4  # the most images of one patient
    by_patient = Counter({(name.split("-")[1], shard) for name, shard in place.items()})
    assert len(by_patient) == len({patient for patient, _ in by_patient})
    assert not tests & place.keys()


def test_without_groups_the_shares_are_even(hospital, tmp_path):
    data = hospital / "scans.csv"
    data.write_text("\n".join(line.rpartition(",")[0] for line in data.read_text().splitlines()))
    place, _ = deal(data, tmp_path / "map.csv")
    counts = Counter((name.split("-")[0], shard) for name, shard in place.items())
    for label in CLASSES:
        assert max(own := [counts[label, s] for s in range(3)]) - min(own) <= 1


def test_the_map_is_for_people_and_for_nobody_else(hospital, tmp_path):
    place, tests = deal(hospital / "scans.csv", file := tmp_path / "state" / "map.csv")
    head, *lines = rows(file)
    assert head == ["shard", "sample", "group"]
    assert {(where, sample) for where, sample, _ in lines} == {
        *((str(shard), name) for name, shard in place.items()),
        *(("test", name) for name in tests),
    }
    assert all(group == f"patient-{name.split('-')[1]}" for _, name, group in lines)
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("cap", [0, 15])
def test_who_stays_keeps_its_place_when_others_are_deleted(hospital, tmp_path, cap):
    """Oracle: the places before. Without the map, most of them would be others."""
    data, file = hospital / "scans.csv", tmp_path / "map.csv"
    before, tests = deal(data, file, cap=cap)
    without(data, lambda line: not line.endswith((",patient-3", ",patient-7")))
    after, tests_now = deal(data, file, cap=cap)
    stay = {n: s for n, s in before.items() if n.split("-")[1] not in ("3", "7")}
    assert {name: after[name] for name in stay} == stay
    assert tests_now == {n for n in tests if n.split("-")[1] not in ("3", "7")}
    assert not any(group in ("patient-3", "patient-7") for *_, group in rows(file))
    anew, _ = deal(data, tmp_path / "other.csv", cap=cap)
    assert {n: anew.get(n) for n in stay} != stay


def test_a_new_image_comes_to_its_patient(hospital, tmp_path):
    data, file = hospital / "scans.csv", tmp_path / "map.csv"
    before, _ = deal(data, file)
    patient = next(name.split("-")[1] for name, shard in before.items() if shard == 2)
    (hospital / "cat-new.png").touch()
    data.write_text(data.read_text() + f"cat-new.png,cat,patient-{patient}\n")
    after, _ = deal(data, file)
    assert after == before | {"cat-new.png": 2}


def test_images_without_files_are_known_by_their_content(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 255, (40, 4, 4), dtype=np.uint8)
    labels = np.arange(40) % 2

    def deal_rows(which) -> dict[str, str]:
        np.savez(tmp_path / "a.npz", images=pixels[which], labels=labels[which])
        share = folder_share(str(tmp_path / "a.npz"), seed=0)
        dealt(share, 2, seed=0, cap=0, needed=1, file=tmp_path / "map.csv")
        return {sample: where for where, sample, _ in rows(tmp_path / "map.csv")[1:]}

    before = deal_rows(np.arange(40))
    after = deal_rows(np.arange(40)[5:])
    assert len(before) == 40 and len(after) == 35
    assert after.items() <= before.items()


@pytest.mark.parametrize(("shards", "needed", "allowed"), [(1000, 1, 11), (9, 2, 7), (5, 6, 3)])
def test_too_many_shards_are_refused_with_the_number_that_there_could_be(
    hospital, tmp_path, shards, needed, allowed
):
    file = tmp_path / "map.csv"
    with pytest.raises(DataError, match=rf"allow {allowed} shard\(s\)") as refused:
        deal(hospital / "scans.csv", file, shards, needed=needed)
    assert "patient-" not in refused.value.told and "png" not in refused.value.told
    assert not file.exists()
    deal(hospital / "scans.csv", file, allowed, needed=needed)  # it is true,
    with pytest.raises(DataError):  # and the most
        deal(hospital / "scans.csv", tmp_path / "b.csv", allowed + 1, needed=needed)


@pytest.mark.parametrize(
    "line", ["3,cat-1-0.png,", "-1,cat-1-0.png,", "0,cat-1-0.png", "0,a,\n1,a,", "x,a,"]
)
def test_a_damaged_map_is_refused_and_left_as_it_is(hospital, tmp_path, line):
    file = tmp_path / "map.csv"
    file.write_text(f"shard,sample,group\n{line}\n")
    with pytest.raises(DataError, match="Restore the map"):
        deal(hospital / "scans.csv", file)
    assert line in file.read_text()


def test_columns_that_may_both_be_the_patients_are_refused(hospital, tmp_path):
    data = hospital / "scans.csv"
    data.write_text(data.read_text().replace("group", "patient"))
    alike, _ = deal(data, tmp_path / "map.csv")  # one that is called alike serves
    lines = data.read_text().splitlines()
    data.write_text(
        "\n".join([f"{lines[0]},person", *(f"{line},{i}" for i, line in enumerate(lines[1:]))])
    )
    folder_share(str(data), seed=0, client="a")  # without shards, it does not matter
    with pytest.raises(DataError, match="#group="):
        deal(data, tmp_path / "b.csv")
    chosen, _ = deal(Path(f"{data}#group=patient"), tmp_path / "b.csv")
    assert chosen == alike


def test_what_is_needed_is_left_to_train_on():
    assert [needed_for(least, aside=0.1) for least in (0, 1, 4, 5, 8)] == [1, 1, 4, 6, 9]
    assert needed_for(8, aside=0.0) == 8


def test_names_say_whose_shard_a_member_is():
    for whole in ("a", "hospital b", "client-0.task-2"):
        name = shard_name(whole, 12)
        assert (whole_of(name), shard_of(name)) == (whole, 12)
        assert (client_of(name), task_of(name)) == (client_of(whole), task_of(whole))
        assert shard_name(whole, None) == whole
        with pytest.raises(ContributionError, match="names a shard"):
            check_whole(name)
    for other in (
        "a",
        "a.shard-01",
        "a.shard-l",
        "a.shard-",
        ".shard-1",
        "a.shard-1.x",
        "ashard-1",
    ):
        assert (whole_of(check_whole(other)), shard_of(other)) == (other, None)
    there = ("a.shard-10", "a.shard-2", "a.task-1.shard-0", "a2.shard-0", "b")
    assert members_of("a", there) == ("a.shard-2", "a.shard-10", "a.task-1.shard-0")
    assert members_of("a.task-1", there) == ("a.task-1.shard-0",)
    assert members_of("a.shard-2", there) == ("a.shard-2",)
    assert one_of_each(there) == ("a.shard-2", "a.task-1.shard-0", "a2.shard-0", "b")


def test_images_with_the_same_content_go_together_in_every_process(tmp_path):
    """A test image's twin is not trained on, and twins of two patients unite their shards."""
    pixels = np.random.RandomState(0).randint(0, 255, (40, 4, 4), dtype=np.uint8)
    pixels[20:] = pixels[:20]
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(40) % 2)
    share = folder_share(str(tmp_path / "a.npz"), seed=0)
    patients = np.array([str(i // 4) for i in range(40)])  # 0 and 5 share images
    share = replace(share, catalogue=replace(share.catalogue, columns={"patient": patients}))
    results = []
    for _ in range(2):
        own, numbers = dealt(share, 2, seed=0, cap=0, needed=1, file=tmp_path / "map.csv")
        train, test = (np.concatenate(part).tolist() for part in (own.train, own.test))
        results.append((train, test, numbers.tolist()))
    assert results[0] == results[1]
    train, test, numbers = results[0]
    assert not {i % 20 for i in train} & {i % 20 for i in test}
    assert len({(i // 4 % 5, n) for i, n in zip(train, numbers, strict=True)}) <= 5


def test_an_image_of_the_map_that_is_no_test_image_any_more_is_dealt(hospital, tmp_path):
    data, file = hospital / "scans.csv", tmp_path / "map.csv"
    before, tests = deal(data, file)
    head, *lines = data.read_text().splitlines()
    marked = [f"{x},{'test' if x.split(',')[0] in before else 'train'}" for x in lines]
    data.write_text("\n".join([f"{head},split", *marked]))
    after, _ = deal(data, file)
    assert after.keys() == tests


def test_a_map_of_other_images_is_not_lost(hospital, tmp_path):
    file = tmp_path / "map.csv"
    file.write_text(text := "shard,sample,group\n0,elsewhere.png,\n")
    with pytest.raises(DataError, match="None of the images") as refused:
        deal(hospital / "scans.csv", file)
    assert file.read_text() == text and "map.csv" not in refused.value.told


def test_a_later_simulation_with_the_registry_finds_the_map(monkeypatch, tmp_path):
    first = RunConfig.parse({"output": str(tmp_path / "a"), "shards": 2})
    later = {"output": str(tmp_path / "b"), "shards": 2, "registry": str(tmp_path / "a/registry")}
    monkeypatch.setenv(LOGS, str(tmp_path))
    assert maps_home("", first) == maps_home("", RunConfig.parse(later))
    assert maps_home("mine", first) == Path("mine/shards")
