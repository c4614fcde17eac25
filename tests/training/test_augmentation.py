"""Random views: same size and type, drawn by the generator alone, and no more than they say."""

from __future__ import annotations

import pytest
import torch
from builders import pixels, rng

from fedcompo.config.choices import Augmentation
from fedcompo.errors import ConfigError
from fedcompo.training.augmentation import SHIFT, SMALLEST_CROP, augment

RANDOM = [Augmentation.SHIFT, Augmentation.CROP, Augmentation.CROP_FLIP]


@pytest.fixture(params=[8, 5])
def images(request) -> torch.Tensor:
    """Square, and upright."""
    return pixels(6, 3, 8)[..., : request.param].contiguous()


def gradient(count: int, side: int) -> torch.Tensor:
    """Images whose brightness grows from left to right."""
    return torch.linspace(40, 200, side).round().expand(count, 1, side, side).to(torch.uint8)


def test_none_returns_the_very_images(images):
    generator = rng(0)
    before = generator.get_state()
    assert augment(images, Augmentation.NONE, generator) is images
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("kind", RANDOM)
def test_views_have_the_size_and_type_of_the_images_and_leave_them_alone(images, kind):
    before = images.clone()
    views = augment(images, kind, rng(0))
    assert views.shape == images.shape
    assert views.dtype == torch.uint8
    assert torch.equal(images, before)
    assert not torch.equal(views, images)


@pytest.mark.parametrize("kind", RANDOM)
def test_the_same_generator_gives_the_same_views_and_another_others(images, kind):
    torch.manual_seed(1)
    first = augment(images, kind, rng(3))
    state = torch.random.get_rng_state()
    assert torch.equal(augment(images, kind, rng(3)), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(augment(images, kind, rng(4)), first)


@pytest.mark.parametrize("kind", RANDOM)
def test_each_image_of_a_batch_gets_a_view_of_its_own(kind):
    same = pixels(1, 1, 96).expand(5, -1, -1, -1)
    views = augment(same, kind, rng(0))
    assert len({view.numpy().tobytes() for view in views}) == 5


@pytest.mark.parametrize("kind", RANDOM)
def test_a_view_of_one_colour_has_that_colour_up_to_the_border(kind):
    flat = torch.full((4, 3, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(augment(flat, kind, rng(0)), flat)


def test_a_shift_moves_by_at_most_its_share_and_never_mirrors():
    side = 32
    views = augment(gradient(64, side), Augmentation.SHIFT, rng(0)).double()
    step = 160 / (side - 1)  # brightness a pixel
    centre = views[:, 0, side // 2, side // 2 - 1 : side // 2 + 1].mean(1)
    moved = (centre - 120) / step
    assert moved.abs().max() <= round(SHIFT * side) + 0.1  # brightness is rounded
    assert moved.max() > 1
    assert moved.min() < -1
    assert (views[:, 0, side // 2].diff() >= 0).all()


@pytest.mark.parametrize("kind", [Augmentation.CROP, Augmentation.CROP_FLIP])
def test_a_crop_is_mirrored_half_the_time_or_never_and_never_smaller_than_it_says(kind):
    side, count = 32, 400
    views = augment(gradient(count, side), kind, rng(0)).double()
    row = views[:, 0, side // 2]
    span = row[:, -1] - row[:, 0]
    mirrored = (span < 0).double().mean()
    assert mirrored == 0 or (kind is Augmentation.CROP_FLIP and 0.4 < mirrored < 0.6)
    share = span.abs() / 160
    assert share.min() >= SMALLEST_CROP - 2 / side
    assert share.max() <= 1
    assert share.min() < SMALLEST_CROP + 0.05


@pytest.mark.parametrize("kind", RANDOM)
def test_texts_are_not_moved_but_refused(kind):
    texts = torch.full((2, 1, 1, 16), 65, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=f"`augmentation` is {kind}, .*these are texts"):
        augment(texts, kind, rng(0))
    assert augment(texts, Augmentation.NONE, rng(0)) is texts
    assert augment(texts, Augmentation.AUTO, rng(0)) is texts


def test_auto_crops_pictures(images):
    expected = augment(images, Augmentation.CROP, rng(0))
    assert torch.equal(augment(images, Augmentation.AUTO, rng(0)), expected)
