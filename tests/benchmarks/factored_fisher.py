"""A Fisher in fewer numbers, beside the dense one: bytes, distance, and how firmly it holds.

    python tests/benchmarks/factored_fisher.py
    python tests/benchmarks/factored_fisher.py --data npz:data/cifar100_32.npz --classes 20 \
        --backbone deit_tiny_patch16_224 --checkpoint data/deit_tiny_patch16_224.fp16.safetensors \
        --image-size 96

Client 0 is anchored by the sum over the others' Fishers, each sent in the form and the numbers that
the row names. What counts is the penalty: of random changes, and of those that client 0 trains.
"""

from __future__ import annotations

import functools
import math
import operator

import torch
from measuring import head, options, parsed, row

from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.config.choices import FisherForm, Kind, Wire
from fedcompo.config.data import DataConfig
from fedcompo.config.run import BackboneConfig, FisherConfig, TrainConfig
from fedcompo.data.client_data import ClientData, load_client_data
from fedcompo.messages.wire import decode, encode, relative_error
from fedcompo.method.deltas import Weights
from fedcompo.method.fisher import FisherDiagonal, expanded
from fedcompo.method.heads import zero_head
from fedcompo.method.penalties import ita_penalty
from fedcompo.seeds import generator_for
from fedcompo.storage.tensorfile import prefixed, section
from fedcompo.training.fit import fit_task_vector
from fedcompo.training.probing import fisher_of_images

CLIENTS = 5
ROWS = [(form, wire) for form in (FisherForm.DENSE, FisherForm.FACTORED) for wire in Wire]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--image-size", type=int, default=0)
    parser.add_argument("--classes", type=int, default=0, help="0: all")
    parser.add_argument("--images", type=int, default=20, help="a class")
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parsed(parser, images=2, epochs=2)
    backbone = load_backbone(
        BackboneConfig(
            backbone=arguments.backbone,
            checkpoint=arguments.checkpoint,
            image_size=arguments.image_size,
        )
    )
    source = DataConfig(
        arguments.data,
        num_tasks=CLIENTS,
        num_classes=arguments.classes,
        images_per_class=arguments.images,
    )
    clients = [
        load_client_data(source, backbone.preprocessing, partition=i, seed=0)
        for i in range(CLIENTS)
    ]
    fishers = [
        fisher_of_images(backbone, d.train.images, FisherConfig(), seed=0, owner=d.name)[0]
        for d in clients
    ]
    taus = changes(backbone, clients[0], arguments.epochs)
    print_table(backbone, fishers[1:], taus)


def changes(backbone: Backbone, data: ClientData, epochs: int) -> dict[str, Weights]:
    """Task vectors by name: random, and trained from a head of zeros without an anchor."""
    generator = torch.Generator().manual_seed(0)
    found = {
        "random": {
            n: torch.randn(w.shape, generator=generator) for n, w in backbone.theta_0.items()
        }
    }
    start = zero_head(data.classes, backbone.num_features)
    for kind in (Kind.FULL, Kind.LORA, Kind.IA3):
        fitted = fit_task_vector(
            backbone,
            kind,
            data.train,
            start,
            TrainConfig(kind=str(kind), local_epochs=epochs, local_steps=0),
            generator=generator_for(0, "train", data.name),
        )
        found[str(kind)] = fitted.task_vector.dense(backbone.theta_0)
    return found


def print_table(
    backbone: Backbone, fishers: list[FisherDiagonal], taus: dict[str, Weights]
) -> None:
    """Print one row for each form and wire; the first is the dense Fisher itself."""
    exact = expanded(functools.reduce(operator.add, fishers).sums, backbone.theta_0)
    names = [f"penalty, {name}" for name in taus]
    head("form", "wire", "bytes a client", "relative error", "cosine", *names, text=2)
    for form, wire in ROWS:
        sums, size = sent(backbone, fishers, form, wire)
        ratios = [
            float(ita_penalty(tau, sums, 1.0) / ita_penalty(tau, exact, 1.0))
            for tau in taus.values()
        ]
        apart = f"{relative_error(exact, sums):.2%}", f"{cosine(exact, sums):.4f}"
        row(form, wire, f"{size:,}", *apart, *(f"{ratio:.3f}" for ratio in ratios))


def sent(
    backbone: Backbone, fishers: list[FisherDiagonal], form: FisherForm, wire: Wire
) -> tuple[Weights, int]:
    """The sum of what arrives, dense, and the mean bytes of tensors a client."""
    arrived, size = [], 0
    for fisher in fishers:
        parts = (fisher.reduced() if form is FisherForm.FACTORED else fisher).sums
        coded = encode(prefixed("fisher", parts), wire)
        size += sum(t.numel() * t.element_size() for t in coded.values())
        received = section("fisher", decode(coded, wire, source="benchmark"))
        arrived.append(FisherDiagonal(received, fisher.num_examples))
    total = functools.reduce(operator.add, arrived)
    return expanded(total.sums, backbone.theta_0), size // len(fishers)


def cosine(one: Weights, other: Weights) -> float:
    """Of two Fishers as one vector each."""
    products = [
        [float((a[n].double() * b[n].double()).sum()) for n in one]
        for a, b in ((one, other), (one, one), (other, other))
    ]
    mixed, left, right = map(math.fsum, products)
    return mixed / math.sqrt(left * right)


if __name__ == "__main__":
    main()
