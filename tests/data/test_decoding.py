"""Pictures as they come: scaled by one range, refused by file and kind, and what is odd is said."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.data import decoding
from fedcompo.data.catalogue import Catalogue
from fedcompo.data.client_data import ClientData, load_folder
from fedcompo.data.decoding import decode
from fedcompo.errors import DataError
from fedcompo.report.pictures import REPEATED, UNLABELLED

GREY = Preprocessing(image_size=4, channels=1, mean=(0.5,), std=(0.5,), interpolation="nearest")
RGB = Preprocessing(
    image_size=4, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="nearest"
)
STEPS = np.linspace(0, 1, 16).reshape(4, 4)
"""Grey levels in [0, 1]."""


@pytest.fixture
def ward(tmp_path: Path) -> Path:
    """A client with the classes "cat", still empty, and "dog", of three grey pictures."""
    for place, value in (("train/dog/0", 10), ("train/dog/1", 20), ("test/dog/2", 30)):
        file = tmp_path / "ward" / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), value).save(file)
    (tmp_path / "ward/train/cat").mkdir()
    return tmp_path / "ward"


def cats(client: ClientData) -> np.ndarray:
    """The first channel of the training images of the class "cat"."""
    return client.train.images[client.train.labels == 0][:, 0].numpy()


def put(ward: Path, *pixels: Any, kind: str = "png", part: str = "train") -> Path:
    """Write pictures of the class "cat", "0.<kind>" and so on."""
    folder = ward / part / "cat"
    folder.mkdir(exist_ok=True)
    for number, own in enumerate(pixels):
        Image.fromarray(np.asarray(own)).save(folder / f"{number}.{kind}")
    return folder / f"0.{kind}"


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize(("kind", "dtype"), [("png", np.uint16), ("tif", np.int32)])
def test_what_is_used_of_16_or_32_bits_keeps_its_levels(
    ward: Path, bits: int, kind: str, dtype: type, caplog: pytest.LogCaptureFixture
):
    top = 2**bits - 1
    put(ward, (STEPS * top).round().astype(dtype), kind=kind)
    client = load_folder(ward, GREY, seed=0)
    np.testing.assert_allclose(cats(client)[0], STEPS * 255, atol=0.5 + 255 / top)
    name = "16-bit integers" if kind == "png" else "32-bit integers"
    assert f"1 of 4 images in {ward} have {name}: 0..{top} becomes 0..255." in caplog.text
    assert client.facts == {name: top}


@pytest.mark.parametrize("top", [1, 255, 4095, 65535])
def test_floating_point_pixels_are_scaled_too(ward: Path, top: int):
    put(ward, (STEPS * top).astype(np.float32), kind="tif")
    client = load_folder(ward, GREY, seed=0)
    np.testing.assert_allclose(cats(client)[0], STEPS * 255, atol=0.51)
    assert client.facts == {"floating-point numbers": top}


def test_one_range_holds_for_all_pictures_of_a_kind_in_training_and_test(ward: Path):
    dark, bright = (np.full((4, 4), value, np.uint16) for value in (100, 4000))
    put(ward, dark, bright)
    put(ward, np.full((4, 4), 200, np.int32), kind="tif")  # another kind, another range
    put(ward, dark, part="test")
    client = load_folder(ward, GREY, seed=0)
    assert cats(client)[:, 0, 0].tolist() == [6, 200, 249]  # 0.png, 0.tif, 1.png
    assert client.test.images[0, 0, 0, 0] == 6
    put(ward, np.full((4, 4), 40_000, np.uint16), part="test")
    assert cats(load_folder(ward, GREY, seed=0))[:, 0, 0].tolist() == [0, 200, 16]


def test_16_bits_of_the_full_range_keep_the_bits_they_had(ward: Path):
    pixels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    put(ward, pixels)
    wide = Preprocessing(image_size=256, channels=1, mean=(0.5,), std=(0.5,))
    expected = np.rint(pixels / 257).astype(np.uint8)
    np.testing.assert_array_equal(cats(load_folder(ward, wide, seed=0))[0], expected)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.full((4, 4), 70_000, np.int32), r"0\.tif .*mode I, .*its pixels span 70000\.\.70000"),
        (np.full((4, 4), -1, np.int32), r"0\.tif .*span -1\.\.-1"),
        (np.full((4, 4), -0.5, np.float32), r"0\.tif .*mode F, .*span -0\.5\.\.-0\.5"),
        (np.full((4, 4), np.nan, np.float32), r"0\.tif .*span nan"),
        (np.full((4, 4), np.inf, np.float32), r"0\.tif .*span inf"),
        (np.full((4, 4), 1.5, np.float32), r"1 of 4 images .*up to 1\.5, neither 0\.\.1 nor"),
    ],
)
def test_pixels_that_cannot_be_scaled_are_refused(ward: Path, pixels: np.ndarray, reason: str):
    put(ward, pixels, kind="tif")
    with pytest.raises(DataError, match=f"(?s)Client 'ward': .*{reason}"):
        load_folder(ward, GREY, seed=0)


def save_deep(file: Path, pixels: np.ndarray) -> None:
    """Write a PNG of 16 bits a colour, which Pillow cannot; pixels (height, width, 3)."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks.items()
        )
    )


def test_16_bit_colours_are_used_or_refused_where_most_would_be_lost(
    ward: Path, caplog: pytest.LogCaptureFixture
):
    colours = np.repeat(STEPS[..., None], 3, axis=2)
    save_deep(ward / "train/cat/0.png", (colours * 65535).round())
    client = load_folder(ward, RGB, seed=0)
    np.testing.assert_allclose(cats(client)[0], STEPS * 255, atol=0.51)
    assert "1 of 4 images" in caplog.text
    assert "have 16-bit colours: 0..65535 becomes 0..255" in caplog.text
    save_deep(ward / "train/cat/0.png", (colours * 4095).round())
    with pytest.raises(DataError, match="16-bit colours of at most 14 bits"):
        load_folder(ward, RGB, seed=0)


def animated(file: Path) -> None:
    frames = [Image.fromarray((STEPS * value).astype(np.uint8)) for value in (240, 120)]
    frames[0].save(file, save_all=True, append_images=frames[1:])


def turned(file: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((STEPS * 255).astype(np.uint8)).save(file, exif=exif)


def see_through(mode: str) -> Callable[[Path], None]:
    def save(file: Path) -> None:
        grey = Image.fromarray((STEPS * 240).round().astype(np.uint8))
        if "A" in mode:
            grey = grey.convert(mode)
            grey.putalpha(Image.new("L", (4, 4), 254))
            grey.save(file)
        else:
            grey.convert(mode).save(file, transparency={"P": b"\0\x80", "L": 16}[mode])

    return save


def white_is_zero(file: Path) -> None:
    Image.fromarray((STEPS * 65535).astype(np.uint16)).save(file, tiffinfo={262: 0})


@pytest.mark.parametrize(
    ("name", "write", "word"),
    [
        ("0.gif", animated, "hold several pages or frames"),
        ("0.tif", animated, "hold several pages or frames"),
        ("0.png", animated, "hold several pages or frames"),
        ("0.jpg", turned, "are turned upright"),
        ("0.tif", turned, "are turned upright"),
        ("0.png", turned, "are turned upright"),
        ("0.png", see_through("LA"), "are partly transparent"),
        ("0.png", see_through("RGBA"), "are partly transparent"),
        ("0.png", see_through("P"), "are partly transparent"),
        ("0.png", see_through("L"), "are partly transparent"),
        ("0.tif", white_is_zero, "say that 0 is white"),
    ],
)
def test_what_is_odd_is_said_once_with_how_many(
    ward: Path, name: str, write: Any, word: str, caplog: pytest.LogCaptureFixture
):
    write(ward / f"train/cat/{name}")
    expected = {"are turned": np.rot90(STEPS, -1)}.get(word[:10], STEPS)
    for preprocessing in (GREY, RGB):
        caplog.clear()
        client = load_folder(ward, preprocessing, seed=0)
        assert caplog.text.count(f"Client 'ward': 1 of 4 images in {ward} {word}") == 1
        np.testing.assert_allclose(cats(client)[0], expected * 255, atol=20)  # STEPS of 240, JPEG


def test_opaque_upright_pictures_are_not_spoken_of(ward: Path, caplog: pytest.LogCaptureFixture):
    grey = Image.fromarray((STEPS * 240).astype(np.uint8))
    for mode, name in (("RGBA", "a.png"), ("CMYK", "c.jpg"), ("1", "1.png"), ("P", "p.gif")):
        grey.convert(mode).save(ward / "train/cat" / name)
    Image.new("LAB", (4, 4)).save(ward / "train/cat/lab.tif")
    assert load_folder(ward, RGB, seed=0).facts == {}
    assert caplog.text == ""


def start(content: bytes) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(content + b"\0" * 200)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda file: file.write_bytes(b""), "it is empty (0 bytes)"),
        (start(b"\0" * 128 + b"DICM"), "DICOM"),
        (start(b"\0\0\0\x18ftypheic"), "HEIF"),
        (start(b"version https://git-lfs.github.com/spec/v1"), "git-lfs"),
        (start(b"<!DOCTYPE html>"), "web page"),
        (start(b"PK\x03\x04"), "zip archive"),
        (start(b"\x1f\x8b\x08"), "NIfTI"),
        (start(b"%PDF-1.7"), "PDF"),
        (start(b"II*\0"), "its pixels are of a kind that Pillow cannot read"),
        (start(b"anything"), "Pillow knows no such picture"),
    ],
)
def test_a_file_that_is_no_picture_is_refused_by_name_kind_and_remedy(
    ward: Path, write: Any, reason: str
):
    write(ward / "train/cat/x.png")
    with pytest.raises(DataError) as caught:
        load_folder(ward, GREY, seed=0)
    text = str(caught.value)
    assert "Client 'ward': 1 of 4 images" in text
    assert "train/cat/x.png (class 'cat'): " in text
    assert reason in text
    assert "take them out" in text


def test_a_picture_that_cannot_be_converted_is_refused_by_name(ward: Path):
    Image.new("LAB", (4, 4)).save(ward / "train/cat/x.tif")
    with pytest.raises(DataError, match=r"x\.tif \(class 'cat'\): TIFF, mode LAB, size \(4, 4\): "):
        load_folder(ward, GREY, seed=0)


def test_test_images_that_are_training_images_too_are_counted(
    ward: Path, caplog: pytest.LogCaptureFixture
):
    first, second = (STEPS * 255).astype(np.uint8), (STEPS * 200).astype(np.uint8)
    put(ward, first, second)
    put(ward, second, first, second, first[::-1], part="test")
    client = load_folder(ward, GREY, seed=0)
    assert client.facts == {REPEATED: 3}
    assert f"3 of 5 test images in {ward} are training images too" in caplog.text
    assert [len(part.labels) for part in (client.train, client.test)] == [4, 5]  # none is dropped


@pytest.mark.parametrize("name", ["-1", "NaN"])
def test_a_class_that_stands_for_no_label_is_said(
    ward: Path, name: str, caplog: pytest.LogCaptureFixture
):
    (ward / "train/cat").rename(ward / "train" / name)
    Image.new("L", (4, 4), 99).save(ward / "train" / name / "0.png")
    client = load_folder(ward, GREY, seed=0)
    assert client.classes == (name, "dog")
    assert client.facts == {UNLABELLED: 1}
    assert f"1 of 4 images in {ward} {UNLABELLED}" in caplog.text
    assert torch.bincount(client.train.labels).tolist() == [1, 2]


@pytest.mark.parametrize(("quick", "times"), [(0.0, 1), (60.0, 2)])
def test_few_images_that_take_long_are_decoded_once(tmp_path, monkeypatch, quick, times):
    monkeypatch.setattr(decoding, "QUICK", quick)
    opened = []
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)

    def open_picture(index: int) -> Image.Image:
        opened.append(index)
        return Image.fromarray(pixels + index)

    catalogue = Catalogue("pictures", np.array(["a"] * 4), None, open_picture, version="1")
    parts = [np.array([0, 1, 2])], [np.array([3])]
    both = []
    for _ in range(2):
        both.append(decode(catalogue, *parts, GREY, client="c", cache=tmp_path / "images"))
    assert len(opened) == 4 * times
    assert len(list(tmp_path.rglob("*.rows"))) == 2 - times
    (first, test, _), (again, held, _) = both
    assert torch.equal(first[:], again[:])
    assert torch.equal(test[:], held[:])
