"""Random views of training images, drawn on the CPU so that a seed means the same everywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcompo.config.choices import Augmentation
from fedcompo.errors import ConfigError

SHIFT = 0.15
"""shift: largest translation, as a share of half the image's side."""
SMALLEST_CROP = 0.7
"""crop-flip: side of the smallest crop, as a share of the image's."""


def augment(images: Tensor, kind: Augmentation, generator: torch.Generator) -> Tensor:
    """Draw a random view of each image of a batch.

    Args:
        images: (batch, channels, height, width), uint8.
        kind: none; shift (the border is repeated; for characters, which a mirror would change);
            crop-flip (a random crop, mirrored half the time).
        generator: Source of the draws, on the CPU.

    Returns:
        Same shape, uint8, on the same device.

    Raises:
        ConfigError: If the images are texts.
    """
    if kind is Augmentation.NONE:
        return images
    if images.shape[2] == 1 < images.shape[3]:  # a single row is a text; images are square
        raise ConfigError(
            f"`augmentation` is {kind}, which moves the pixels of images, but these are texts. Set "
            "it to none."
        )
    batch = len(images)
    affine = torch.zeros(batch, 2, 3)
    if kind is Augmentation.SHIFT:
        affine[:, 0, 0] = affine[:, 1, 1] = 1
        affine[:, :, 2] = SHIFT * (2 * torch.rand(batch, 2, generator=generator) - 1)
    else:
        side = SMALLEST_CROP + (1 - SMALLEST_CROP) * torch.rand(batch, generator=generator)
        mirror = torch.randint(0, 2, (batch,), generator=generator) * 2 - 1
        affine[:, 0, 0], affine[:, 1, 1] = side * mirror, side
        room = (1 - side).unsqueeze(1)
        affine[:, :, 2] = room * (2 * torch.rand(batch, 2, generator=generator) - 1)
    grid = F.affine_grid(affine.to(images.device), list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return moved.round().clamp(0, 255).to(torch.uint8)
