"""Folders of images: what is read, how pictures are opened, and what is refused by name."""

from __future__ import annotations

import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.data import DataConfig
from fedcompo.data.client_data import client_names, load_client_data, load_folder
from fedcompo.errors import DataError
from fedcompo.report.pictures import DEALT, JOINED, STAND_IN, notes_on

GREY = Preprocessing(image_size=4, channels=1, mean=(0.5,), std=(0.5,), interpolation="nearest")
RGB = Preprocessing(
    image_size=4, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="nearest"
)


def picture(value: int = 0) -> Image.Image:
    return Image.new("L", (4, 4), value)


def write(folder: Path, counts: dict[str, int], *, start: int = 0) -> Path:
    """Write grey images, each of one value of its own, as ``folder/<class>/<number>.png``."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture(start).save(folder / name / f"{number}.png")
            start += 1
    return folder


def values(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


@pytest.fixture
def ward(tmp_path: Path) -> Path:
    """One client: training images 0..5, test images 100..102."""
    write(tmp_path / "ward/train", {"cat": 3, "dog": 3})
    write(tmp_path / "ward/test", {"cat": 1, "dog": 2}, start=100)
    return tmp_path / "ward"


def refused(folder: Path, *, seed: int = 0) -> str:
    with pytest.raises(DataError) as caught:
        load_folder(folder, GREY, seed=seed)
    return str(caught.value)


def test_a_folder_is_read_as_it_lies(ward: Path):
    client = load_folder(ward, GREY, seed=0)
    assert (client.name, client.classes) == ("ward", ("cat", "dog"))
    assert values(client.train.images) == [0, 1, 2, 3, 4, 5]
    assert client.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert values(client.test.images) == [100, 101, 102]
    assert client.test.labels.tolist() == [0, 1, 1]


def test_each_sub_folder_is_a_client_in_order_of_name_and_may_share_classes(ward: Path):
    write(ward.parent / "clinic/train", {"cat": 5, "emu": 5, "fox": 5})
    (ward.parent / "README.md").write_text("beside the clients")
    config = DataConfig(data=f"folder:{ward.parent}", num_tasks=99)
    assert len(client_names(config)) == 2
    clinic, second = (load_client_data(config, GREY, partition=n, seed=0) for n in range(2))
    assert (clinic.name, clinic.classes) == ("clinic", ("cat", "emu", "fox"))
    assert (second.name, second.classes) == ("ward", ("cat", "dog"))
    assert values(second.train.images) == values(load_folder(ward, GREY, seed=0).train.images)


def test_num_classes_and_images_per_class_hold_for_each_client(ward: Path):
    write(ward.parent / "clinic/train", {"cat": 9, "emu": 9, "fox": 9})
    config = DataConfig(data=f"folder:{ward.parent}", num_classes=2, images_per_class=2)
    for partition in range(2):
        client = load_client_data(config, GREY, partition=partition, seed=0)
        assert torch.bincount(client.train.labels).tolist() == [2, 2]


def test_without_test_images_a_fifth_of_each_class_is_drawn_by_seed(tmp_path: Path):
    write(tmp_path / "train", {"cat": 20, "dog": 2, "emu": 3})
    first, again, other = (load_folder(tmp_path, GREY, seed=seed) for seed in (0, 0, 1))
    assert torch.bincount(first.test.labels).tolist() == [4, 1, 1]
    together = values(first.train.images) + values(first.test.images)
    assert sorted(together) == list(range(25))
    assert values(first.test.images) == values(again.test.images)
    assert values(first.test.images) != values(other.test.images)


def test_a_class_may_lack_test_images_if_another_has_them(ward: Path):
    shutil.rmtree(ward / "test/cat")
    assert load_folder(ward, GREY, seed=0).test.labels.tolist() == [1, 1]


def test_files_that_systems_leave_behind_do_not_count(ward: Path):
    expected = load_folder(ward, GREY, seed=0)
    for place in (ward.parent, ward, ward / "train", ward / "train/cat", ward / "test/dog"):
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png", "@eaDir"):
            (place / name).write_bytes(b"no image")
        (place / "__MACOSX").mkdir()
        (place / ".git").mkdir()
    config = DataConfig(data=f"folder:{ward.parent}")
    actual = load_client_data(config, GREY, partition=0, seed=0)
    assert (len(client_names(config)), actual.classes) == (1, expected.classes)
    torch.testing.assert_close(actual.train.images, expected.train.images, rtol=0, atol=0)


def test_class_names_agree_however_a_system_spells_them(tmp_path: Path):
    for client, form in (("mac", "NFD"), ("pc", "NFC")):
        write(tmp_path / client / "train", {unicodedata.normalize(form, "Löwe"): 2, "Bär": 2})
        write(tmp_path / client / "test", {unicodedata.normalize("NFC", "Löwe"): 1})
    mac, pc = (load_folder(tmp_path / client, GREY, seed=0) for client in ("mac", "pc"))
    assert mac.classes == pc.classes == ("Bär", unicodedata.normalize("NFC", "Löwe"))


def test_two_spellings_of_one_name_are_refused(ward: Path):
    write(ward / "train", {unicodedata.normalize("NFD", "é"): 1})
    try:
        write(ward / "train", {unicodedata.normalize("NFC", "é"): 1})
    except FileExistsError:
        pytest.skip("this file system knows one spelling only")
    assert "two entries named 'é'" in refused(ward)


def test_a_name_that_is_no_unicode_is_refused(ward: Path):
    try:
        (ward / "train/b\udcff").mkdir()
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    assert "no valid Unicode" in refused(ward)


@pytest.mark.parametrize("preprocessing", [GREY, RGB])
def test_pictures_of_all_modes_may_be_mixed(ward: Path, preprocessing: Preprocessing):
    grey, palette = picture(120), picture(120).convert("P")  # the palette of greys
    shown = {"l.png": grey, "la.png": grey.convert("LA"), "p.png": palette, "p.gif": palette}
    for mode, kind in (("RGB", "bmp"), ("RGBA", "png"), ("CMYK", "jpg"), ("YCbCr", "jpg")):
        shown[f"{mode}.{kind}"] = grey.convert("RGB").convert(mode)
    shutil.rmtree(ward / "train/cat")
    (ward / "train/cat").mkdir()
    for file, image in shown.items():
        image.save(ward / "train/cat" / file)
    Image.new("1", (4, 4), 1).save(ward / "train/cat/~.png")
    client = load_folder(ward, preprocessing, seed=0)
    assert client.train.images.shape[1:] == (preprocessing.channels, 4, 4)
    *cats, white = client.train.images[client.train.labels == 0]
    assert len(cats) == len(shown)
    for image in cats:
        torch.testing.assert_close(image, torch.full_like(image, 120), rtol=0, atol=2)
    assert white.min() == 255


def test_a_picture_is_turned_upright_as_its_exif_tag_says(ward: Path):
    upright = np.arange(0, 160, 10, dtype=np.uint8).reshape(4, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise to stand upright
    deep = upright.astype(np.uint16) * 257
    for name, pixels in (("8 bits.png", upright), ("16 bits.png", deep)):
        Image.fromarray(np.rot90(pixels).copy()).save(ward / "train/cat" / name, exif=exif)
    client = load_folder(ward, GREY, seed=0)
    for row in (2, 4):  # sorted by name: 0.png, 1.png, "16 bits.png", 2.png, "8 bits.png"
        np.testing.assert_array_equal(client.train.images[row, 0].numpy(), upright)


def damage(file: Path, how: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    whole = file.read_bytes()
    kept = {"empty": 0, "header": 20, "half": len(whole) // 2, "tail": len(whole) - 30}
    file.write_bytes(whole[: kept[how]] if how in kept else b"no image")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("how", ["empty", "text", "header", "half", "tail"])
@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp", "tif", "webp"])
def test_a_damaged_image_is_refused_by_client_class_and_file(ward: Path, how: str, kind: str):
    damage(ward / f"train/dog/broken.{kind}", how)
    message = refused(ward)
    assert "Client 'ward': 1 of 10 images" in message
    assert f"broken.{kind} (class 'dog')" in message


def test_of_many_damaged_images_the_first_are_listed_and_all_counted(ward: Path):
    for number in range(7):
        damage(ward / f"train/cat/x{number}.png", "half")
    message = refused(ward)
    assert "7 of 16 images" in message
    assert [f"x{number}.png" in message for number in range(7)] == [True] * 5 + [False] * 2
    assert "and 2 more" in message


def test_a_text_file_among_the_images_is_refused_by_name(ward: Path):
    (ward / "train/cat/README.txt").write_text("Cats of 2024.")
    assert "README.txt (class 'cat')" in refused(ward)


def test_an_image_that_is_not_used_is_not_opened(tmp_path: Path):
    write(tmp_path / "a/train", {"cat": 2, "dog": 2})
    write(tmp_path / "b/train", {"cat": 2, "dog": 2})
    damage(tmp_path / "b/train/cat/0.png", "half")
    config = DataConfig(data=f"folder:{tmp_path}")
    assert load_client_data(config, GREY, partition=0, seed=0).name == "a"
    with pytest.raises(DataError, match="Client 'b'"):
        load_client_data(config, GREY, partition=1, seed=0)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_a_validation_folder_is_the_test_set_where_there_is_no_other(
    ward: Path, name: str, caplog: pytest.LogCaptureFixture
):
    (ward / "test").rename(ward / name)
    client = load_folder(ward, GREY, seed=0)
    assert (values(client.train.images), values(client.test.images)) == (
        [0, 1, 2, 3, 4, 5],
        [100, 101, 102],
    )
    assert client.facts == {STAND_IN: 3}
    assert f"3 of 9 images in {ward} {STAND_IN}." in caplog.text


def test_beside_a_test_folder_a_validation_folder_is_trained_on_and_others_are_not_read(
    ward: Path, caplog: pytest.LogCaptureFixture
):
    load_folder(ward, GREY, seed=0)
    assert not caplog.records
    for name in ("val", "masks"):
        write(ward / name, {"cat": 1}, start=200)
    client = load_folder(ward, GREY, seed=0)
    assert values(client.train.images) == [0, 1, 2, 200, 3, 4, 5]
    assert values(client.test.images) == [100, 101, 102]
    assert client.facts == {JOINED: 1}
    assert "that are not read: masks." in caplog.text


def test_a_missing_or_empty_path_is_refused_by_name(tmp_path: Path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match=str(path)):
            client_names(DataConfig(data=f"folder:{path}"))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"Not a directory"):
        client_names(DataConfig(data=f"folder:{tmp_path / 'file'}"))


def test_a_file_of_another_kind_is_refused_by_its_ending(tmp_path: Path):
    (tmp_path / "scans.xlsx").write_bytes(b"PK")
    assert "scans.xlsx is a file, but of no kind that is read" in refused(tmp_path / "scans.xlsx")


def test_class_folders_without_train_are_a_client_whose_test_images_are_drawn(ward: Path):
    bare = load_folder(ward / "train", GREY, seed=0)
    shutil.rmtree(ward / "test")
    split = load_folder(ward, GREY, seed=0)
    assert (bare.name, bare.classes, bare.facts) == ("train", split.classes, {})
    assert values(bare.test.images) == values(split.test.images)
    assert values(bare.train.images) == values(split.train.images)


def test_class_folders_of_several_clients_are_clients(tmp_path: Path):
    for number, client in enumerate(("lab", "ward")):
        write(tmp_path / client, {"cat": 2, "dog": 2}, start=10 * number)
    config = DataConfig(data=f"folder:{tmp_path}")
    assert client_names(config) == ("lab", "ward")
    client = load_client_data(config, GREY, partition=1, seed=0)
    assert (client.name, client.classes) == ("ward", ("cat", "dog"))


@pytest.mark.parametrize("part", ["", "train"])
def test_one_data_set_is_dealt_by_class_and_the_run_notes_it(tmp_path: Path, part: str):
    write(tmp_path / part, {"ant": 2, "bee": 2, "cat": 2, "dog": 2})
    config = DataConfig(data=f"folder:{tmp_path}", num_tasks=2)
    assert client_names(config) == ("client-0", "client-1")
    clients = [load_client_data(config, GREY, partition=n, seed=0) for n in range(2)]
    assert sorted(name for client in clients for name in client.classes) == [
        *("ant", "bee", "cat", "dog")
    ]
    (note,) = notes_on({client.name: client.facts for client in clients})
    assert note == f"Images that {DEALT}; at client-0 (4), client-1 (4)."


def test_what_could_be_a_client_or_a_class_is_refused(ward: Path, tmp_path: Path):
    def clients_refused() -> str:
        with pytest.raises(DataError) as caught:
            client_names(DataConfig(data=f"folder:{tmp_path}"))
        return str(caught.value)

    write(tmp_path, {"emu": 2})
    assert "files in 'emu' and folders in 'ward'" in clients_refused()
    shutil.rmtree(tmp_path / "emu")
    ward.rename(tmp_path / "train")
    write(tmp_path / "lab", {"cat": 2})
    assert "holds 'train' like a data set, and 'lab' like clients" in clients_refused()


@pytest.mark.parametrize("parts", [("Training", "Testing"), ("Train", "val"), ("test", "val")])
def test_parts_of_a_data_set_are_no_clients(tmp_path: Path, parts: tuple[str, ...]):
    for part in parts:
        write(tmp_path / "set" / part, {"cat": 3, "dog": 3})
    with pytest.raises(DataError, match=f"holds .*{parts[1]}.*Rename the part to train on 'train'"):
        client_names(DataConfig(data=f"folder:{tmp_path / 'set'}"))
    (tmp_path / "set" / parts[0]).rename(tmp_path / "set/train")
    assert len(client_names(DataConfig(data=f"folder:{tmp_path / 'set'}"))) == 5  # they are dealt


def test_test_images_without_classes_are_refused_with_what_to_do(ward: Path):
    shutil.rmtree(ward / "test")
    write(ward, {"test": 2})
    assert "take the folder out: then test images are drawn" in refused(ward)


def test_a_partition_beyond_the_folders_is_refused(ward: Path):
    with pytest.raises(DataError, match=r"no client 1.*yields 1 clients"):
        load_client_data(DataConfig(data=f"folder:{ward.parent}"), GREY, partition=1, seed=0)


def test_a_folder_of_a_single_class_is_a_client(ward: Path):
    shutil.rmtree(ward / "train/dog")
    shutil.rmtree(ward / "test/dog")
    client = load_folder(ward, GREY, seed=0)
    assert client.classes == ("cat",)
    assert set(client.train.labels.tolist()) == set(client.test.labels.tolist()) == {0}


def test_faults_of_a_layout_are_refused_by_client_and_class(ward: Path, tmp_path: Path):
    def variant(name: str) -> Path:
        return Path(shutil.copytree(ward, tmp_path / name))

    folder = variant("empty-class")
    (folder / "train/emu").mkdir()
    assert "'empty-class': class 'emu' is empty" in refused(folder)

    folder = variant("only-tested")
    write(folder / "test", {"emu": 1})
    assert "'only-tested': class 'emu'" in refused(folder)

    folder = variant("no-split")
    shutil.rmtree(folder / "test")
    write(folder / "train", {"emu": 1})
    assert re.search(r"'no-split': class 'emu' .*emu/0\.png", refused(folder))

    folder = variant("no-train")
    shutil.rmtree(folder / "train")
    assert "has no folder 'train'; folders found: 'test'" in refused(folder)

    folder = variant("no-test-images")
    shutil.rmtree(folder / "test")
    (folder / "test").mkdir()
    assert re.search("'no-test-images': .*test holds no images", refused(folder))

    folder = variant("misspelt")
    (folder / "test").rename(folder / "Tests")
    assert re.search(r"'misspelt': .*a folder 'Tests'\. Rename it 'test'", refused(folder))

    folder = variant("nested")
    (folder / "train/cat/tabby").mkdir()
    assert "'nested': class 'cat' holds the folder" in refused(folder)

    folder = variant("loose")
    picture().save(folder / "train/loose.png")
    assert "loose.png lies beside the class folders" in refused(folder)

    folder = variant("train-is-a-class")
    shutil.rmtree(folder / "train")
    write(folder, {"train": 2})
    assert "holds images, but no class folders" in refused(folder)

    folder = variant("mixed")
    write(folder, {"cat": 2})
    shutil.rmtree(folder / "train")
    assert "files in 'cat' and folders in 'test'" in refused(folder)

    folder = write(tmp_path / "test-is-a-class", {"cat": 2, "test": 2})
    assert "'test', which holds images itself: is it a class, or a part?" in refused(folder)

    folder = write(tmp_path / "loose-beside", {"cat": 2, "dog": 2})
    picture().save(folder / "loose.png")
    assert "loose.png lies beside the class folders" in refused(folder)
