"""Images of a client, in memory or on disk, whose rows are read when they are asked for.

Nobody makes one tensor of all images: 100,000 of them, of 224 pixels, take 15 GB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Images(Protocol):
    """Rows of uint8: a tensor is one; others read rows from a file."""

    @property
    def shape(self) -> torch.Size:
        """(count, channels, height, width); of texts (count, 1, 1, length)."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, which: Any, /) -> Tensor:
        """Read rows by a slice, a tensor of indices or one of bools."""


@dataclass(frozen=True)
class Rows:
    """Some images of several sets, in an order of their own."""

    parts: tuple[Images, ...]
    """Sets of images of one shape."""
    where: Tensor
    """(count,) place of each image in the sets, one after the other; int64."""

    @property
    def shape(self) -> torch.Size:
        """(count, channels, height, width)."""
        return torch.Size((len(self.where), *self.parts[0].shape[1:]))

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, which: Any) -> Tensor:
        places = self.where[which]
        if len(self.parts) == 1 and places.ndim:
            return self.parts[0][places]
        rows = torch.empty(*places.shape, *self.shape[1:], dtype=torch.uint8)
        first = 0
        for part in self.parts:
            inside = (places >= first) & (places < first + len(part))
            if inside.any():
                rows[inside] = part[places[inside] - first]
            first += len(part)
        return rows


def part_of(images: Images, which: Any) -> Images:
    """Choose images by a slice, indices or bools; of those on disk nothing is read yet."""
    if isinstance(images, Tensor):
        return images[which]
    whole = images if isinstance(images, Rows) else joined(images)
    return Rows(whole.parts, whole.where[which])


def joined(*images: Images) -> Rows:
    """Put sets of images one after the other; nothing is read or copied."""
    return Rows(images, torch.arange(sum(map(len, images))))


def batches(images: Images, size: int) -> Iterator[Tensor]:
    """Read images in order, ``size`` at a time; of none, one batch of none."""
    for first in range(0, max(1, len(images)), size):
        yield images[first : first + size]
