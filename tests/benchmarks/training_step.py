"""A client's training step beside one of PEFT's LoRA: seconds, and memory held.

    python tests/benchmarks/training_step.py
    python tests/benchmarks/training_step.py --backbone vit_base_patch16_224 \
        --checkpoint vit.safetensors --precision bfloat16 --device cuda

- *PEFT*: ``get_peft_model`` on the same timm model, with the same layers, ranks and classifier;
- *plain full*: PyTorch alone, with the weights themselves as parameters;
- *lora*, *ia3*, *full*: fedcompo's own step; *bounded*: with a trust region; *anchored*: with an
  anchor too, which act every fourth step; *IEL*: inside the sum with others.

All take cross entropy and the same fused AdamW, without augmentation. They take turns in one
process, four steps each; times and ratios are medians of turns. *Held* are the bytes kept for the
backward pass, beside the pre-trained weights, and the state of the optimiser.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import peft
import torch
import torch.nn.functional as F
from measuring import head, kept_for_backward, options, parsed, row
from torch import Tensor, nn

from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.config.choices import Augmentation, Kind, Precision
from fedcompo.config.run import BackboneConfig, TrainConfig
from fedcompo.method.deltas import rank_of
from fedcompo.method.heads import zero_head
from fedcompo.training.fit import Course, _autocast, _Training
from fedcompo.training.head import HeadTraining
from fedcompo.training.penalty import Anchor, Ensemble

CLASSES, RATE, STEPS = 10, 1e-4, 4
WAYS: dict[str, tuple[Kind, str]] = {
    "lora": (Kind.LORA, ""),
    "lora, bounded": (Kind.LORA, "bounded"),
    "lora, anchored": (Kind.LORA, "anchored"),
    "lora, IEL": (Kind.LORA, "IEL"),
    "ia3": (Kind.IA3, ""),
    "full": (Kind.FULL, ""),
}
Step = Callable[[Tensor, Tensor], object]


def of_fedcompo(
    backbone: Backbone, config: TrainConfig, kind: Kind, how: str
) -> tuple[Step, torch.optim.Optimizer]:
    """The step that a client takes."""
    names = tuple(map(str, range(CLASSES)))
    head = HeadTraining(zero_head(names, backbone.num_features), scale=1.0, device=backbone.device)
    course = Course()
    if how in ("bounded", "anchored"):
        course = Course(anchor=Anchor({n: t.square() for n, t in backbone.theta_0.items()}))
    config = replace(config, alpha=0.1 if how == "anchored" else 0.0)
    if how == "IEL":
        rest = {name: 0.01 * weight for name, weight in backbone.theta_0.items()}
        course = Course(ensemble=Ensemble(rest, 0.2, 0.0))
    generator = torch.Generator().manual_seed(0)
    training = _Training(backbone, kind, head, config, course, generator, 1000, 1.0)
    return lambda x, y: training.step(x, y, 1.0, last=False), training._optimiser


def of_pytorch(
    model: nn.Module, trained: list[nn.Parameter], backbone: Backbone, precision: Precision
) -> tuple[Step, torch.optim.Optimizer]:
    """The usual step of a model with a classifier."""
    model.to(backbone.device).train()
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)

    def step(images: Tensor, labels: Tensor) -> float:
        with _autocast(precision, backbone.device):
            logits = model(backbone.preprocessing.normalise(images))
        loss = F.cross_entropy(logits.float(), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    return step, optimiser


def classifier_on(backbone: Backbone) -> nn.Module:
    (model := copy.deepcopy(backbone.model)).reset_classifier(CLASSES)
    return model


def peft_step(backbone: Backbone, config: TrainConfig) -> tuple[Step, torch.optim.Optimizer]:
    layers = [name.removesuffix(".weight") for name in backbone.theta_0]
    ranks = {layer: rank_of(layer + ".weight", config.rank) for layer in layers}
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.rank,
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=layers,
        modules_to_save=["head"],
    )
    model = peft.get_peft_model(classifier_on(backbone), settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    return of_pytorch(model, trained, backbone, config.precision)


def plain_step(backbone: Backbone, config: TrainConfig) -> tuple[Step, torch.optim.Optimizer]:
    model = classifier_on(backbone)
    named = dict(model.named_parameters())
    trained = [named[name] for name in backbone.theta_0] + [*model.get_classifier().parameters()]
    for parameter in trained:
        parameter.requires_grad_()
    return of_pytorch(model, trained, backbone, config.precision)


def held(step: Step, optimiser: torch.optim.Optimizer, weights: set[int], batch: tuple) -> int:
    """Bytes kept for the backward pass, and AdamW's."""
    sizes = kept_for_backward(lambda: step(*batch))
    trained = (p for group in optimiser.param_groups for p in group["params"])
    weights = weights | {p.untyped_storage().data_ptr() for p in trained}
    states = (t for state in optimiser.state.values() for t in state.values())
    kept = sum(size for place, size in sizes.items() if place not in weights)
    return kept + sum(tensor.nbytes for tensor in states)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--image-size", type=int, default=0)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    given = parsed(parser, batches=[2], rounds=1)
    chosen = BackboneConfig(given.backbone, given.checkpoint, given.image_size)
    backbone = load_backbone(chosen, given.device)
    shape = backbone.preprocessing.shape
    print(f"{given.backbone}, images of {shape}, {given.device}, {given.precision}\n")
    head("batch", "step", "seconds", "times PEFT", "held, MB", "times PEFT", text=2)
    precision = Precision(given.precision)
    train = TrainConfig(augmentation=Augmentation.NONE, precision=precision)
    for size in given.batches:
        steps = {"PEFT": peft_step(backbone, train), "plain full": plain_step(backbone, train)}
        steps |= {way: of_fedcompo(backbone, train, *WAYS[way]) for way in given.ways}
        report(backbone, steps, size, given.rounds)


def report(
    backbone: Backbone, steps: dict[str, tuple[Step, torch.optim.Optimizer]], size: int, rounds: int
) -> None:
    """Print the lines of a batch size."""
    generator = torch.Generator().manual_seed(0)
    shape = (size, *backbone.preprocessing.shape)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    batch = images.to(backbone.device), labels.to(backbone.device)
    for step, _ in steps.values():
        step(*batch)
    kept = {}
    for way, (step, optimiser) in steps.items():
        cells = (cell.cell_contents for cell in step.__closure__ or ())
        models = [backbone.model, *(c for c in cells if isinstance(c, nn.Module))]
        weights = {p.untyped_storage().data_ptr() for m in models for p in m.parameters()}
        kept[way] = held(step, optimiser, weights, batch)
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(rounds):
        for way, (step, _) in steps.items():
            began = time.perf_counter()
            for _ in range(STEPS):
                step(*batch)
            if batch[0].is_cuda:
                torch.cuda.synchronize()
            seconds[way].append((time.perf_counter() - began) / STEPS)
    for way in steps:
        ratios = [own / base for own, base in zip(seconds[way], seconds["PEFT"], strict=True)]
        taken = f"{statistics.median(seconds[way]):.4f}", f"{statistics.median(ratios):.2f}"
        row(size, way, *taken, f"{kept[way] / 1e6:.1f}", f"{kept[way] / kept['PEFT']:.2f}")


if __name__ == "__main__":
    main()
