"""What a party can tell of θ₀ from its own images alone: a linear probe, and a Fisher diagonal.

Clients do so, each by itself; and whoever makes a reference Fisher from data of no client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fedcompo.backbone.backbone import Backbone
from fedcompo.config.run import FisherConfig
from fedcompo.data.client_data import Split
from fedcompo.method.features import extract_features
from fedcompo.method.fisher import FisherDiagonal, FisherReport, estimate_fisher
from fedcompo.method.heads import Head, fit_head, zero_head
from fedcompo.seeds import generator_for

ImagesCallback = Callable[[int, int], None]
"""Called as images are taken with how many have been, and how many there are."""


def fit_probe(backbone: Backbone, data: Split, classes: tuple[str, ...], *, ridge: float) -> Head:
    """Fit a linear classifier to the pre-trained features of labelled images.

    The same images give the same head, whoever else takes part.

    Args:
        backbone: Pre-trained weights.
        data: Images and labels; labels index ``classes``.
        classes: Names of the classes.
        ridge: How strongly the head is held to zero; see :func:`fedcompo.method.heads.fit_head`.
    """
    features = extract_features(backbone.forward({}), data.images)
    start = zero_head(classes, backbone.num_features)
    return fit_head(features, data.labels, start, ridge=ridge)


def fisher_of_images(
    backbone: Backbone,
    head: Head,
    images: Tensor,
    config: FisherConfig,
    *,
    seed: int,
    owner: str,
    on_images: ImagesCallback = lambda taken, total: None,
) -> tuple[FisherDiagonal, FisherReport]:
    """Estimate the Fisher diagonal of the target weights and a head on one party's images.

    Args:
        backbone: Pre-trained weights.
        head: Turns features into logits.
        images: (count, channels, size, size), uint8.
        config: How to estimate it, and on how many of the images.
        seed: Seed of the run.
        owner: Whose images they are; draws are derived from ``seed`` and this name.
        on_images: Told of progress.

    Returns:
        The *sum* over the images used, float32 on the CPU, and a report.
    """
    if 0 < config.fisher_examples < len(images):
        generator = generator_for(seed, "fisher-examples", owner)
        images = images[torch.randperm(len(images), generator=generator)[: config.fisher_examples]]

    def batches() -> Iterator[Tensor]:
        taken = 0
        for part in torch.split(images, config.fisher_batch):
            yield backbone.preprocessing.normalise(part.to(backbone.device))
            taken += len(part)
            on_images(taken, len(images))

    fisher, report = estimate_fisher(
        backbone.model,
        head,
        batches(),
        backbone.theta_0,
        kind=config.fisher,
        tolerance=config.fisher_tolerance,
        samples=config.fisher_samples,
        generator=generator_for(seed, "fisher", owner),
    )
    sums = {name: total.float().cpu() for name, total in fisher.sums.items()}
    return FisherDiagonal(sums, fisher.num_examples, fisher.classes), report
