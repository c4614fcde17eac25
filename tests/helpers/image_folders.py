"""Folders of small pictures, as a client has them."""

from __future__ import annotations

from pathlib import Path

from builders import left_or_right
from PIL import Image


def write_images(folder: Path, classes: tuple[str, str] = ("cat", "dog"), count: int = 24) -> Path:
    """Grey pictures of 8x8, bright on one side, in ``train/<class>`` and ``test/<class>``."""
    made = left_or_right(count)
    for i, (image, label) in enumerate(zip(made.images, made.labels.tolist(), strict=True)):
        home = folder / ("test" if i >= count - 6 else "train") / classes[label]
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(home / f"{i:03}.png")
    return folder
