"""Random views of training images, drawn on the CPU so that a seed means the same everywhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fedcompo.config.choices import Augmentation
from fedcompo.errors import ConfigError

SHIFT = 0.075
"""shift: largest translation, as a share of the image's side."""
SMALLEST_CROP = 0.7
"""crop, crop-flip: side of the smallest crop, as a share of the image's."""


def augment(images: Tensor, kind: Augmentation, generator: torch.Generator) -> Tensor:
    """Draw a random view of each image of a batch.

    Args:
        images: (batch, channels, height, width), uint8.
        kind: none; shift (by whole pixels, the border is repeated; for characters, which a mirror
            would change); crop (at random, of the same proportions, back to size); crop-flip
            (mirrored half the time, too); auto (crop; of texts, none).
        generator: Source of the draws, on the CPU.

    Returns:
        Same shape, uint8, on the same device.

    Raises:
        ConfigError: If the images are texts.
    """
    are_texts = images.shape[2] == 1 < images.shape[3]  # a single row
    if kind is Augmentation.NONE or (kind is Augmentation.AUTO and are_texts):
        return images
    if are_texts:
        raise ConfigError.public(
            f"`augmentation` is {kind}, which moves the pixels of images, but these are texts. Set "
            "it to none."
        )
    view = _shifted if kind is Augmentation.SHIFT else _cropped
    views = [view(image, generator) for image in images]
    if kind is Augmentation.CROP_FLIP:
        views = [view.flip(-1) if _draw(0, 1, generator) else view for view in views]
    return torch.stack(views)


def _shifted(image: Tensor, generator: torch.Generator) -> Tensor:
    height, width = image.shape[-2:]
    room = max(1, round(SHIFT * width))
    top, left = (_draw(0, 2 * room, generator) for _ in range(2))
    view: Tensor = F.crop(F.pad(image, [room], padding_mode="edge"), top, left, height, width)
    return view


def _cropped(image: Tensor, generator: torch.Generator) -> Tensor:
    height, width = image.shape[-2:]
    wide = _draw(round(SMALLEST_CROP * width), width, generator)
    high = round(wide * height / width)
    top, left = (_draw(0, room, generator) for room in (height - high, width - wide))
    view: Tensor = F.resized_crop(image, top, left, high, wide, [height, width], antialias=True)
    return view


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    """Draw a whole number, both ends included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
