"""From a picture to the tensor a backbone expects.

Pictures are resized once, on loading, and kept as uint8; they are normalised batch by batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone was trained to see; taken from its own timm configuration."""

    image_size: int
    """Side of the square input, in pixels."""
    channels: int
    """1 (grey) or 3 (RGB); pictures of the other sort are converted."""
    mean: tuple[float, ...]
    """Mean a channel, of values in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation a channel, of values in [0, 1]."""
    interpolation: str = "bicubic"
    """Filter for resizing: nearest, bilinear, bicubic or lanczos."""
    crop_fraction: float = 1.0
    """Share of the shorter side that the central crop keeps, in (0, 1]."""

    def resize(self, picture: Image.Image) -> Tensor:
        """Resize the shorter side, crop the centre.

        Args:
            picture: Any PIL image.

        Returns:
            (channels, image_size, image_size), uint8.
        """
        picture = picture.convert("L" if self.channels == 1 else "RGB")
        scale = self.image_size / self.crop_fraction / min(picture.size)
        size = (
            max(self.image_size, round(picture.width * scale)),
            max(self.image_size, round(picture.height * scale)),
        )
        if size != picture.size:
            picture = picture.resize(size, RESAMPLING[self.interpolation])
        left = (picture.width - self.image_size) // 2
        top = (picture.height - self.image_size) // 2
        picture = picture.crop((left, top, left + self.image_size, top + self.image_size))
        pixels = np.array(picture, dtype=np.uint8).reshape(self.image_size, self.image_size, -1)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 images into the network's input.

        Args:
            images: (batch, channels, height, width), uint8.

        Returns:
            Same shape, float32, on the same device.
        """
        shape = (1, self.channels, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(shape)
        std = torch.tensor(self.std, device=images.device).view(shape)
        return (images.float() / 255 - mean) / std
