"""Turn a picture, or a text, into the tensor that a backbone expects.

Pictures are resized and cropped once, on loading, by timm's own transform, and kept as uint8; each
batch is normalised when it is used. The bits are those of timm's evaluation transform, but of large
JPEGs, see :mod:`fedcompo.backbone.reduction`.
The bytes of a text become one row of a single channel, cut or filled to a fixed length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fedcompo.backbone.reduction import reduce
from fedcompo.backbone.thin import RATIO, Thin
from fedcompo.config.choices import Modality
from fedcompo.errors import BackboneError
from fedcompo.storage.files import tuples


@dataclass(frozen=True)
class Preprocessing:
    """Input of a backbone, taken from its own timm configuration."""

    image_size: int | tuple[int, int]
    """Side of a square input in pixels, or height and width; of a text, its length in bytes."""
    channels: int
    """1 (grey) or 3 (RGB), to which pictures are converted; 1 for texts."""
    mean: tuple[float, ...]
    """Mean a channel, of values in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation a channel, of values in [0, 1]."""
    interpolation: str = "bicubic"
    """Filter for resizing: nearest, bilinear, bicubic, lanczos, box or hamming."""
    crop_fraction: float = 1.0
    """timm's ``crop_pct``: side of the crop over that of the resized picture."""
    modality: str = Modality.PICTURES
    """pictures or texts."""
    crop_mode: str = "center"
    """timm's: center, squash (without keeping proportions), or border (filled with the mean)."""
    rule: int = 2
    """How pixels are computed: 2 as timm does; 1 as in registries that do not say, see the code."""

    def __post_init__(self) -> None:
        """Check what a file, or a server, says."""
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        lengths, known = {len(self.mean), len(self.std)}, Image.Resampling.__members__
        holds = {
            f"the input size is {self.image_size}": min(sides) > 0,
            f"`channels` is {self.channels}; expected 1 (grey) or 3 (RGB)": self.channels in (1, 3),
            f"mean and std are {self.mean}, {self.std}; expected {self.channels} finite numbers, "
            "std > 0": lengths == {self.channels} and finite and min(self.std) > 0,
            f"the interpolation is {self.interpolation!r}; expected one of "
            f"{', '.join(known).lower()}": self.interpolation.upper() in known,
            f"crop_pct is {self.crop_fraction}; expected 0.1..10": 0.1 <= self.crop_fraction <= 10,
            f"pixels go by rule {self.rule}; expected 1 or 2": self.rule in (1, 2),
        }
        if wrong := [text for text, is_so in holds.items() if not is_so]:
            raise BackboneError(f"The input of a backbone cannot be used: {wrong[0]}.")

    @classmethod
    def of_timm(
        cls, cfg: Mapping[str, Any], model_args: Mapping[str, Any], modality: str
    ) -> Preprocessing:
        """Read timm's configuration of weights as timm does; size and channels of the model win.

        Raises:
            BackboneError: If it cannot be used.
        """
        from timm.data import resolve_data_config

        try:
            seen = resolve_data_config(pretrained_cfg={"input_size": (3, 224, 224), **cfg})
            channels, *sides = seen["input_size"]
            wanted = model_args.get("in_chans", channels)
            mean, std = tuple(seen["mean"]), tuple(seen["std"])
            if wanted != len(mean):  # another number of channels: the average one for each
                mean, std = (sum(mean) / len(mean),) * wanted, (sum(std) / len(std),) * wanted
            size = model_args.get("img_size", sides)
            height, width = (size, size) if isinstance(size, int) else size
            return cls(
                width if height == width or modality == Modality.TEXTS else (height, width),
                wanted,
                mean,
                std,
                seen["interpolation"],
                seen["crop_pct"],
                modality,
                seen["crop_mode"],
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise BackboneError(
                f"The backbone's configuration does not describe an input ({error}): {cfg}."
            ) from error

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Rebuild from JSON; a file without a rule is of a version that had the first.

        Raises:
            BackboneError: If it cannot be used.
        """
        try:
            return cls(**{"rule": 1, **tuples(values)})
        except (AttributeError, TypeError, ValueError) as error:
            raise BackboneError(f"{values!r} does not describe an input: {error}.") from error

    def instead_of(self, own: Preprocessing) -> Preprocessing:
        """Return this, for a model that was loaded with its own.

        Raises:
            BackboneError: If the model reads examples of another shape or kind.
        """
        if (self.shape, self.modality) != (own.shape, own.modality):
            raise BackboneError(
                f"The registry or the server reads {self.modality} of {self.shape}, this backbone "
                f"{own.modality} of {own.shape}. Use the same `image-size` and `channels`."
            )
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one example: (channels, height, width); of a text (1, 1, length)."""
        if isinstance(self.image_size, tuple):
            return self.channels, *self.image_size
        height = 1 if self.modality == Modality.TEXTS else self.image_size
        return self.channels, height, self.image_size

    def reduce(self, picture: Image.Image) -> None:
        """Let a large JPEG that is not read yet be decoded at a smaller scale."""
        if self.rule != 1:  # whose pixels stay as they were
            reduce(picture, max(self.shape[1:]) / self.crop_fraction)

    def prepare(self, example: Image.Image | bytes) -> Tensor:
        """Convert an example to its shape, uint8: resize a picture, cut or fill a text."""
        if not isinstance(example, bytes):
            return self.resize(example)
        length = self.shape[-1]
        filled = bytearray(example[:length].ljust(length, b"\0"))
        return torch.frombuffer(filled, dtype=torch.uint8).reshape(self.shape)

    def resize(self, picture: Image.Image) -> Tensor:
        """Convert a picture to the channels, and to the size as timm does.

        Args:
            picture: Any PIL image.

        Returns:
            (channels, height, width), uint8.
        """
        picture = picture.convert("L" if self.channels == 1 else "RGB")
        if self.rule == 1:
            return self._resize_1(picture)
        thin = max(picture.size) > RATIO * min(picture.size)
        if thin and self.crop_fraction <= 1 and self.crop_mode != "border":  # nothing is padded
            picture = Thin(picture)
        return _transform(self)(picture).contiguous()

    def _resize_1(self, picture: Image.Image) -> Tensor:
        """Resize and crop by the first rule: every mode is center, and roundings are not timm's."""
        from torchvision.transforms.functional import pil_to_tensor

        height, width = self.shape[1:]
        scale = width / self.crop_fraction / min(picture.size)
        size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
        if size != picture.size:
            picture = picture.resize(size, Image.Resampling[self.interpolation.upper()])
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        cropped = picture.crop((left, top, left + width, top + height))
        pixels: Tensor = pil_to_tensor(cropped)
        return pixels.contiguous()

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 images, or texts, into the network's input.

        Args:
            images: (batch, channels, height, width), uint8.

        Returns:
            Same shape, float32, on the same device.
        """

        def column(*values: float) -> Tensor:
            return torch.tensor(values, device=images.device).view(1, -1, 1, 1)

        # A divisor on the device: by a number, a GPU multiplies with the rounded reciprocal.
        scaled = images.to(torch.float32, copy=True).div_(column(255))
        return scaled.sub_(column(*self.mean)).div_(column(*self.std))


@lru_cache(maxsize=4)
def _transform(seen: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """Make timm's evaluation transform up to bytes."""
    from timm.data import create_transform

    transform: Callable[[Image.Image], Tensor] = create_transform(
        input_size=seen.shape,
        interpolation=seen.interpolation,
        crop_pct=seen.crop_fraction,
        crop_mode=seen.crop_mode,
        mean=seen.mean,
        std=seen.std,
        normalize=False,
    )
    return transform
