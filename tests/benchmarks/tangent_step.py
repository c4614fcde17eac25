"""A training step of tangents, three ways to take it: seconds, and activations held.

    python tests/benchmarks/tangent_step.py
    python tests/benchmarks/tangent_step.py --backbone deit_tiny_patch16_224 \
        --checkpoint data/deit_tiny_patch16_224.fp16.safetensors --batch 16

- *full*: a step of plain fine-tuning, for comparison;
- *JVP + VJP*: as fedcompo takes it, one JVP and one ordinary backward pass;
- *through the JVP*: forward mode recorded, and reverse mode through the record.

A step is the forward pass, the loss and the gradient in every target weight; the optimiser, alike
for all, is left out. The ways take turns in one process, so that their ratio holds on a noisy
machine. *Held* are the bytes that a step keeps for its backward pass, beside the pre-trained
weights and the change; plain fine-tuning holds their sum too.
"""

from __future__ import annotations

import statistics
import time

import torch
from measuring import head, kept_for_backward, options, parsed, row
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.backbone.tangent import square_loss, tangent_features
from fedcompo.config.run import BackboneConfig
from fedcompo.method.deltas import Weights

CLASSES = 10


def full(backbone: Backbone, tau: Weights, images: Tensor) -> Tensor:
    theta = {name: backbone.theta_0[name] + change for name, change in tau.items()}
    return backbone.forward(theta)(images)


def through_the_jvp(backbone: Backbone, tau: Weights, images: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        value, change = jvp(
            lambda theta: backbone.forward(theta)(images), (backbone.theta_0,), (tau,)
        )
    return value + change


WAYS = {"full": full, "JVP + VJP": tangent_features, "through the JVP": through_the_jvp}


class Steps:
    """Takes steps on random images, all from the same weights."""

    def __init__(self, backbone: Backbone, *, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        seen = backbone.preprocessing
        shape = (batch, seen.channels, seen.image_size, seen.image_size)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        self.images, self.backbone = images.to(backbone.device), backbone
        self.labels = torch.randint(CLASSES, (batch,), generator=generator).to(backbone.device)
        head = torch.randn(CLASSES, backbone.num_features, generator=generator)
        self.head = head.to(backbone.device)
        self.tau = {
            name: (1e-3 * torch.randn(weight.shape, generator=generator)).to(weight)
            for name, weight in backbone.theta_0.items()
        }

    def take(self, way: str) -> list[Tensor]:
        """Gradients in every target weight."""
        tau = {name: change.requires_grad_() for name, change in self.tau.items()}
        features = WAYS[way](self.backbone, tau, self.images)
        loss = square_loss(features.float() @ self.head.T, self.labels, 15.0)
        return list(torch.autograd.grad(loss, list(tau.values())))

    def seconds(self, way: str) -> float:
        began = time.perf_counter()
        self.take(way)
        if self.images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def held(self, way: str) -> int:
        """Bytes kept for the backward pass."""
        weights = [*self.backbone.model.parameters(), *self.tau.values()]
        known = {weight.untyped_storage().data_ptr() for weight in weights}
        sizes = kept_for_backward(lambda: self.take(way))
        return sum(size for place, size in sizes.items() if place not in known)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--image-size", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parsed(parser, batch=2, rounds=1)
    config = BackboneConfig(
        backbone=arguments.backbone,
        checkpoint=arguments.checkpoint,
        image_size=arguments.image_size,
    )
    backbone = load_backbone(config, arguments.device)
    steps = Steps(backbone, batch=arguments.batch)
    size = backbone.preprocessing.image_size
    print(f"{arguments.backbone}, {arguments.batch} images of {size} pixels, {arguments.device}\n")
    report(steps, arguments.rounds)


def report(steps: Steps, rounds: int) -> None:
    """Print the table."""
    reference = torch.cat([g.flatten() for g in steps.take("through the JVP")])
    actual = torch.cat([g.flatten() for g in steps.take("JVP + VJP")])
    off = float((actual - reference).norm() / reference.norm())
    held = {way: steps.held(way) for way in WAYS}  # also warms up
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            seconds[way].append(steps.seconds(way))
    head("step", "seconds", "times full", "held, MB", "times full")
    for way in WAYS:
        ratios = [own / base for own, base in zip(seconds[way], seconds["full"], strict=True)]
        taken = f"{statistics.median(seconds[way]):.3f}", f"{statistics.median(ratios):.2f}"
        row(way, *taken, f"{held[way] / 1e6:.1f}", f"{held[way] / held['full']:.2f}")
    print(f"\nGradients of the two tangent steps differ by {off:.1e}, relatively.")


if __name__ == "__main__":
    main()
