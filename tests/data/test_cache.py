"""Decoded images on disk: the same bits as in memory, found again, made again where damaged."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedcompo import runtime
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.data import cache, decoding
from fedcompo.data.catalogue import Catalogue
from fedcompo.data.client_data import ClientData, load_folder, set_aside
from fedcompo.errors import DataError
from fedcompo.method.images import Rows, batches, joined, part_of
from fedcompo.report.pictures import REPEATED
from fedcompo.runtime import peak_bytes, reset_peak

RGB_8 = Preprocessing(image_size=8, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
ROW = 3 * 8 * 8


@pytest.fixture
def ward(tmp_path: Path) -> Path:
    """A client's folder: 40 pictures of noise, one with 16 bits, one in training and test."""
    draw = np.random.RandomState(0)
    for number in range(40):
        part, own = "test" if number % 4 == 3 else "train", "cat" if number < 20 else "dog"
        file = tmp_path / "ward" / part / own / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.randint(0, 256, (12, 9, 3)).astype(np.uint8)).save(file)
    deep = draw.randint(0, 4096, (12, 9)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "ward/train/cat/deep.png")
    shutil.copy(tmp_path / "ward/train/cat/00.png", tmp_path / "ward/test/cat/again.png")
    return tmp_path / "ward"


def load(ward: Path, folder: Path | None = None, **changes: Any) -> ClientData:
    return load_folder(ward, RGB_8, seed=0, cache=folder, **changes)


def whole(client: ClientData) -> torch.Tensor:
    return torch.cat([client.train.images[:], client.test.images[:]])


@pytest.fixture
def expected(ward: Path) -> torch.Tensor:
    """All images of the client, as they are in memory."""
    client = load(ward)
    assert isinstance(client.train.images, torch.Tensor)
    return whole(client)


@pytest.fixture
def on_disk(expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Even few images are kept on disk, and three threads decode."""
    monkeypatch.setattr(decoding, "IN_MEMORY", 0)
    monkeypatch.setattr(runtime, "workers", lambda: 3)
    monkeypatch.setattr(runtime, "SOON", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "cache"


def test_on_disk_are_the_bits_that_are_in_memory_however_they_are_asked_for(
    ward: Path, on_disk: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    client = load(ward, on_disk)
    train, test = client.train.images, client.test.images
    assert isinstance(train, Rows)
    assert train.shape == (31, 3, 8, 8) == (len(train), *expected.shape[1:])
    mask = torch.arange(31) % 3 == 0
    order = torch.randperm(31, generator=torch.Generator().manual_seed(1))
    for which in (slice(None), slice(3, 20, 2), slice(5, 5), order, order[:0], mask):
        assert torch.equal(train[which], expected[:31][which])
        assert torch.equal(part_of(train, which)[:], expected[:31][which])
    assert torch.equal(train[4], expected[4])
    assert torch.equal(joined(test, train)[order], torch.cat([expected[31:], expected[:31]])[order])
    assert torch.equal(torch.cat([*batches(train, 7)]), expected[:31])
    kept, aside = set_aside(client.train, share=0.2, seed=0, client="ward")
    known = set_aside(
        type(kept)(expected[:31], client.train.labels), share=0.2, seed=0, client="ward"
    )
    assert torch.equal(kept.images[:], known[0].images)
    assert torch.equal(aside.images[:], known[1].images)


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("it was decoded again")

    monkeypatch.setattr(decoding.Reader, "example", fail)


def test_a_later_process_reads_the_file_and_says_the_same(
    ward: Path,
    on_disk: Path,
    expected: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    first = load(ward, on_disk)
    said = [*caplog.messages]
    caplog.clear()
    no_decoding(monkeypatch)
    again = load(ward, on_disk)
    assert torch.equal(whole(again), expected)
    assert again.facts == first.facts == {REPEATED: 1, "16-bit integers": 4095}
    assert caplog.messages == said[-2:]
    assert "1 of 42 images" in caplog.text
    assert "1 of 11 test images" in caplog.text
    (file,) = on_disk.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(on_disk.stat().st_mode) == 0o700


@pytest.mark.parametrize("change", ["a file", "the images", "the input"])
def test_what_decides_the_pixels_names_the_file(ward: Path, on_disk: Path, change: str):
    load(ward, on_disk)
    if change == "a file":
        Image.new("RGB", (9, 9), (1, 2, 3)).save(ward / "train/dog/20.png")
        assert (load(ward, on_disk).train.images[:] == 1).any()
    elif change == "the images":
        assert len(load(ward, on_disk, images_per_class=3).train.images) == 6
    else:
        other = Preprocessing(8, 3, (0.5,) * 3, (0.5,) * 3, interpolation="bilinear")
        load_folder(ward, other, seed=0, cache=on_disk)
    assert len([*on_disk.iterdir()]) == 2


def cut(file: Path, size: int) -> None:
    os.truncate(file, size)


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: cut(file, 0),
        lambda file: cut(file, 100),
        lambda file: cut(file, file.stat().st_size - 1),
        lambda file: flip(file, -1),
        lambda file: flip(file, -40),
        lambda file: flip(file, 42 * ROW + 5),
        lambda file: file.write_bytes(b"x" * file.stat().st_size),
        lambda file: file.write_bytes(file.read_bytes() + b"x"),
    ],
)
def test_a_damaged_file_is_made_again(
    ward: Path, on_disk: Path, expected: torch.Tensor, damage: Callable[[Path], Any], caplog: Any
):
    load(ward, on_disk)
    (file,) = on_disk.iterdir()
    good = file.read_bytes()
    damage(file)
    assert torch.equal(whole(load(ward, on_disk)), expected)
    assert "the images are decoded again" in caplog.text
    assert file.read_bytes() == good


def test_an_image_that_a_manifest_lists_may_change_while_the_process_lives(
    ward: Path, on_disk: Path
):
    rows = [f"{file.relative_to(ward)},{file.parent.name}" for file in ward.glob("train/*/*.png")]
    manifest = ward / "all.csv"
    manifest.write_text("\n".join(["path,label", *rows]))
    before = whole(load(manifest, on_disk))
    Image.new("RGB", (12, 9), (1, 2, 3)).save(ward / "train/cat/00.png")
    after = load(manifest, on_disk)
    assert not torch.equal(whole(after), before)
    assert torch.equal(whole(after), whole(load(manifest)))


def test_a_file_that_is_cut_short_while_it_is_in_use_is_an_error(ward: Path, on_disk: Path):
    client = load(ward, on_disk)
    (file,) = on_disk.iterdir()
    cut(file, 10)
    with pytest.raises(ValueError, match="file size"):
        whole(client)


def test_decoding_that_fails_leaves_nothing_and_so_does_a_crash(
    ward: Path, on_disk: Path, expected: torch.Tensor
):
    broken = ward / "train/dog/x.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"(?s)1 of 43 images .*x\.png"):
        load(ward, on_disk)
    assert [*on_disk.iterdir()] == []
    broken.unlink()
    old, new = (on_disk / f"{age}{cache.PART}" for age in ("old", "new"))
    old.write_bytes(b"left by a process that was killed")
    new.write_bytes(b"written by a process that lives")
    os.utime(old, (time.time() - 2 * cache.STALE,) * 2)
    assert torch.equal(whole(load(ward, on_disk)), expected)
    assert {file.suffix for file in on_disk.iterdir() if file != new} == {cache.DONE}


def entries(folder: Path, *ages: float) -> list[Path]:
    """Files of 100 bytes that were used so many days ago."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{number}{cache.DONE}" for number in range(len(ages))]
    for file, age in zip(files, ages, strict=True):
        file.write_bytes(b"x" * 100)
        os.utime(file, (time.time() - age * 86400,) * 2)
    return files


def test_room_is_made_by_what_was_not_used_for_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    free = {"bytes": 700}
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("", (), {"free": free["bytes"]}))
    entries(tmp_path / "c", 1, 3, 2)  # with what is free 1,000, of which 900 may be used
    cache.make_room(tmp_path / "c", 600)
    assert len([*(tmp_path / "c").iterdir()]) == 3
    cache.make_room(tmp_path / "c", 601)
    assert sorted(file.stem for file in (tmp_path / "c").iterdir()) == ["0", "2"]
    with pytest.raises(OSError, match="there is room for"):
        cache.make_room(tmp_path / "c", 811)
    assert len([*(tmp_path / "c").iterdir()]) == 2  # none was deleted in vain
    free["bytes"] = 10**6
    entries(tmp_path / "c", 1, cache.DAYS + 1, cache.DAYS - 1)
    cache.make_room(tmp_path / "c", 1)
    assert sorted(file.stem for file in (tmp_path / "c").iterdir()) == ["0", "2"]


def test_a_run_that_ends_deletes_its_file_and_who_has_it_open_still_reads(
    ward: Path, on_disk: Path, expected: torch.Tensor
):
    client = load(ward, on_disk)
    cache.forget(client.train.images, client.test.images, torch.zeros(1))
    assert [*on_disk.iterdir()] == []
    assert torch.equal(whole(client), expected)


def test_without_a_folder_or_a_version_nothing_is_left_on_disk(
    ward: Path, on_disk: Path, expected: torch.Tensor, tmp_path: Path
):
    assert torch.equal(whole(load(ward)), expected)
    assert [*(tmp_path / "xdg/fedcompo/images").iterdir()] == []


def test_a_folder_that_cannot_be_written_is_refused_with_what_to_do(ward: Path, on_disk: Path):
    on_disk.write_text("a file")
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        load(ward, on_disk)


def test_memory_does_not_grow_with_the_number_of_images(
    on_disk: Path, monkeypatch: pytest.MonkeyPatch
):
    large = Preprocessing(224, 3, (0.5,) * 3, (0.5,) * 3, interpolation="nearest")
    count = 1200  # 172 MiB
    catalogue = Catalogue("made", np.array(["a"] * count), None, lambda i: Image.new("L", (32, 32)))
    indices = [np.arange(count)]
    decoding.decode(catalogue, [indices[0][:9]], [indices[0][9:20]], large, client="warm")
    reset_peak()
    before = peak_bytes()["resident"]
    train, test, _ = decoding.decode(
        catalogue, [indices[0][:900]], [indices[0][900:]], large, client="ann"
    )
    for images in (train, test):
        for batch in batches(images, 64):
            assert batch.shape[1:] == (3, 224, 224)
    assert peak_bytes()["resident"] - before < 50 * 2**20
