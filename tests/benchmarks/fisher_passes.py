"""Passes and seconds of each Fisher diagonal, by the number of classes.

    python tests/benchmarks/fisher_passes.py
    python tests/benchmarks/fisher_passes.py --backbone deit_tiny_patch16_224 \
        --checkpoint data/deit_tiny_patch16_224.fp16.safetensors --image-size 96

Images and heads are random: neither changes what an estimate costs. The estimators take turns in
one process, so that their ratio holds on a noisy machine.
"""

from __future__ import annotations

import time

import torch
from measuring import head, options, parsed, row

from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.config.choices import Curvature
from fedcompo.config.run import BackboneConfig
from fedcompo.method.heads import Head
from fedcompo.training.fisher_estimate import FisherReport, estimate_fisher

BATCH = 32


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--image-size", type=int, default=0)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4, help="labels an example, monte-carlo")
    parser.add_argument("--rounds", type=int, default=3)
    given = parsed(parser, images=2, rounds=1, classes=[3, 9])
    backbone = load_backbone(
        BackboneConfig(
            backbone=given.backbone, checkpoint=given.checkpoint, image_size=given.image_size
        )
    )
    print(f"{given.images} images\n")
    head("classes", "curvature", "passes a batch", "seconds", text=2)
    for classes in given.classes:
        seconds: dict[Curvature, list[float]] = {curvature: [] for curvature in Curvature}
        passes: dict[Curvature, float] = {}
        for curvature in given.rounds * list(Curvature):
            began = time.perf_counter()
            report = estimate(backbone, classes, curvature, given.images, given.samples)
            seconds[curvature].append(time.perf_counter() - began)
            passes[curvature] = report.passes / report.batches
        for curvature, taken in seconds.items():
            row(classes, curvature, f"{passes[curvature]:g}", f"{min(taken):.2f}")


def estimate(
    backbone: Backbone, classes: int, curvature: Curvature, images: int, samples: int
) -> FisherReport:
    """One estimate over random images, under a random head of so many classes."""
    generator = torch.Generator().manual_seed(0)
    seen, width = backbone.preprocessing, backbone.num_features
    shape = (images, seen.channels, seen.image_size, seen.image_size)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    weight = torch.randn(classes, width, generator=generator) / width**0.5
    head = Head(tuple(map(str, range(classes))), weight, torch.zeros(classes))
    _, report = estimate_fisher(
        backbone.model,
        (seen.normalise(part) for part in pixels.split(BATCH)),
        backbone.theta_0,
        head=head,
        curvature=curvature,
        samples=samples,
        generator=generator,
    )
    return report


if __name__ == "__main__":
    main()
