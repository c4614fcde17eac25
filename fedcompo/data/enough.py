"""Refuse clients with too few images: what is made of few tells much of each."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import drawn_aside
from fedcompo.errors import ConfigError, DataError


def check_enough(
    classes: tuple[str, ...], labels: Tensor, tests: int, *, client: str, config: RunConfig
) -> None:
    """Refuse work of which something would be sent that is of fewer than ``min-images`` images.

    Args:
        classes: The client's.
        labels: Of its training images as the run's settings draw them, (count,).
        tests: Number of its test images.
        client: Its name.
        config: Settings, capped.

    Raises:
        DataError: If a class has fewer training images, or all classes have fewer test images.
        ConfigError: If the run asks for a Fisher of fewer.
    """
    least, wanted = config.caps.min_images, config.fisher.fisher_examples
    aside = drawn_aside(labels, share=config.train.aside, seed=config.seed, client=client)
    counts = torch.bincount(labels[~aside], minlength=len(classes)).tolist()
    few = {name: count for name, count in zip(classes, counts, strict=True) if count < least}
    advice = (
        "Add images, or set `min-images` lower on this node: what is made of few images tells much "
        "of each."
    )
    if few:
        listed = ", ".join(f"{name!r} {count}" for name, count in few.items())
        raise DataError(
            f"Too few training images of {len(few)} classes, without those drawn for tests, kept "
            f"aside, or above `images-per-class`: {listed}; `min-images` is {least}. {advice}",
            told=f"{len(few)} classes have fewer training images than `min-images`, {least}",
        )
    if tests < least:
        raise DataError.public(f"There are {tests} test images; `min-images` is {least}. {advice}")
    if 0 < wanted < least:
        raise ConfigError.public(
            f"`fisher-examples` is {wanted}, and this node's `min-images` is {least}. Set the "
            "first to 0 or at least to the second."
        )
