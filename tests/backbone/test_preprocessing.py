"""From pictures to uint8 tensors, and from those to the network's input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import pixels
from PIL import Image

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.choices import Modality

RGB = Preprocessing(image_size=8, channels=3, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
GREY = Preprocessing(image_size=8, channels=1, mean=(0.5,), std=(0.25,))
TEXTS = Preprocessing(8, 1, mean=(0.0,), std=(1 / 255,), modality=Modality.TEXTS)


def picture(width: int, height: int, mode: str = "RGB", *, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "LA"])
@pytest.mark.parametrize("size", [(8, 8), (5, 9), (40, 13), (1, 30), (300, 8)])
@pytest.mark.parametrize("wanted", [RGB, GREY, replace(RGB, crop_fraction=0.875)])
def test_any_picture_becomes_a_square_of_the_wanted_size_and_channels(wanted, size, mode):
    image = wanted.resize(picture(*size, mode))
    assert image.shape == (wanted.channels, 8, 8)
    assert image.dtype == torch.uint8
    assert image.is_contiguous()


def test_a_picture_of_the_wanted_size_is_taken_as_it_is():
    given = picture(8, 8)
    expected = torch.from_numpy(np.array(given)).permute(2, 0, 1)
    assert torch.equal(RGB.resize(given), expected)


def test_a_grey_picture_has_three_equal_channels_where_three_are_wanted():
    given = picture(8, 8, "L")
    image = RGB.resize(given)
    assert all(torch.equal(channel, torch.from_numpy(np.array(given))) for channel in image)


def test_a_colour_picture_becomes_its_luminance_where_one_channel_is_wanted():
    given = picture(8, 8)
    r, g, b = np.array(given).astype(float).transpose(2, 0, 1)
    luminance = torch.from_numpy(0.299 * r + 0.587 * g + 0.114 * b)
    assert (GREY.resize(given)[0] - luminance).abs().max() <= 1


def test_the_shorter_side_is_resized_and_the_centre_cropped():
    given = picture(32, 16)
    expected = np.array(given.resize((16, 8), Image.Resampling.BICUBIC))[:, 4:12]
    assert torch.equal(RGB.resize(given), torch.from_numpy(expected).permute(2, 0, 1))
    upright = picture(16, 32)
    expected = np.array(upright.resize((8, 16), Image.Resampling.BICUBIC))[4:12]
    assert torch.equal(RGB.resize(upright), torch.from_numpy(expected).permute(2, 0, 1))


def test_a_crop_fraction_keeps_that_share_of_the_shorter_side():
    given = picture(40, 40)
    half = replace(RGB, crop_fraction=0.5)
    expected = np.array(given.resize((16, 16), Image.Resampling.BICUBIC))[4:12, 4:12]
    assert torch.equal(half.resize(given), torch.from_numpy(expected).permute(2, 0, 1))


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_pictures_are_resized_with_the_filter_that_is_named(name):
    given = picture(24, 24)
    expected = np.array(given.resize((8, 8), Image.Resampling[name.upper()]))
    image = replace(RGB, interpolation=name).resize(given)
    assert torch.equal(image, torch.from_numpy(expected).permute(2, 0, 1))


@pytest.mark.parametrize("wanted", [RGB, GREY])
def test_normalising_subtracts_the_mean_and_divides_by_the_deviation(wanted):
    images = pixels(2, wanted.channels, 8)
    found = wanted.normalise(images)
    assert found.dtype == torch.float32
    for c in range(wanted.channels):
        expected = (images[:, c].double() / 255 - wanted.mean[c]) / wanted.std[c]
        torch.testing.assert_close(found[:, c].double(), expected, rtol=1e-5, atol=1e-5)


def test_normalising_leaves_the_images_alone():
    images = pixels(2, 3, 8)
    before = images.clone()
    RGB.normalise(images)
    assert torch.equal(images, before)


def test_a_text_is_cut_or_filled_to_its_length():
    given = "naïve".encode()
    assert TEXTS.prepare(given).tolist() == [[[*given, 0, 0]]]
    assert TEXTS.prepare(given * 2).tolist() == [[list((given * 2)[:8])]]
    assert TEXTS.prepare(given).shape == TEXTS.shape == (1, 1, 8)


@pytest.mark.parametrize("wanted", [RGB, GREY])
def test_a_picture_is_prepared_by_resizing_it(wanted):
    given = picture(40, 13)
    assert torch.equal(wanted.prepare(given), wanted.resize(given))
    assert wanted.prepare(given).shape == wanted.shape


def test_normalising_leaves_every_byte_of_a_text_what_it_is():
    texts = torch.arange(256, dtype=torch.uint8).reshape(32, 1, 1, 8)
    torch.testing.assert_close(TEXTS.normalise(texts), texts.float(), rtol=0, atol=1e-3)
