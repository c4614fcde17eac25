"""Exact Fisher diagonal against leading-r: passes, seconds, and what leading-r leaves out.

    python tests/benchmarks/fisher_passes.py
    python tests/benchmarks/fisher_passes.py --data npz:data/cifar100_32.npz \
        --backbone deit_tiny_patch16_224 --checkpoint data/deit_tiny_patch16_224.fp16.safetensors \
        --image-size 64 --classes 10 --classes 100

The estimators take turns in one process, so that their ratio holds on a noisy machine.
"""

from __future__ import annotations

import argparse
import time

import torch

from fedcompo.backbone.backbone import load_backbone
from fedcompo.config.choices import FisherKind
from fedcompo.config.run import BackboneConfig, DataConfig
from fedcompo.data.client_data import load_client_data
from fedcompo.method.features import extract_features
from fedcompo.method.heads import fit_head, zero_head
from fedcompo.training.fisher_estimate import estimate_fisher


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--image-size", type=int, default=0)
    parser.add_argument("--classes", type=int, action="append", help="repeat for several")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--tolerance", type=float, action="append", help="repeat for several")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    backbone = load_backbone(
        BackboneConfig(
            backbone=arguments.backbone,
            checkpoint=arguments.checkpoint,
            image_size=arguments.image_size,
        )
    )
    print("classes  estimator       passes  seconds  ratio  left out %  bound %  curvature %")
    for classes in arguments.classes or [10]:
        compare(backbone, arguments, classes)


def compare(backbone, arguments, classes: int) -> None:
    """Print one block of the table: all estimators at one number of classes."""
    config = DataConfig(data=arguments.data, num_tasks=1, num_classes=classes, images_per_class=20)
    data = load_client_data(config, backbone.preprocessing, partition=0, seed=0)
    features = extract_features(backbone.forward({}), data.train.images)
    start = zero_head(data.classes, backbone.num_features)
    head = fit_head(features, data.train.labels, start, ridge=1e-3)
    picked = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    images = backbone.preprocessing.normalise(data.train.images[picked[: arguments.images]])
    tolerances = arguments.tolerance or [0.01, 0.1]
    estimators = [("exact", FisherKind.EXACT, 0.0)]
    estimators += [(f"leading {t:g}", FisherKind.LEADING, t) for t in tolerances]
    seconds = {name: [] for name, *_ in estimators}
    found = {}
    for _ in range(arguments.rounds):
        for name, kind, tolerance in estimators:
            began = time.perf_counter()
            fisher, report = estimate_fisher(
                backbone.model,
                head,
                images.split(32),
                backbone.theta_0,
                kind=kind,
                tolerance=tolerance,
            )
            seconds[name].append(time.perf_counter() - began)
            found[name] = fisher, report
    exact = found["exact"][1].trace
    for name, *_ in estimators:
        report, best = found[name][1], min(seconds[name])
        print(
            f"{classes:7d}  {name:14s}  {report.passes:6d}  {best:7.2f}  "
            f"{best / min(seconds['exact']):5.2f}  {100 * (1 - report.trace / exact):10.3f}  "
            f"{100 * report.error_bound / exact:7.3f}  {100 * report.discarded_mass:11.3f}"
        )


if __name__ == "__main__":
    main()
