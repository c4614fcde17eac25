"""Images in one npz file: what is read, and what is refused by name."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.data import DataConfig
from fedcompo.data.client_data import ClientData, load_client_data
from fedcompo.data.sources import npz
from fedcompo.data.sources.npz import npz_catalogue
from fedcompo.errors import DataError
from fedcompo.report.pictures import JOINED, STAND_IN

GREY = Preprocessing(image_size=8, channels=1, mean=(0.5,), std=(0.5,))
RGB = Preprocessing(image_size=8, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)

LABELS = np.tile(np.arange(6, dtype=np.int16), 5)  # 6 classes, 5 images each
SPLIT = (np.arange(30) >= 24).astype(np.uint8)  # the last image of each class is for testing
NAMES = np.array(["ant", "bee", "cat", "dog", "emu", "fox"])
IMAGES = np.arange(30, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), dtype=np.uint8)


def whole(**changes: Any) -> dict[str, Any]:
    members = {"images": IMAGES, "labels": LABELS, "split": SPLIT, "names": NAMES} | changes
    return {name: member for name, member in members.items() if member is not None}


def packed(**changes: Any) -> dict[str, Any]:
    files = []
    for pixels in IMAGES:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=100)
        files.append(file.getvalue())
    jpeg = np.frombuffer(b"".join(files), dtype=np.uint8)
    offsets = np.cumsum([0, *map(len, files)])
    return whole(images=None, jpeg=jpeg, offsets=offsets) | changes


def load(
    path: Path, members: dict[str, Any], *, partition: int = 0, preprocessing: Preprocessing = GREY
) -> ClientData:
    np.savez(path / "data.npz", **members)
    config = DataConfig(data=f"npz:{path / 'data.npz'}", num_tasks=3)
    return load_client_data(config, preprocessing, partition=partition, seed=0)


def values(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("layout", [whole, packed])
def test_all_clients_together_hold_each_image_once_under_its_class(tmp_path: Path, layout: Any):
    train, test = [], []
    for partition in range(3):
        client = load(tmp_path, layout(), partition=partition)
        assert (client.name, len(client.classes)) == (f"client-{partition}", 2)
        for split in (client.train, client.test):
            named = [client.classes[label] for label in split.labels]
            assert named == [NAMES[value % 6] for value in values(split.images)]
        train += values(client.train.images)
        test += values(client.test.images)
    assert sorted(train) == list(range(24))
    assert sorted(test) == list(range(24, 30))


@pytest.mark.parametrize("tail", [(1,), (3,)])
def test_grey_and_colour_images_may_have_a_channel_axis(tmp_path: Path, tail: tuple[int]):
    images = np.broadcast_to(IMAGES[..., None], (*IMAGES.shape, *tail))
    expected = load(tmp_path, whole(), preprocessing=RGB)
    actual = load(tmp_path, whole(images=images), preprocessing=RGB)
    torch.testing.assert_close(actual.train.images, expected.train.images, rtol=0, atol=0)


def test_without_a_split_a_fifth_of_each_class_is_drawn(tmp_path: Path):
    client = load(tmp_path, whole(split=None))
    assert torch.bincount(client.test.labels).tolist() == [1, 1]
    assert torch.bincount(client.train.labels).tolist() == [4, 4]
    assert not set(values(client.train.images)) & set(values(client.test.images))


def test_without_names_a_class_is_named_by_its_label(tmp_path: Path):
    classes = [load(tmp_path, whole(names=None), partition=p).classes for p in range(3)]
    assert sorted(name for group in classes for name in group) == list("012345")


def test_names_are_brought_into_composed_unicode(tmp_path: Path):
    names = NAMES.copy().astype("U8")
    names[:] = [f"{name}e\u0301" for name in NAMES]
    classes = [load(tmp_path, whole(names=names), partition=p).classes for p in range(3)]
    assert sorted(c for group in classes for c in group) == [f"{name}\u00e9" for name in NAMES]


def test_each_member_is_read_once_and_only_own_images_are_resized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read: list[str] = []
    resized: list[int] = []
    get, resize = np.lib.npyio.NpzFile.__getitem__, Preprocessing.resize
    monkeypatch.setattr(
        np.lib.npyio.NpzFile, "__getitem__", lambda z, name: read.append(name) or get(z, name)
    )
    monkeypatch.setattr(
        Preprocessing, "resize", lambda self, image: resized.append(1) or resize(self, image)
    )
    load(tmp_path, packed())
    assert sorted(read) == ["labels", "names", "offsets", "split"]  # the pixels stay on disk
    assert len(resized) == 10


SHAPES = {"medmnist": ("{}_images", "{}_labels"), "keras": ("x_{}", "y_{}")}


def in_parts(layout: str, **parts: tuple[Any, Any]) -> dict[str, Any]:
    """Images and labels by part, as a library calls them."""
    return {
        name.format(part): member
        for part, pair in parts.items()
        for name, member in zip(SHAPES[layout], pair, strict=True)
    }


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("shape", ["(n,)", "(n, 1)", "one-hot"])
def test_a_pair_of_members_for_each_part_is_read(
    tmp_path: Path, save: Any, layout: str, shape: str
):
    shaped = {"(n,)": LABELS, "(n, 1)": LABELS[:, None], "one-hot": np.eye(6)[LABELS]}[shape]
    parts = {
        part: (IMAGES[rows, :, :, None], shaped[rows])
        for part, rows in (("train", slice(12)), ("val", slice(12, 24)), ("test", slice(24, 30)))
    }
    for without, train, test in (
        ("", [*range(24)], [*range(24, 30)]),
        ("val", [*range(12)], [*range(24, 30)]),
        ("test", [*range(12)], [*range(12, 24)]),
    ):
        kept = {part: pair for part, pair in parts.items() if part != without}
        save(tmp_path / "data.npz", **in_parts(layout, **kept))
        config = DataConfig(data=f"npz:{tmp_path / 'data.npz'}", num_tasks=1)
        client = load_client_data(config, GREY, partition=0, seed=0)
        assert sorted(values(client.train.images)) == train
        assert sorted(values(client.test.images)) == test
        assert (
            client.facts
            == {
                "": {JOINED: 12},
                "val": {},
                "test": {STAND_IN: 12},
            }[without]
        )


def test_pixels_of_an_uncompressed_file_stay_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(npz, "KEPT_BYTES", 100)
    for save, in_memory in ((np.savez, 0), (np.savez_compressed, IMAGES.nbytes)):
        save(tmp_path / "data.npz", **whole(images=np.asfortranarray(IMAGES.T).T))
        catalogue = npz_catalogue(tmp_path / "data.npz")
        assert catalogue.in_memory == in_memory
        np.testing.assert_array_equal(np.asarray(catalogue.open(7)), IMAGES[7])
        assert ("is compressed: 0 MB of pixels are held" in caplog.text) == bool(in_memory)
    np.savez(tmp_path / "data.npz", **whole(images=np.asfortranarray(IMAGES)))
    assert np.asarray(npz_catalogue(tmp_path / "data.npz").open(7)).tolist() == IMAGES[7].tolist()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            in_parts("medmnist", train=(IMAGES, np.ones((30, 6), int))),
            "`train_labels` .*Several la",
        ),
        (whole(labels=np.eye(6)[LABELS] * 2), "`labels` .*Several labels an image are not"),
        (in_parts("keras", train=(np.zeros((3, 9, 9, 9), np.uint8), LABELS[:3])), "no volumes"),
        ({"x_train": IMAGES}, "must hold `x_train` and `y_train`; members found: x_train"),
        (whole() | {"x_train": IMAGES, "y_train": LABELS}, "must hold `labels` and either"),
        (whole(labels=None), "must hold `labels`.*found: images, names, split"),
        (whole(images=None), "must hold .*either `images` or `jpeg`"),
        (packed(offsets=None) | {"images": IMAGES, "offsets": np.arange(3)}, "either"),
        (whole(images=IMAGES / 255), "`images` .*must be uint8 .*got float64"),
        (whole(images=IMAGES[:, 0]), r"`images` .*of shape \(30, 8\)"),
        (whole(images=np.zeros((30, 3, 8, 8), np.uint8)), r"channels last, .* \(30, 3, 8, 8\)"),
        (whole(images=IMAGES[:0], labels=LABELS[:0], split=None), "holds no images"),
        (whole(labels=LABELS[:7]), r"`labels` .*\(30,\), .*of shape \(7,\)"),
        (whole(split=SPLIT[:7]), r"`split` .*\(30,\), .*of shape \(7,\)"),
        (whole(labels=LABELS / 1), "`labels` .*integers.*got float64"),
        (whole(split=SPLIT + 1), r"`split` .*0 \(train\) or 1 \(test\), got 2"),
        (whole(names=NAMES[:4]), "`labels` .*reach 5, but `names` .*has 4"),
        (whole(labels=LABELS - 1), "`labels` .*negative for 5 of 30 images .*-1"),
        (whole(labels=LABELS - 2, names=None), "`labels` .*negative for 10 of 30 images .*-2"),
        (whole(names=np.arange(6)), "`names` .*must be text"),
        (whole(names=NAMES.astype(object)), "Python objects"),
        (whole(names=np.array([*NAMES[:5], "ant"])), "holds 'ant' twice"),
        (whole(names=np.array([*NAMES[:5], ""])), "is empty"),
        (whole(split=np.ones(30, np.uint8)), "'client-0': class .*no training images"),
        (packed(jpeg=np.zeros((2, 2), np.uint8)), "`jpeg` .*must be uint8 of shape"),
        (packed(offsets=np.zeros(31)), "`offsets` .*must be integers"),
        (packed(offsets=np.zeros(1, int)), "holds no images"),
        (packed(offsets=np.arange(31)[::-1]), "`offsets` .*must ascend"),
        (packed(offsets=np.arange(31) * 10**6), "`offsets` .*must ascend"),
        (packed(offsets=np.arange(31)), r"10 of 10 images.*image \d+ \(class '\w+'\)"),
    ],
)
def test_faults_are_refused_by_member(tmp_path: Path, members: dict[str, Any], message: str):
    with pytest.raises(DataError, match=f"(?s){message}") as caught:
        load(tmp_path, {name: member for name, member in members.items() if member is not None})
    assert "data.npz" in str(caught.value)


def damaged(path: Path, how: str) -> None:
    np.savez_compressed(path, **whole())
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "single array":
        np.save(path.with_suffix(".npy"), IMAGES)
        path.with_suffix(".npy").replace(path)
    elif how == "flipped bits":
        content[60:90] = b"\xff" * 30
        path.write_bytes(content)
    elif how == "no array":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("offsets", b"text")
    else:
        path.write_bytes({"empty": b"", "text": b"no npz", "cut": content[:-100]}[how])


@pytest.mark.parametrize(
    "how",
    ["missing", "folder", "single array", "flipped bits", "no array", "empty", "text", "cut"],
)
def test_what_is_no_npz_file_is_refused_by_name(tmp_path: Path, how: str):
    damaged(tmp_path / "data.npz", how)
    config = DataConfig(data=f"npz:{tmp_path / 'data.npz'}", num_tasks=3)
    with pytest.raises(DataError, match=r"data\.npz cannot be read as an npz file"):
        load_client_data(config, GREY, partition=0, seed=0)
