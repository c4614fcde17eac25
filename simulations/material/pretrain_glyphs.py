"""Pre-train the embedded backbone: a small vision transformer that reads printed glyphs.

    python simulations/material/pretrain_glyphs.py --output fedcompo/assets/glyph_vit

writes ``glyph_vit.safetensors`` (half precision) and ``glyph_vit.json`` (a timm configuration with
the history of the training). About an hour on two cores, minutes on a GPU. It resumes from its
own checkpoint when started again; given other ``--steps``, it goes on with that schedule. The
glyphs are those of ``glyphs.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from glyphs import IMAGE, Glyphs, augment, load_glyphs
from schedule import adamw, learning_rate

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {
    "img_size": IMAGE,
    "patch_size": 7,
    "in_chans": 1,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
}


def nearest_class_mean(model: torch.nn.Module, device: torch.device) -> float:
    """Measure nearest-class-mean accuracy on scikit-learn's digits, which are never trained on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, IMAGE, mode="bicubic", align_corners=False).clamp(0, 1)
    model.eval()
    with torch.no_grad():
        features = torch.cat([model((c.to(device) - 0.5) / 0.5) for c in images.split(256)]).cpu()
    model.train()
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0
    )
    means = torch.stack([features[train][labels[train] == c].mean(0) for c in range(10)])
    return float((torch.cdist(features[test], means).argmin(1) == labels[test]).float().mean())


def pretrain(arguments: argparse.Namespace) -> None:
    """Train, with a checkpoint every 500 steps, and write the backbone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    glyphs = load_glyphs()
    classes, order = len(glyphs.names), torch.argsort(glyphs.classes, stable=True)
    images, labels = glyphs.images[order].to(device), glyphs.classes[order]
    counts = torch.bincount(labels, minlength=classes)
    starts = counts.cumsum(0) - counts
    print(
        f"{classes} classes, {len(labels)} glyphs, {time.monotonic() - started:.0f} s", flush=True
    )

    torch.manual_seed(arguments.seed)
    model = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=0, **MODEL_ARGS)
    width = int(model.num_features)
    model, head = model.to(device), torch.nn.Linear(width, classes).to(device)
    parameters = [*model.parameters(), *head.parameters()]
    optimiser = adamw(parameters)
    generator = torch.Generator().manual_seed(arguments.seed)
    output = Path(arguments.output)
    checkpoint, first = output.with_suffix(".checkpoint"), 0
    history: list[dict[str, int]] = []
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        head.load_state_dict(saved["head"])
        optimiser.load_state_dict(saved["optimiser"])
        generator.set_state(saved["generator"].cpu())
        first, history = saved["step"], saved.get("history", [])
        print(f"resumed at step {first}", flush=True)

    history.append({"from_step": first, "schedule_steps": arguments.steps})
    loss_sum = hits = 0.0
    for step in range(first, arguments.steps):
        label = torch.randint(classes, (arguments.batch,), generator=generator)
        pick = torch.rand(arguments.batch, generator=generator)
        index = starts[label] + (pick * counts[label]).long()
        batch = (augment(images[index.to(device)], generator) - 0.5) / 0.5
        label = label.to(device)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.learning_rate, warmup=300)
        logits = head(model(batch))
        loss = F.cross_entropy(logits, label, label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        loss_sum += float(loss.detach())
        hits += float((logits.detach().argmax(1) == label).float().mean())
        if (step + 1) % 500 == 0:
            ncm = nearest_class_mean(model, device)
            print(
                f"step {step + 1}/{arguments.steps}  loss {loss_sum / 500:.3f}  "
                f"accuracy {hits / 500:.3f}  digits (nearest class mean) {ncm:.3f}  "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
            state = {
                "model": model.state_dict(),
                "head": head.state_dict(),
                "optimiser": optimiser.state_dict(),
                "generator": generator.get_state(),
                "step": step + 1,
                "history": history,
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
            accuracy, loss_sum, hits = hits / 500, 0.0, 0.0
    write(output, model, glyphs, arguments, history=history, accuracy=accuracy)


def write(
    output: Path,
    model: torch.nn.Module,
    glyphs: Glyphs,
    arguments: argparse.Namespace,
    *,
    history: list[dict[str, int]],
    accuracy: float,
) -> None:
    """Write the weights in half precision and the configuration that rebuilds the model."""
    tensors = {k: v.detach().cpu().half().contiguous() for k, v in model.state_dict().items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, output.with_suffix(".safetensors"))
    digest = hashlib.sha256(output.with_suffix(".safetensors").read_bytes()).hexdigest()
    config = {
        "architecture": ARCHITECTURE,
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "input_size": [1, IMAGE, IMAGE],
            "mean": [0.5],
            "std": [0.5],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        },
        "sha256": digest,
        "training": {
            "classes": len(glyphs.names),
            "glyphs": len(glyphs.classes),
            "steps": arguments.steps,
            "history": history,
            "batch": arguments.batch,
            "learning_rate": arguments.learning_rate,
            "seed": arguments.seed,
            "accuracy_augmented": round(accuracy, 4),
        },
    }
    output.with_suffix(".json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"wrote {output.with_suffix('.safetensors')} and {output.with_suffix('.json')}")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--output", default="fedcompo/assets/glyph_vit", help="path, no suffix")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    pretrain(parser.parse_args())


if __name__ == "__main__":
    main()
