"""Turn a picture, or a text, into the tensor that a backbone expects.

Pictures are resized once, on loading, and kept as uint8; each batch is normalised when it is used.
The bytes of a text become one row of a single channel, cut or filled to a fixed length.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

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


class Modality(StrEnum):
    """Kind of the examples that a source of data holds and a backbone reads."""

    PICTURES = "pictures"
    TEXTS = "texts"


@dataclass(frozen=True)
class Preprocessing:
    """Input of a backbone, taken from its own timm configuration."""

    image_size: int
    """Side of the square input, in pixels; of a text, its length in bytes."""
    channels: int
    """1 (grey) or 3 (RGB), to which pictures are converted; 1 for texts."""
    mean: tuple[float, ...]
    """Mean a channel, of values in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation a channel, of values in [0, 1]."""
    interpolation: str = "bicubic"
    """Filter for resizing: nearest, bilinear, bicubic or lanczos."""
    crop_fraction: float = 1.0
    """Share of the shorter side that the central crop keeps, in (0, 1]."""
    modality: str = Modality.PICTURES
    """pictures or texts."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one example: (channels, image_size, image_size); of a text (1, 1, length)."""
        height = 1 if self.modality == Modality.TEXTS else self.image_size
        return self.channels, height, self.image_size

    def prepare(self, example: Image.Image | bytes) -> Tensor:
        """Convert an example to its shape, uint8: resize a picture, cut or fill a text."""
        return self.fill(example) if isinstance(example, bytes) else self.resize(example)

    def fill(self, text: bytes) -> Tensor:
        """Cut a text to the fixed length, or fill it with zeros.

        Args:
            text: Its bytes, at least one.

        Returns:
            (1, 1, length), uint8.
        """
        filled = bytearray(text[: self.image_size].ljust(self.image_size, b"\0"))
        return torch.frombuffer(filled, dtype=torch.uint8).reshape(self.shape)

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
        """Turn uint8 images, or texts, into the network's input.

        Args:
            images: (batch, channels, height, width), uint8.

        Returns:
            Same shape, float32, on the same device.
        """
        shape = (1, self.channels, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(shape)
        std = torch.tensor(self.std, device=images.device).view(shape)
        return (images.float() / 255 - mean) / std
